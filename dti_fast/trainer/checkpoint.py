"""Checkpoints: a few kilobytes in one safetensors file, its settings in the header."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from dti_fast.errors import UserError
from dti_fast.files import read_tensors, write_tensors
from dti_fast.trainer.config import Settings
from dti_fast.trainer.learner import Learner

_HEADER = {"step", "method", "model", "data", "settings", "scaler"}
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


def identity(config: Settings, model: str, data: str) -> dict:
    """What a checkpoint belongs to: the method, hashes of the model and of pictures and prompts, the settings."""
    return {"method": config.method, "model": model, "data": data, "settings": config.trajectory()}


def save_checkpoint(config: Settings, belongs_to: dict, step: int, learner: Learner) -> Path:
    """Write the state after `step` optimizer steps, and delete all but the newest checkpoints."""
    folder = config.output_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:06d}.safetensors"
    metadata = {"step": step, "scaler": learner.scaler.state_dict(), **belongs_to}
    write_tensors(learner.state(), path, metadata)
    for old in _checkpoints(folder)[: -config.checkpoints_total_limit]:
        old.unlink(missing_ok=True)
    return path


def _checkpoints(folder: Path) -> list[Path]:
    named = [(_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*.safetensors")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def find_checkpoint(config: Settings) -> Path | None:
    """The file to resume from, or None for a fresh start.

    Raises:
        UserError: if there is nothing to resume from.
    """
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        found = _checkpoints(config.output_dir / "checkpoints")
        if not found:
            raise UserError(
                f"nothing to resume in {str(config.output_dir)!r}: it holds no checkpoint; "
                "correct --output_dir, or leave out --resume_from_checkpoint to start anew"
            )
        return found[-1]
    path = Path(config.resume_from_checkpoint)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}; --resume_from_checkpoint takes a file or 'latest'")
    return path


def load_checkpoint(
    path: Path, config: Settings, belongs_to: dict, learner: Learner, say: Callable[[str], None]
) -> int:
    """Put a checkpoint's state into the learner; returns its step, and says from where the run goes on, and how.

    A run may be prolonged under any schedule: the further steps then follow the schedule of the longer run.

    Raises:
        UserError: if it is of another method, model, data or settings (`identity`), so that continuing would be another
            run, or past the last step, or damaged.
    """
    try:
        stored, header = read_tensors(path)
    except UserError as error:
        raise UserError(f"{error}; delete it to go on from the checkpoint before it") from None
    if not header.keys() >= _HEADER:
        raise UserError(f"{str(path)!r} is no checkpoint of a dti-fast run")
    if header["method"] != belongs_to["method"]:
        raise UserError(f"{path.name} is a checkpoint of the method {header['method']!r}, not {belongs_to['method']!r}")
    if header["model"] != belongs_to["model"]:
        raise UserError(f"{path.name} was made with another model; start anew or give the model it was made with")
    if header["data"] != belongs_to["data"]:
        raise UserError(f"{path.name} was made with other pictures or captions; use the same, or start anew")
    step = int(header["step"])
    if step > config.max_train_steps:
        raise UserError(f"{path.name} is past --max_train_steps {config.max_train_steps}; give more, or start anew")
    settings = json.loads(header["settings"])
    earlier_steps = settings.get("max_train_steps", config.max_train_steps)
    differing = [k for k, v in json.loads(json.dumps(belongs_to["settings"])).items() if settings.get(k) != v]
    if config.max_train_steps > earlier_steps:
        differing.remove("max_train_steps")
    if differing:
        changes = ", ".join(f"{k} (was {settings.get(k)})" for k in differing)
        raise UserError(f"{path.name} was made with other settings: {changes}; use the same, or start anew")
    present = learner.state()
    damaged = [k for k, v in present.items() if k not in stored or stored[k].shape != v.shape]
    damaged += [k for k, v in stored.items() if v.is_floating_point() and not v.isfinite().all()]
    damaged += [k for k, v in stored.items() if k.startswith("directions.") and not v.any(dim=-1).all()]
    if damaged or step < 1:
        what = damaged[0] if damaged else "the step"
        raise UserError(f"{path.name} is damaged ({what}); delete it to go on from the checkpoint before it")
    say(f"resuming after step {step}")
    if config.max_train_steps > earlier_steps:
        say(
            f"prolonged from {earlier_steps} to {config.max_train_steps} steps: the learning rate of the further ones "
            f"follows the {config.lr_scheduler} schedule of the longer run"
        )
    if step == config.max_train_steps:
        say(f"all {step} steps are made already; a larger --max_train_steps would prolong the run")
    learner.load_state(stored)
    learner.scaler.load_state_dict(json.loads(header["scaler"]))
    return step
