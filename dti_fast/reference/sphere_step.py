"""Riemannian SGD on the unit sphere with a von Mises-Fisher prior, one row per vector.

Letters: K vectors, D dimensions.
"""

import math

import torch
from torch import Tensor


def sphere_step(
    p: Tensor,  # [K, D] unit rows
    grad: Tensor,  # [K, D] loss gradient with respect to p
    mu: Tensor | None,  # [K, D] unit rows, the prior's mean directions
    second_moment: Tensor | None,  # [K, 1] running mean of squared row norms; None when beta is 0
    step: Tensor,  # scalar or [K, 1], 1 at the first update (of the row)
    lr: Tensor,  # scalar
    *,
    kappa: float,
    beta: float,
    eps: float,
    momentum: float = 0.0,
    momentum_buffer: Tensor | None = None,  # [K, D] running mean of the directions; None when momentum is 0
    grad_scale: Tensor | None = None,  # scalar or [K, 1]
    found_inf: Tensor | None = None,  # scalar, non-zero skips the update
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One update of the directions; returns the new `p`, `second_moment` and `momentum_buffer`, in p's dtype.

        g  = grad / grad_scale - kappa mu
        g  = momentum m + (1 - momentum) g                   with momentum, m being the running mean so far
        g  = g - (g . p) p                                   tangent projection
        m  = g                                               with momentum
        nu = beta nu + (1 - beta) |g|^2,  nu_hat = nu / (1 - beta^step)
        p  = normalise(p - lr g / (sqrt(nu_hat) + eps))      retraction; a row with g = 0 stays as it is

    A row whose loss gradient `grad` is exactly zero has no part in this step: its `p`, `second_moment` and
    `momentum_buffer` stay bit for bit, whatever kappa is.  The formula alone would normalise -kappa mu to a full step,
    so that a concept that the batch does not show would be forgotten.
    With `beta` 0 the step is g / (|g| + eps), so that a row with |g| far above eps turns by exactly arctan(lr).
    m was tangent at the p of the step before.  The projection, which is linear, carries it to the present p: for a row
    that moved along m that is parallel transport, shortened by the cosine of the angle it turned by.
    Source: arXiv 2512.13672, the method's update; the running mean nu is from its official code; momentum is our own.
    """
    used = (grad != 0).any(-1, keepdim=True)
    g = grad.to(p.dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(p.dtype)
    if mu is not None and kappa != 0.0:
        g = g - kappa * mu.to(p.dtype)
    if momentum_buffer is not None:
        g = momentum * momentum_buffer + (1 - momentum) * g
    g = g - (g * p).sum(-1, keepdim=True) * p
    new_buffer = None if momentum_buffer is None else torch.where(used, g, momentum_buffer)
    norm_squared = g.square().sum(-1, keepdim=True)
    if second_moment is None:
        new_moment, corrected = None, norm_squared
    else:
        new_moment = torch.where(used, beta * second_moment + (1 - beta) * norm_squared, second_moment)
        # expm1, because 1 - beta^step in float32 keeps only four digits of the first correction.
        corrected = new_moment / -torch.expm1(step.to(p.dtype) * math.log(beta))
    moved = p - lr.to(p.dtype) * g / (corrected.sqrt() + eps)
    # Normalising a row that did not move would still change its last bits.
    new_p = torch.where(used & (norm_squared != 0), moved / moved.norm(dim=-1, keepdim=True), p)
    if found_inf is not None:
        skip = found_inf != 0
        new_p = torch.where(skip, p, new_p)
        new_moment = None if new_moment is None else torch.where(skip, second_moment, new_moment)
        new_buffer = None if new_buffer is None else torch.where(skip, momentum_buffer, new_buffer)
    return new_p, new_moment, new_buffer
