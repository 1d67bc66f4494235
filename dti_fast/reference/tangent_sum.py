"""What the samples of a batch agree on: the sum of their gradients along the sphere, each brought to length one.

Letters: B samples, K vectors, D dimensions.
"""

import torch
from torch import Tensor


def tangent_sum(
    grad: Tensor,  # [B, K, D] each sample's gradient with respect to p
    p: Tensor,  # [K, D] unit rows
) -> tuple[Tensor, Tensor]:
    """The sum `[K, D]` and the number of samples in it, `[K, 1]`, in p's dtype.

        u[b]  = grad[b] - (grad[b] . p) p                    tangent projection
        sum   = sum over b with u[b] != 0 of u[b] / |u[b]|
        count = number of those b

    A sample without a gradient for a row does not count there.  No factor on a sample's gradient, such as a loss
    scale, a weight of its timestep or the size of the batch, changes anything: there is no eps.  A sample whose
    gradient is not finite makes the row's sum NaN.
    """
    g = grad.to(p.dtype)
    g = g - (g * p).sum(-1, keepdim=True) * p
    norm_squared = g.square().sum(-1, keepdim=True)
    seen = norm_squared != 0
    return torch.where(seen, g / norm_squared.sqrt(), 0).sum(0), seen.sum(0).to(p.dtype)
