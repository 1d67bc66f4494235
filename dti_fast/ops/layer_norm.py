"""`layer_norm` over frozen weight and bias: the input gradient alone."""

import torch
from torch import Tensor

from dti_fast.ops._dispatch import FLOATS, Operator, computed_in, describe
from dti_fast.reference import layer_norm as reference


def _check(x, weight, bias, eps) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in FLOATS:
        raise RuntimeError(f"x must be float32, bfloat16, float16 or float64 [..., D], got {describe(x)}")
    _check_affine("weight", weight, x)
    _check_affine("bias", bias, x)


def _check_backward(grad, x, mean, rstd, weight) -> None:
    _check(x, weight, None, 0.0)
    if grad.shape != x.shape or grad.dtype not in FLOATS or grad.device != x.device:
        raise RuntimeError(f"grad must be float {list(x.shape)} on {x.device}, got {describe(grad)}")
    rows, dtype = (*x.shape[:-1], 1), computed_in(x)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor.shape != rows or tensor.dtype != dtype or tensor.device != x.device:
            raise RuntimeError(f"{name} must be at least float32 {list(rows)} on {x.device}, got {describe(tensor)}")


def _check_affine(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != x.shape[-1:] or tensor.dtype not in FLOATS or tensor.device != x.device:
        raise RuntimeError(f"{name} must be float [{x.shape[-1]}] on {x.device}, got {describe(tensor)}")


def _output(x, weight, bias, eps) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=computed_in(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _output_backward(grad, x, mean, rstd, weight) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError("layer_norm gives weight and bias no gradient: call requires_grad_(False) on them")
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # or the backward of every layer would fill two tensors of zeros
    ctx.save_for_backward(x, mean, rstd, weight)


def _backward(ctx, grad, *_):
    if grad is None:
        return None, None, None, None
    return torch.ops.dti_fast.layer_norm_backward(grad, *ctx.saved_tensors), None, None, None


Operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    stem="layer_norm",
    check=_check,
    output=_output,
    reference=reference.layer_norm,
    fused=("triton",),
    save=_save,
    backward=_backward,
    keeps="LayerNorm input",
)
Operator(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) -> Tensor",
    stem="layer_norm",
    check=_check_backward,
    output=_output_backward,
    reference=reference.layer_norm_backward,
    fused=("triton",),
)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension, with statistics and arithmetic at least in float32.

    `(x - mean) / sqrt(variance + eps) * weight + bias`, where the variance is summed around the mean.  Autograd keeps
    x, the mean and the inverse deviation of each row, and the frozen weight, which exists anyway.

    Args:
        x: float32, bfloat16, float16 or float64 `[..., D]`; gets a gradient.  The kernels hold a row in registers,
            which is meant for D up to 8192.
        weight: `[D]` in any of these dtypes, or None for ones; frozen.
        bias: `[D]` in any of these dtypes, or None for zeros; frozen.
        eps: added to the variance.

    Returns:
        `[..., D]` contiguous, in x's dtype.

    Raises:
        RuntimeError: for a shape or dtype other than these, and for a weight or bias that requires a gradient
            while gradients are recorded.
    """
    return torch.ops.dti_fast.layer_norm(x, weight, bias, eps)[0]
