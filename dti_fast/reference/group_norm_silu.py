"""Group normalisation with frozen weight and bias, and the SiLU behind it, whose input the backward computes again.

Letters: N samples, C channels, G groups, `*` the spatial dimensions; a group is C / G channels at every position.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output in x's dtype and memory format, and each group's mean and rstd `[N, G]`, computed at least in float32.

    mean = sum x / M,  M = elements of a group
    rstd = 1 / sqrt(sum (x - mean)^2 / M + eps)
    z    = (x - mean) rstd weight + bias
    out  = z sigmoid(z), or z where silu is False
    """
    wide, weight, bias = _wide(x, x, weight, bias)
    out, mean, rstd = torch.native_group_norm(wide, weight, bias, *_sizes(x), num_groups, eps)
    if silu:
        F.silu(out, inplace=True)
    return out.to(x.dtype, memory_format=memory_format(x)), mean, rstd


def group_norm_silu_backward(
    grad: Tensor,  # [N, C, *] gradient with respect to the output
    x: Tensor,  # [N, C, *]
    mean: Tensor,  # [N, G]
    rstd: Tensor,  # [N, G]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    silu: bool,
) -> Tensor:
    """Gradient with respect to x `[N, C, *]` in its dtype and memory format.

    h  = (x - mean) rstd,  z = h weight + bias
    g  = grad silu'(z) weight,  silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
    dx = rstd (g - sum g / M - h sum (g h) / M)
    """
    grad, wide, weight, bias = _wide(x, grad, x, weight, bias)
    groups = mean.shape[1]
    if silu:
        grouped = wide.view(*mean.shape, x.shape[1:].numel() // groups)
        z = grouped.sub(mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1)).view_as(wide)
        channels = (-1, *[1] * (x.dim() - 2))
        z = z if weight is None else z.mul_(weight.view(channels))
        z = z if bias is None else z.add_(bias.view(channels))
        grad = torch.ops.aten.silu_backward(grad, z)
    backward, only_x = torch.ops.aten.native_group_norm_backward, [True, False, False]
    dx, _, _ = backward(grad, wide, mean, rstd, weight, *_sizes(x), groups, only_x)
    return dx.to(x.dtype, memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """Of what is made from x: channels last where x's channels lie side by side and it is not contiguous too."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.stride(1) != 1 or x.is_contiguous():
        return torch.contiguous_format
    return last


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _wide(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    # Contiguous, because torch's channels-last variance on a CPU is E[x^2] - E[x]^2 and cancels.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]
