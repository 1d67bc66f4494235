"""`tangent_sum`: every backend against float64, and what no factor on a sample's gradient may change."""

import pytest
import torch
import torch.nn.functional as F

from dti_fast.ops import tangent_sum

ULP = torch.finfo(torch.float32).eps
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def problem(B, K, D, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(B, K, D, generator=generator).to(dtype)
    return grad.to(device), F.normalize(torch.randn(K, D, generator=generator)).to(device)


def expected(grad, p):
    """Sample by sample and row by row in float64, sharing no code with the reference."""
    total, count = torch.zeros(p.shape, dtype=torch.float64), torch.zeros(len(p), 1)
    for k, row in enumerate(p.double().cpu()):
        for g in grad[:, k].double().cpu():
            g = g - (g @ row) * row
            if g.any():
                total[k] += g / g.norm()
                count[k] += 1
    return total, count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("B", "K", "D"), [(1, 1, 2), (4, 3, 127), (3, 4, 768), (16, 2, 1280), (2, 33, 2304), (2, 1, 8192)]
)
def test_values(lane, B, K, D, dtype):
    grad, p = problem(B, K, D, lane, FLOATS[dtype])
    total, count = tangent_sum(grad, p)
    truth, number = expected(grad, p)
    assert total.dtype == count.dtype == torch.float32 and count.shape == (K, 1)
    assert (total.cpu() - truth).abs().max() <= 8 * B * ULP
    assert torch.equal(count.cpu(), number)
    assert all(map(torch.equal, tangent_sum(grad, p), (total, count)))
    assert (total * p).sum(-1).abs().max() <= 8 * B * ULP


def test_a_sample_without_a_gradient_does_not_count(lane):
    grad, p = problem(4, 3, 40, lane)
    grad[1, 0], grad[:, 1] = 0, 0
    p[0] = torch.eye(40, device=lane)[7]
    grad[2, 0] = torch.eye(40, device=lane)[7] * 3  # along the row, and so nothing along the sphere
    total, count = tangent_sum(grad, p)
    assert count.flatten().tolist() == [2, 0, 4]
    assert total[1].eq(0).all()
    few, number = tangent_sum(grad[[0, 3]], p)
    assert torch.equal(total[0], few[0]) and number[0] == 2


@pytest.mark.parametrize("factor", [1e3, 65536.0, 1e-6])
def test_factors_on_samples_change_nothing(lane, factor):
    grad, p = problem(4, 3, 768, lane)
    weights = factor ** torch.tensor([0.0, 1.0, 0.5, 1.0], device=lane).view(-1, 1, 1)
    for ours, theirs in zip(tangent_sum(weights * grad, p), tangent_sum(grad, p), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(lane, bad):
    grad, p = problem(3, 2, 40, lane)
    grad[1, 0, 5] = bad
    total, _ = tangent_sum(grad, p)
    assert total[0].isnan().any() and total[1].isfinite().all()


def test_strides_and_nothing(lane):
    grad, p = problem(4, 3, 40, lane)
    strided = grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    rows = torch.full((5, 83), torch.nan, device=lane)[1:-1, 2:82:2].copy_(p)
    for ours, theirs in zip(tangent_sum(strided, rows), tangent_sum(grad, p), strict=True):
        assert (ours - theirs).abs().max() <= 4 * ULP
    total, count = tangent_sum(grad[:0], p)
    assert total.shape == (3, 40) and not total.any() and not count.any()
    assert tangent_sum(grad[:, :0], p[:0])[1].shape == (0, 1)


def test_opcheck(lane):
    torch.library.opcheck(torch.ops.dti_fast.tangent_sum.default, problem(4, 3, 40, lane, torch.bfloat16))


@pytest.mark.parametrize(
    ("grad", "p", "message"),
    [
        (torch.ones(2, 3, 8), torch.ones(3, 8, dtype=torch.bfloat16), "p must be float32 or float64"),
        (torch.ones(3, 8), torch.ones(3, 8), r"grad must be a float tensor \[B, K, D\]"),
        (torch.ones(2, 3, 7), torch.ones(3, 8), r"grad must be a float tensor \[B, K, D\]"),
        (torch.ones(2, 3, 8, dtype=torch.int64), torch.ones(3, 8), r"grad must be a float tensor \[B, K, D\]"),
    ],
)
def test_wrong_arguments(grad, p, message):
    with pytest.raises(RuntimeError, match=message):
        tangent_sum(grad, p)


@pytest.mark.parametrize("D", [768, 1280, 2048])
def test_text_encoders_are_compiled_ahead(D):
    kernels = pytest.importorskip("dti_fast.kernels.tangent_sum")
    assert any(f"D={D}," in case for case, _ in kernels.aot_cases())
