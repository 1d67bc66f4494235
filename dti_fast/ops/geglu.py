"""`geglu`: the gated linear unit of diffusers' transformer blocks, saving only its input."""

import torch
from torch import Tensor

from dti_fast.ops._dispatch import FLOATS, Operator, describe
from dti_fast.reference import geglu as reference


def _check(projected, approximate) -> None:
    if projected.dim() == 0 or projected.shape[-1] % 2 or projected.dtype not in FLOATS:
        raise RuntimeError(
            f"projected must be float32, bfloat16, float16 or float64 [..., 2F], got {describe(projected)}"
        )
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


def _check_backward(grad, projected, approximate) -> None:
    _check(projected, approximate)
    shape = (*projected.shape[:-1], projected.shape[-1] // 2)
    if grad.shape != shape or grad.dtype not in FLOATS or grad.device != projected.device:
        raise RuntimeError(f"grad must be float {list(shape)} on {projected.device}, got {describe(grad)}")


def _output(projected, approximate) -> Tensor:
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))


def _output_backward(grad, projected, approximate) -> Tensor:
    return projected.new_empty(projected.shape)


def _save(ctx, inputs, output) -> None:
    projected, ctx.approximate = inputs
    ctx.save_for_backward(projected)


def _backward(ctx, grad):
    return torch.ops.dti_fast.geglu_backward(grad, *ctx.saved_tensors, ctx.approximate), None


Operator(
    "geglu(Tensor projected, str approximate) -> Tensor",
    stem="geglu",
    check=_check,
    output=_output,
    reference=reference.geglu,
    fused=("triton",),
    save=_save,
    backward=_backward,
    keeps="GEGLU projection",
)
Operator(
    "geglu_backward(Tensor grad, Tensor projected, str approximate) -> Tensor",
    stem="geglu",
    check=_check_backward,
    output=_output_backward,
    reference=reference.geglu_backward,
    fused=("triton",),
)


def geglu(projected: Tensor, approximate: str = "none") -> Tensor:
    """`hidden * gelu(gate)`, where `hidden, gate = projected.chunk(2, -1)`; arithmetic at least in float32.

    Autograd keeps `projected` and nothing else, where plain PyTorch keeps the gelu's output too; the backward
    computes it again in the pass that it needs anyway.

    Args:
        projected: float32, bfloat16, float16 or float64 `[..., 2F]`; gets a gradient.
        approximate: "none" for the error function, "tanh" for the approximation, as in `torch.nn.functional.gelu`.

    Returns:
        `[..., F]` contiguous, in projected's dtype.

    Raises:
        RuntimeError: for an odd last dimension, another dtype or another `approximate`.
    """
    return torch.ops.dti_fast.geglu(projected, approximate)
