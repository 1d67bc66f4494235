"""Geometry of the unit sphere S^(D-1), row by row on tensors `[..., D]`.

Points are unit rows; tangent vectors at `v` are orthogonal to `v`.  Angles are in radians.
"""

import torch
from torch import Tensor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def tangent(v: Tensor, u: Tensor) -> Tensor:
    """Project `u` onto the tangent space at `v`: u - (u . v) v."""
    return u - _dot(u, v) * v


def retract(v: Tensor, u: Tensor) -> Tensor:
    """Step from `v` by the tangent vector `u` and normalise: turns by arctan(|u|)."""
    moved = v + u
    return moved / moved.norm(dim=-1, keepdim=True)


def exp(v: Tensor, u: Tensor) -> Tensor:
    """Exponential map: follow the great circle from `v` along `u` for an angle of |u|."""
    angle = u.norm(dim=-1, keepdim=True)
    return torch.cos(angle) * v + torch.sinc(angle / torch.pi) * u


def log(v: Tensor, w: Tensor) -> Tensor:
    """The tangent vector at `v` with exp(v, log(v, w)) = w; its norm is their angle.

    Undefined for opposite points, where every direction leads to `w`.
    """
    u = tangent(v, w)
    return u / u.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny) * distance(v, w).unsqueeze(-1)


def distance(v: Tensor, w: Tensor) -> Tensor:
    """Angle between `v` and `w`, `[...]`; accurate for nearly equal and nearly opposite points too."""
    return 2 * torch.atan2((v - w).norm(dim=-1), (v + w).norm(dim=-1))


def slerp(v: Tensor, w: Tensor, t: float | Tensor) -> Tensor:
    """Spherical interpolation: the point a share `t` of the way from `v` (0) to `w` (1)."""
    return exp(v, t * log(v, w))


def mean(points: Tensor, iterations: int = 50) -> Tensor:
    """Fréchet mean of unit rows `[N, D]` that lie within an open hemisphere: `[D]`."""
    center = points.mean(0)
    center = center / center.norm()
    for _ in range(iterations):
        center = exp(center, log(center.expand_as(points), points).mean(0))
    return center / center.norm()
