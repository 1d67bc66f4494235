"""One optimizer step, and the learning rates of all."""

import math

import torch
from torch import Tensor

from dti_fast.backbones import Backbone
from dti_fast.backbones.base import Path
from dti_fast.data.draws import Dataset, Draws
from dti_fast.loss import diffusion_loss
from dti_fast.memory.budget import Budget
from dti_fast.trainer.config import Settings
from dti_fast.trainer.learner import Learner


def schedule(config: Settings) -> Tensor:
    """The factor on the learning rates at every step, float64 `[max_train_steps]`."""
    steps, warmup = config.max_train_steps, config.lr_warmup_steps
    rates = torch.ones(steps, dtype=torch.float64)
    if config.lr_scheduler == "cosine":
        progress = ((torch.arange(steps) - warmup) / max(1, steps - warmup)).clamp(min=0)
        rates *= 0.5 * (1 + torch.cos(math.pi * progress))
    rates *= ((torch.arange(steps) + 1) / (warmup + 1)).clamp(max=1)
    return rates


def learning_rates(config: Settings) -> Tensor:
    """The learning rate of every step, float32 `[max_train_steps]`."""
    return (config.effective_learning_rate * schedule(config)).float()


def train_step(
    backbone: Backbone,
    data: Dataset,
    path: Path,
    passes: list[Draws],
    learner: Learner,
    failed: Tensor,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over `passes`; returns the loss and whether the run has failed, 0 or 1, on the device.

    A `budget` cuts the passes up and repeats them if memory runs out.

    Nothing here waits for the device.  If the loss is not finite, nothing moves, now or later: `failed`, which the
    caller hands from step to step, makes every further loss NaN, so that the state stays the last good one until
    the host looks.
    """

    def accumulate(passes: list[Draws]) -> Tensor:
        learner.zero_grad()
        total = torch.zeros((), device=failed.device)
        for draws in passes:
            loss = diffusion_loss(backbone, data, path, draws, learner.consistency)
            loss = (loss + learner.penalty()) / len(passes)
            loss = loss * torch.where(failed > 0, torch.nan, 1.0)
            learner.scaler.scale(loss).backward()
            total = total + loss.detach()
        return total

    total = budget.attempt(backbone, accumulate, passes) if budget else accumulate(passes)
    return total, learner.step(total)
