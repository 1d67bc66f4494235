"""The training run, read from top to bottom."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dti_fast.backbones import Backbone
from dti_fast.backbones.recorder import Tokens
from dti_fast.data.draws import Dataset, Draws, draw
from dti_fast.data.folder import Picture, find_pictures, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.data.prompts import training_prompts
from dti_fast.errors import UserError
from dti_fast.files import hash_tensors, write_text
from dti_fast.memory.budget import Budget, OutOfMemory
from dti_fast.tokens import TokenEmbedding
from dti_fast.trainer.checkpoint import find_checkpoint, identity, load_checkpoint, save_checkpoint
from dti_fast.trainer.config import Settings, TrainConfig
from dti_fast.trainer.graph import captured
from dti_fast.trainer.learner import Learner, install_embeddings
from dti_fast.trainer.loggers import Logger, Loggers, Start
from dti_fast.trainer.loggers.jsonl import Jsonl
from dti_fast.trainer.monitor import GRADIENT_DEADLINE, Monitor
from dti_fast.trainer.output import check_output, check_unused, forget_run, locked, mean_norms, save_concept
from dti_fast.trainer.preview import save_preview
from dti_fast.trainer.result import Result
from dti_fast.trainer.step import learning_rates, schedule, train_step
from dti_fast.trainer.summary import summarise

LEAST_ANGLE = 1.0  # degrees; a concept that is learned lies tens from its initial word


class Cancel(Protocol):
    """What asks a run to stop, such as a `threading.Event`."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class Job:
    """A run whose settings, pictures and captions have been checked, without a model.

    Attributes:
        config: resolved.
        prompts, prompt_per_picture: as `training_prompts` gives them.
        checkpoint: to go on from.
        started: the clock when the checks began.
    """

    config: Settings
    pictures: list[Picture]
    prompts: list[str]
    prompt_per_picture: bool
    checkpoint: Path | None
    started: float


def prepare(config: TrainConfig) -> Job:
    """Check all that can be checked before a model is loaded.

    Raises:
        UserError: for bad input.
    """
    started = time.monotonic()
    config = config.resolved()
    pictures = find_pictures(config.train_data_dir)
    prompts, prompt_per_picture = training_prompts(pictures, config.placeholder_token, config.learnable_property)
    check_output(config.output_dir)
    checkpoint = find_checkpoint(config)
    check_unused(config, checkpoint)
    return Job(config, pictures, prompts, prompt_per_picture, checkpoint, started)


