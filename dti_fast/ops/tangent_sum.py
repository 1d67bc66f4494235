"""`tangent_sum`: per-sample gradients of unit rows, normalised along the sphere and added."""

import torch
from torch import Tensor

from dti_fast.ops._dispatch import FLOATS, Operator, describe
from dti_fast.reference import tangent_sum as reference


def _check(grad, p) -> None:
    if p.dim() != 2 or p.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"p must be float32 or float64 [K, D], got {describe(p)}")
    if grad.dim() != 3 or grad.shape[1:] != p.shape or grad.dtype not in FLOATS or grad.device != p.device:
        raise RuntimeError(f"grad must be a float tensor [B, K, D] for p, {describe(p)}, got {describe(grad)}")


def _output(grad, p) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), p.new_empty((p.shape[0], 1))


Operator(
    "tangent_sum(Tensor grad, Tensor p) -> (Tensor, Tensor)",
    stem="tangent_sum",
    check=_check,
    output=_output,
    reference=reference.tangent_sum,
)


def tangent_sum(grad: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Project each sample's gradient to the tangent space at each row, normalise it, and add them up.

    The formula is `dti_fast.reference.tangent_sum`'s.  The samples are added in their order, so that it repeats bit for
    bit.  Nothing waits for the device.

    Args:
        grad: float32, bfloat16, float16 or float64 `[B, K, D]`, each sample's gradient with respect to `p`.
        p: float32 or float64 `[K, D]`, unit rows.

    Returns:
        The sum `[K, D]` and the number of samples in it `[K, 1]`, in p's dtype.

    Raises:
        RuntimeError: for a shape or dtype other than these.
    """
    return torch.ops.dti_fast.tangent_sum(grad, p)
