"""What the device keeps of a run between two readings, and the checks that it is learning at all."""

import math
import time

import torch
from torch import Tensor

from dti_fast import sphere
from dti_fast.errors import UserError
from dti_fast.tokens import TokenEmbedding
from dti_fast.trainer.loggers import Log

GRADIENT_DEADLINE = 20  # steps within which a gradient must have arrived


class Monitor:
    """Collects numbers on the device; reads them, and so waits for it, only when asked for.

    Args:
        embeddings: one for each text encoder.
        first_step: steps that were made before.
        steps: of the whole run.
    """

    def __init__(self, embeddings: list[TokenEmbedding], first_step: int, steps: int):
        self.embeddings, self.steps = embeddings, steps
        self.started = time.monotonic()
        device = embeddings[0].directions.device
        # Changed in place only, since a captured step goes on writing where they lay at its capture.
        self.step = torch.full((), float(first_step), device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.first_failure = torch.full((), math.inf, device=device)
        self.largest_gradient = torch.zeros((), device=device)
        self.read_step = first_step

    def record(self, loss: Tensor, failed: Tensor) -> None:
        """Take note of the next step, on the device; `failed` is 1 from the first loss that was not finite on."""
        self.step += 1
        self.loss_sum += loss
        failure = torch.where(failed > 0, self.step, torch.inf)
        self.first_failure.copy_(torch.minimum(self.first_failure, failure))
        for embedding in self.embeddings:
            largest = embedding.rows.grad.abs().max()
            self.largest_gradient.copy_(torch.maximum(self.largest_gradient, largest))

    def last_good_step(self, step: int) -> int:
        """The last step before the first failure, or `step` if all went well; waits for the device."""
        return int(min(step, self.first_failure.item() - 1))

    def read(self, step: int, learning_rate: float) -> Log:
        """What happened since the last reading.

        Raises:
            UserError: if no gradient has reached the embeddings by the deadline, or by the end of a shorter run.
        """
        if step == min(GRADIENT_DEADLINE, self.steps) and self.largest_gradient.item() == 0:
            raise UserError(
                "no gradient has reached the embedding, so nothing is learned: is the placeholder in the prompts?"
            )
        log = Log(
            step=step,
            loss=self.loss_sum.item() / (step - self.read_step),
            learning_rate=learning_rate,
            angle_degrees=[
                sphere.distance(e.directions.detach(), e.mu).rad2deg().mean().item() for e in self.embeddings
            ],
            magnitude=[e.vectors().detach().norm(dim=-1).mean().item() for e in self.embeddings],
            seconds=time.monotonic() - self.started,
        )
        self.loss_sum.zero_()
        self.read_step = step
        return log
