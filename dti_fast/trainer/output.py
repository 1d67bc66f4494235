"""The output folder of a run: whether it may be written, whose it is, and the files of the learned concept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from dti_fast import __version__
from dti_fast.backbones import Backbone
from dti_fast.errors import UserError
from dti_fast.files import remove_temporary
from dti_fast.formats import lora_paths, write_embeddings
from dti_fast.trainer.config import Settings
from dti_fast.trainer.learner import Learner

LOCK = ".lock"


def check_output(folder: Path) -> None:
    """Raise a UserError if `folder` could not be made or written, or has a name that is no text; makes nothing."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"the output folder {str(folder)!r} has a name that is not UTF-8; choose another") from None
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"the output folder {str(folder)!r} cannot be written; choose another with --output_dir")


def _results(folder: Path) -> list[Path]:
    """What a run cannot make again in a moment."""
    patterns = ("checkpoints/checkpoint-*.safetensors", "learned_embeds*.safetensors", "step-*/*.safetensors")
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def check_unused(config: Settings, checkpoint: Path | None) -> None:
    """Raise a UserError if the folder holds a run that this one would replace, unless `overwrite` says so.

    A run that goes on from one of the folder's own checkpoints replaces nothing.
    """
    folder = config.output_dir
    own = checkpoint is not None and checkpoint.resolve().parent.parent == folder.resolve()
    if _results(folder) and not own and not config.overwrite:
        raise UserError(
            f"{str(folder)!r} holds a run already: go on with it by --resume_from_checkpoint latest, replace it by "
            "--overwrite, or choose another --output_dir"
        )


def forget_run(folder: Path) -> None:
    """Delete what an earlier run left, so that none of its files is taken for the new one's."""
    for path in [*_results(folder), *folder.glob("preview*.png"), folder / "log.jsonl"]:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against every other run, make it if it is not there, and clear up what killed writers left.

    Raises:
        UserError: if another run holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        launcher = f", and this one was started {ranks} times: a run uses one device, leave out torchrun"
        raise UserError(
            f"another run is writing to {str(folder)!r}{launcher if ranks > 1 else ''}; choose another --output_dir"
        ) from None
    try:
        remove_temporary(folder)
        remove_temporary(folder / "checkpoints")
        yield
    finally:
        lock.release()  # the file stays, so that all who ask for the lock ask for the same one
        if [path.name for path in folder.iterdir()] == [LOCK]:  # the run came to nothing
            with suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()


def mean_norms(vectors: list[Tensor]) -> list[float]:
    """For each text encoder the mean norm of its vectors."""
    return [v.norm(dim=-1).mean().item() for v in vectors]


def save_concept(
    config: Settings, fingerprint: str, step: int, learner: Learner, backbone: Backbone, folder: Path
) -> tuple[list[Path], list[Path]]:
    """Write what is learned after `step` steps into `folder`; returns the files of the embedding and of the LoRA."""
    vectors = learner.vectors()
    metadata = {
        "method": config.method, "token": config.placeholder_token, "base_model": config.pretrained_model_name_or_path,
        "base_model_fingerprint": fingerprint, "magnitude": mean_norms(vectors),
        "initializer_token": config.initializer_token, "steps": step, "seed": config.seed,
        "pooling": config.pooling, **backbone.metadata(), "dti_fast": __version__, "lora_rank": config.lora_rank,
    }  # fmt: skip
    if config.method == "ti-rescaled":
        metadata["trained_magnitude"] = mean_norms([e.vectors().detach() for e in learner.embeddings])
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_embeddings(folder, config.placeholder_token, vectors, metadata)
    if config.lora_rank:
        return paths, learner.ancillary.write_lora(folder, config.placeholder_token, backbone.pipeline, metadata)
    for path in lora_paths(folder, config.placeholder_token):
        path.unlink(missing_ok=True)  # an earlier run's
    return paths, []