def run(
    job: Job, backbone: Backbone, budget: Budget, loggers: Sequence[Logger] = (), cancel: Cancel | None = None
) -> Result:
    """Learn a concept; writes embeddings, preview, log, configuration and checkpoints to the output folder.

    The model is as it was afterwards, also after an error.

    Raises:
        UserError: for bad input, before anything is written where that is possible.
    """
    config = job.config
    device = next(backbone.denoiser.parameters()).device
    told = Loggers([Jsonl(), *loggers])
    result = None
    with ExitStack() as after:
        after.callback(lambda: told.end(result))
        after.enter_context(locked(config.output_dir))
        check_unused(config, job.checkpoint)  # another run may have come and gone since `prepare`
        after.enter_context(determinism(config.deterministic))
        after.callback(backbone.restore)
        backbone.set_pooling(config.pooling)
        embeddings = install_embeddings(config, backbone)
        for embedding in embeddings:
            after.callback(embedding.uninstall)

        path = backbone.path().to(device)
        told.phase("encoding the pictures")
        pixels, sizes = load_pictures(job.pictures, config.resolution or backbone.default_resolution())
        with budget.encoding(backbone):
            mean, std = encode_moments(backbone, pixels)
        tokens = backbone.tokenize(job.prompts)
        check_prompts(job.prompts, tokens, embeddings)
        warn_of_cuts(job.prompts, embeddings, backbone.tokenizers)
        told.message(summarise(config, backbone, embeddings, job.pictures, job.prompt_per_picture, sizes))
        fingerprint = backbone.fingerprint()
        run_identity = identity(config, fingerprint, hash_tensors([pixels, *(ids for ids, _ in tokens)]))
        del pixels
        data = Dataset(mean, std, sizes, tokens, job.prompt_per_picture).to(device)
        budget.apply(backbone)

        rates, factors = learning_rates(config), schedule(config).tolist()
        device_rates, lr = rates.to(device), torch.zeros((), device=device)
        scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
        learner = Learner(config, backbone, embeddings, lr, scaler)
        after.callback(learner.remove)
        if learner.ancillary is not None:
            told.message(learner.ancillary.describe())
        step = 0
        if job.checkpoint is not None:
            step = load_checkpoint(job.checkpoint, config, run_identity, learner, told.message)
        else:
            forget_run(config.output_dir)
        write_text(config.to_toml(), config.output_dir / "config.toml")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        def save(step: int) -> None:
            told.checkpoint(step, save_checkpoint(config, run_identity, step, learner))

        def preview(name: str) -> Path:
            told.phase("drawing the preview")
            save_preview(config, backbone, job.pictures, config.output_dir / name, budget)
            told.phase("")
            told.preview(step, config.output_dir / name)
            return config.output_dir / name

        def optimise(passes: list[Draws]) -> None:
            loss, failed_now = train_step(backbone, data, path, passes, learner, failed, budget)
            failed.copy_(failed_now)
            monitor.record(loss, failed)

        failed, log = torch.zeros((), device=device), None
        take_step: Callable[[list[Draws]], None] = optimise
        if config.cuda_graph == "on":
            take_step = captured(optimise, learner, told.message)
        told.start(Start(config.output_dir, config.to_dict(), step, config.max_train_steps, config.samples_per_step))
        monitor = Monitor(embeddings, step, config.max_train_steps)
        cancelled = False
        while step < config.max_train_steps and not cancelled:
            lr.copy_(device_rates[step])
            learner.begin(step, factors[step])
            first_pass = step * config.gradient_accumulation_steps
            passes = [
                draw(data, config.train_batch_size, len(path), config.seed, first_pass + i)
                for i in range(config.gradient_accumulation_steps)
            ]
            try:
                take_step(passes)
            except OutOfMemory:
                if good := monitor.last_good_step(step):
                    save(good)
                raise
            step += 1
            told.step(step)
            last = step == config.max_train_steps
            cancelled = not last and cancel is not None and cancel.is_set()
            log_now = step % config.logging_steps == 0 or step == GRADIENT_DEADLINE or last
            save_now = step % config.checkpointing_steps == 0 or last or cancelled
            export_now = config.save_steps and step % config.save_steps == 0
            if log_now or save_now or export_now:
                good = monitor.last_good_step(step)
                if good < step:
                    if good:
                        save(good)
                    kept = "; the state before it is kept as a checkpoint" if good else ""
                    raise UserError(
                        f"the loss or its gradient was not finite at step {good + 1}{kept}. "
                        "Try --mixed_precision no, or look at the pictures"
                    )
            if log_now:
                log = monitor.read(step, rates[step - 1].item())
                told.log(log)
            if save_now:
                save(step)
            if export_now:
                folder = config.output_dir / f"step-{step:06d}"
                save_concept(config, fingerprint, step, learner, backbone, folder)
            preview_now = config.validation_steps and step % config.validation_steps == 0
            if preview_now and config.num_validation_images and not last and not cancelled:
                preview(f"preview-{step:06d}.png")

        learned = config.method == "dti" and not cancelled
        if log is not None and learned and max(log.angle_degrees) < LEAST_ANGLE:
            warnings.warn(
                f"the vectors moved {max(log.angle_degrees):.1f} degrees from the initial word, so hardly anything was "
                "learned: try a larger --learning_rate, more --max_train_steps, or a smaller --kappa",
                stacklevel=2,
            )
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        embedding_paths: list[Path] = []
        lora_files: list[Path] = []
        preview_path = None
        vectors = [v.cpu() for v in learner.vectors()]
        if not cancelled:
            embedding_paths, lora_files = save_concept(config, fingerprint, step, learner, backbone, config.output_dir)
            learner.finish()
            del take_step  # a captured step holds its memory, which the preview needs
            preview_path = preview("preview.png") if config.num_validation_images else None
        result = Result(
            embedding_paths=embedding_paths,
            lora_paths=lora_files,
            preview_path=preview_path,
            log_path=config.output_dir / "log.jsonl",
            placeholder=config.placeholder_token,
            pooling=config.pooling,
            vectors=vectors,
            magnitudes=mean_norms(vectors),
            steps=step,
            loss=log.loss if log else float("nan"),
            angle_degrees=log.angle_degrees if log else [],
            seconds=time.monotonic() - job.started,
            peak_memory=peak,
            stopped="cancelled" if cancelled else "finished",
        )
    return result


def check_prompts(prompts: list[str], tokens: list[Tokens], embeddings: list[TokenEmbedding]) -> None:
    """Raise a UserError if a text encoder does not see the whole concept in a prompt that has it."""
    for (ids, _), embedding in zip(tokens, embeddings, strict=True):
        last_id = embedding.first_id + len(embedding.tokens) - 1
        for prompt, row in zip(prompts, ids.tolist(), strict=True):
            if embedding.placeholder in prompt and last_id not in row:
                count = len(embedding.tokens)
                what = "the placeholder lies" if count == 1 else f"the placeholder's {count} vectors reach"
                raise UserError(
                    f"the prompt {prompt[:40]!r}... is too long: {what} beyond the {len(row)} tokens that the text "
                    f"encoder sees; shorten the caption{' or take fewer --num_vectors' if count > 1 else ''}"
                )


def warn_of_cuts(prompts: list[str], embeddings: list[TokenEmbedding], tokenizers: list) -> None:
    """Warn of prompts that are longer than a text encoder sees, whose ends are therefore not learned with."""
    cut = {
        prompt: tokenizer.model_max_length
        for embedding, tokenizer in zip(embeddings, tokenizers, strict=True)
        for prompt in prompts
        if len(tokenizer(embedding.expand(prompt)).input_ids) > tokenizer.model_max_length
    }
    for prompt, length in cut.items():
        warnings.warn(f"cut off after the {length} tokens that the text encoder sees: {prompt[:40]!r}...", stacklevel=2)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms, if `wanted`; its switches and the environment are as before afterwards."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    variable = os.environ.get(name)
    if wanted:
        os.environ.setdefault(name, ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if wanted and variable is None:
            del os.environ[name]
