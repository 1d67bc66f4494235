"""`group_norm_silu` over frozen weight and bias: the input gradient alone, and no activation kept but the input."""

import torch
from torch import Tensor

from dti_fast.ops._dispatch import FLOATS, Operator, computed_in, describe
from dti_fast.reference import group_norm_silu as reference


def _check(x, num_groups, weight, bias, eps, silu) -> None:
    _check_input(x, weight, bias)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise RuntimeError(f"num_groups must divide the {x.shape[1]} channels of x, got {num_groups}")


def _check_backward(grad, x, mean, rstd, weight, bias, silu) -> None:
    _check_input(x, weight, bias)
    if grad.shape != x.shape or grad.dtype not in FLOATS or grad.device != x.device:
        raise RuntimeError(f"grad must be float {list(x.shape)} on {x.device}, got {describe(grad)}")
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        right = tensor.dim() == 2 and tensor.shape == mean.shape and tensor.shape[0] == x.shape[0]
        right = right and tensor.shape[1] > 0 and x.shape[1] % tensor.shape[1] == 0
        if not right or tensor.dtype != computed_in(x) or tensor.device != x.device:
            raise RuntimeError(
                f"{name} must be at least float32 [{x.shape[0]}, G] on {x.device}, got {describe(tensor)}"
            )


def _check_input(x, weight, bias) -> None:
    if x.dim() < 2 or x.shape[1:].numel() == 0 or x.dtype not in FLOATS:
        raise RuntimeError(f"x must be float32, bfloat16, float16 or float64 [N, C, *], got {describe(x)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[1:2] or tensor.dtype not in FLOATS or tensor.device != x.device:
            raise RuntimeError(f"{name} must be float [{x.shape[1]}] on {x.device}, got {describe(tensor)}")


def _output(x, num_groups, weight, bias, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=computed_in(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=reference.memory_format(x)), mean, rstd


def _output_backward(grad, x, mean, rstd, weight, bias, silu) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format(x))


def _save(ctx, inputs, output) -> None:
    x, _, weight, bias, _, ctx.silu = inputs
    if any(ctx.needs_input_grad[2:4]):
        raise RuntimeError("group_norm_silu gives weight and bias no gradient: call requires_grad_(False) on them")
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # or the backward of every layer would fill two tensors of zeros
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx, grad, *_):
    if grad is not None:
        grad = torch.ops.dti_fast.group_norm_silu_backward(grad, *ctx.saved_tensors, ctx.silu)
    return grad, None, None, None, None, None


Operator(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    stem="group_norm_silu",
    check=_check,
    output=_output,
    reference=reference.group_norm_silu,
    fused=("triton",),
    save=_save,
    backward=_backward,
    keeps="GroupNorm input",
)
Operator(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "bool silu) -> Tensor",
    stem="group_norm_silu",
    check=_check_backward,
    output=_output_backward,
    reference=reference.group_norm_silu_backward,
    fused=("triton",),
)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Group normalisation and, if `silu`, `z * sigmoid(z)` behind it, all computed at least in float32.

    `z = (x - mean) / sqrt(variance + eps) * weight + bias` with the mean and variance of the `C / num_groups` channels
    of a group at every position.  Autograd keeps x, the mean and the inverse deviation of each group, and the frozen
    weight and bias, which exist anyway; plain PyTorch keeps z too, which the backward here computes again.

    Args:
        x: float32, bfloat16, float16 or float64 `[N, C, *]`, contiguous or channels last; gets a gradient.
        num_groups: divides C.
        weight: `[C]` in any of these dtypes, or None for ones; frozen.
        bias: `[C]` in any of these dtypes, or None for zeros; frozen.
        eps: added to the variance.
        silu: False gives z itself.

    Returns:
        `[N, C, *]` in x's dtype and memory format.  An x that is dense in neither format is copied for the time of
        the call.

    Raises:
        RuntimeError: for a shape or dtype other than these, and for a weight or bias that requires a gradient
            while gradients are recorded.
    """
    return torch.ops.dti_fast.group_norm_silu(x, num_groups, weight, bias, eps, silu)[0]
