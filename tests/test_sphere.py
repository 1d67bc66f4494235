"""Geometry: identities in float64 on random rows."""

import math

import pytest
import torch

from dti_fast import sphere


@pytest.fixture(params=range(5))
def rows(request):
    generator = torch.Generator().manual_seed(request.param)
    v, w = torch.randn(2, 6, 17, generator=generator, dtype=torch.float64)
    return v / v.norm(dim=-1, keepdim=True), w / w.norm(dim=-1, keepdim=True)


def test_tangent_is_an_orthogonal_projection(rows):
    v, w = rows
    u = sphere.tangent(v, w)
    torch.testing.assert_close((u * v).sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(sphere.tangent(v, u), u)


def test_exp_turns_by_the_norm_and_retract_by_its_arctangent(rows):
    v, w = rows
    u = 0.7 * sphere.tangent(v, w)
    length = u.norm(dim=-1)
    for moved, angle in ((sphere.exp(v, u), length), (sphere.retract(v, u), torch.arctan(length))):
        torch.testing.assert_close(moved.norm(dim=-1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(sphere.distance(v, moved), angle)


def test_log_inverts_exp(rows):
    v, w = rows
    torch.testing.assert_close(sphere.exp(v, sphere.log(v, w)), w)


def test_distance_is_exact_where_the_arccosine_is_not():
    v = torch.tensor([1.0, 0.0])
    near = torch.tensor([math.cos(1e-5), math.sin(1e-5)])
    assert sphere.distance(v, near).item() == pytest.approx(1e-5, rel=1e-4)
    assert sphere.distance(v, -near).item() == pytest.approx(math.pi - 1e-5, rel=1e-6)
    assert sphere.distance(v, v).item() == 0


def test_slerp_divides_the_angle_evenly(rows):
    v, w = rows
    whole = sphere.distance(v, w)
    for share in (0.0, 0.25, 0.5, 1.0):
        torch.testing.assert_close(sphere.distance(v, sphere.slerp(v, w, share)), share * whole, atol=1e-12, rtol=1e-9)


def test_mean_is_the_midpoint_and_a_stationary_point(rows):
    v, w = rows
    torch.testing.assert_close(sphere.mean(torch.stack((v[0], w[0]))), sphere.slerp(v[0], w[0], 0.5))
    close = sphere.exp(v[:1], 0.3 * sphere.tangent(v[:1].expand(6, -1), w))
    center = sphere.mean(close)
    pull = sphere.log(center.expand_as(close), close).mean(0)
    assert pull.norm() < 1e-12
