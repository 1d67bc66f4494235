"""What a person and a log file see of a run, and the checks that it is learning at all."""

import json
import math
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dti_fast import sphere
from dti_fast.errors import UserError
from dti_fast.tokens import TokenEmbedding

GRADIENT_DEADLINE = 20  # steps within which a gradient must have arrived


class Monitor:
    """Collects numbers on the device; reads them, and so waits for it, only when a line is logged."""

    def __init__(
        self, path: Path, embeddings: list[TokenEmbedding], first_step: int, steps: int, samples_per_step: int
    ):
        self.path, self.embeddings, self.samples_per_step = path, embeddings, samples_per_step
        self.first_step, self.started = first_step, time.monotonic()
        device = embeddings[0].directions.device
        self.loss_sum = torch.zeros((), device=device)
        self.failures = torch.zeros((), device=device)
        self.first_failure = torch.full((), math.inf, device=device)
        self.largest_gradient = torch.zeros((), device=device)
        self.lines = []
        if first_step and path.is_file():
            self.lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
        self.logged_step = first_step
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4f}  moved {task.fields[angle]:.1f}°  {task.fields[rate]:.1f} images/s"
            ),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("learning", total=steps, completed=first_step, loss=0.0, angle=0.0, rate=0.0)

    def __enter__(self) -> "Monitor":
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def record(self, step: int, loss: Tensor, failed: Tensor) -> None:
        """Take note of optimizer step `step` (the first is 1); `failed` is 1 where its update was skipped."""
        self.loss_sum += torch.where(failed > 0, 0.0, loss)
        self.failures += failed
        self.first_failure = torch.where(failed > 0, self.first_failure.clamp(max=step), self.first_failure)
        if step - self.first_step <= GRADIENT_DEADLINE:
            for embedding in self.embeddings:
                self.largest_gradient = torch.maximum(self.largest_gradient, embedding.directions.grad.abs().max())
        self.progress.advance(self.task)

    def log(self, step: int, learning_rate: float, tolerate_failures: bool) -> None:
        """Write a line about the steps since the last one.

        Raises:
            UserError: if a loss was not finite, or no gradient has reached the embeddings.
        """
        count = step - self.logged_step - self.failures.item()
        seconds = time.monotonic() - self.started
        angles = [sphere.distance(e.directions.detach(), e.mu).rad2deg().mean().item() for e in self.embeddings]
        line = {
            "step": step,
            "loss": self.loss_sum.item() / count if count else None,
            "learning_rate": learning_rate,
            "angle_degrees": angles,
            "magnitude": [e.vectors().detach().norm(dim=-1).mean().item() for e in self.embeddings],
            "seconds": round(seconds, 3),
        }
        if self.failures.item() and not tolerate_failures:
            raise UserError(
                f"the loss was not finite at step {int(self.first_failure.item())}; that update was not made and the "
                "last good state is kept as a checkpoint. Try --mixed_precision no, or look at the pictures"
            )
        if self.first_step == 0 and step <= GRADIENT_DEADLINE and self.largest_gradient.item() == 0 and count:
            raise UserError(
                "no gradient has reached the embedding, so nothing is learned: the placeholder is not in the prompts "
                "that the text encoder sees (are the captions longer than its window?)"
            )
        self.lines.append(json.dumps(line))
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("\n".join(self.lines) + "\n")
        temporary.replace(self.path)
        rate = (step - self.first_step) * self.samples_per_step / max(seconds, 1e-9)
        self.progress.update(self.task, loss=line["loss"] or math.nan, angle=max(angles), rate=rate)
        self.loss_sum.zero_()
        self.failures.zero_()
        self.logged_step = step
