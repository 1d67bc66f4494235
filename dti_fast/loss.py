"""The loss of a pass: how well the denoiser predicts what the path asks of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from dti_fast.backbones import Backbone
from dti_fast.backbones.base import Path
from dti_fast.data.draws import Dataset, Draws


@dataclass(frozen=True)
class Consistency:
    """What Direct Consistency Optimization asks for (`dco_loss`).

    Attributes:
        beta: its strength.
        base_model: a context in which the denoiser is the base model, without LoRA and without gradients.
    """

    beta: float
    base_model: Callable[[], AbstractContextManager]


def diffusion_loss(
    backbone: Backbone, data: Dataset, path: Path, draws: Draws, consistency: Consistency | None = None
) -> Tensor:
    """Mean squared error of the denoiser's prediction, or `dco_loss` where `consistency` asks for it; float32."""
    latents = data.mean[draws.picture] + data.std[draws.picture] * draws.posterior_noise
    noisy, target = path.mix(latents, draws.noise, draws.timestep)
    tokens = [(ids[draws.prompt], mask[draws.prompt]) for ids, mask in data.tokens]
    condition = backbone.condition(tokens, data.sizes[draws.picture])
    denoise = partial(backbone.denoise, noisy, path.time[draws.timestep], condition)
    if consistency is None:
        return F.mse_loss(denoise(), target)
    with consistency.base_model():
        reference = denoise()
    return dco_loss(denoise(), reference, target, consistency.beta)


def dco_loss(prediction: Tensor, reference: Tensor, target: Tensor, beta: float) -> Tensor:
    """Direct Consistency Optimization (arXiv 2402.12004): learn the pictures, but stay near the base model.

        L = mean over samples b of  -log sigmoid(-beta (|prediction_b - target_b|^2 - |reference_b - target_b|^2))

    with |.|^2 the mean over a sample's elements and `reference` the prediction of the base model, LoRA switched off,
    for the same noisy latents, timestep and prompt.  A sample that the LoRA predicts better than the base model by
    much more than 1 / beta has a gradient near zero: it pulls no further away.  At the start, where both agree, L is
    log 2 and its gradient beta / 2 times that of the squared error.

    Here the sigmoid is taken of each sample, as the expectation outside the logarithm says.  The official code of DCO
    and of DTI takes it once of the batch's mean, so that one easy sample damps all others; for a batch of one, and to
    first order in beta, the two agree.  The prompt of the reference is the training prompt with the learned
    embedding, as in DTI's experiments; DCO's own code, when it learns an embedding too, gives the base model a prompt
    without it.

    Args:
        prediction, reference, target: float32 `[B, C, h, w]`.
        beta: strength, the paper's 1000; 0 would be no loss at all.
    """
    better = F.mse_loss(prediction, target, reduction="none") - F.mse_loss(reference, target, reduction="none")
    return -F.logsigmoid(-beta * better.flatten(1).mean(1)).mean()
