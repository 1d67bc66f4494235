"""Checkpoints: a few kilobytes in one safetensors file, its settings in the header."""

import json
import re
from pathlib import Path

from dti_fast.errors import UserError
from dti_fast.files import read_tensors, write_tensors
from dti_fast.trainer.config import Settings
from dti_fast.trainer.learner import Learner

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


def forget_checkpoints(config: Settings) -> None:
    """Delete an earlier run's checkpoints, so that "latest" cannot mean one of them."""
    for path in _checkpoints(config.output_dir / "checkpoints"):
        path.unlink()


def find_checkpoint(config: Settings) -> Path | None:
    """The file to resume from, or None for a fresh start (also if "latest" finds none)."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        found = _checkpoints(config.output_dir / "checkpoints")
        return found[-1] if found else None
    path = Path(config.resume_from_checkpoint)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}; --resume_from_checkpoint takes a file or 'latest'")
    return path


def load_checkpoint(path: Path, config: Settings, belongs_to: dict, learner: Learner) -> int:
    """Put a checkpoint's state into the learner; returns its step.

    Raises:
        UserError: if it is of another method, model, data or settings (`identity`), so that continuing would be another
            run, or past the last step.
    """
    stored, header = read_tensors(path)
    if "step" not in header:
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
    differing = [k for k, v in json.loads(json.dumps(belongs_to["settings"])).items() if settings.get(k) != v]
    if differing:
        changes = ", ".join(f"{k} (was {settings.get(k)})" for k in differing)
        raise UserError(f"{path.name} was made with other settings: {changes}; use the same, or start anew")
    learner.load_state(stored)
    learner.scaler.load_state_dict(json.loads(header["scaler"]))
    return step
