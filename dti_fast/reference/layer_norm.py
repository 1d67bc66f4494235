"""Layer normalisation with frozen weight and bias.

Letters: D dimensions; `...` the rows.
"""

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,  # [..., D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows in x's dtype, and each row's mean and rstd `[..., 1]`, computed at least in float32.

    mean = sum x / D
    rstd = 1 / sqrt(sum (x - mean)^2 / D + eps)
    out  = (x - mean) rstd weight + bias
    """
    out, mean, rstd = torch.native_layer_norm(*_wide(x, x), x.shape[-1:], *_wide(x, weight, bias), eps)
    return out.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor,  # [..., D] gradient with respect to the output
    x: Tensor,  # [..., D]
    mean: Tensor,  # [..., 1]
    rstd: Tensor,  # [..., 1]
    weight: Tensor | None,  # [D]
) -> Tensor:
    """Gradient with respect to x `[..., D]` in its dtype.

    h  = (x - mean) rstd
    g  = grad weight
    dx = rstd (g - sum g / D - h sum (g h) / D)
    """
    grad, wide, weight = _wide(x, grad, x, weight)
    only_x = [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grad, wide, x.shape[-1:], mean, rstd, weight, None, only_x)[0].to(x.dtype)


def _wide(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
