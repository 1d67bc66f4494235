"""`geglu`: values and gradient on every backend against float64, and what autograd keeps for it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOATS, LANES, capture, check, framed, kept, poisoned, run

from dti_fast.ops import geglu
from dti_fast.reference import geglu as reference


def problem(shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    projected = 2 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    weight = torch.randn(shape, generator=generator)
    return projected.to(device, dtype), weight.to(device, dtype)


def plain(projected, approximate):
    """diffusers' GEGLU."""
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate, approximate=approximate)


@LANES
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 320), (1, 1280), (7, 37), (3, 1), (640,), (2, 0, 8)], ids=str)
def test_values_and_gradient(lane, shape, dtype, approximate):
    projected, weight = problem(shape, lane, FLOATS[dtype])
    with poisoned():
        ours = run(lambda x: geglu(x, approximate), projected, weight)
    theirs = run(lambda x: plain(x, approximate), projected, weight)
    exact = run(lambda x: plain(x, approximate), projected.double(), weight)
    for three in zip(ours, theirs, exact, strict=True):
        check(*three)


@LANES
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gates_far_from_zero(lane, approximate):
    gate = torch.tensor([-1e4, -100.0, -13.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 13.0, 100.0, 1e4], device=lane)
    projected = torch.cat([torch.full_like(gate, 3.0), gate])
    ones = torch.ones_like(gate)
    ours = run(lambda x: geglu(x, approximate), projected, ones)
    exact = run(lambda x: plain(x, approximate), projected.double(), ones)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-7, atol=2e-6)


@LANES
def test_strided_arguments(lane):
    projected, weight = problem((3, 5, 40), lane, torch.bfloat16)
    expected = run(geglu, projected, weight)
    for strided in (framed(projected), projected.transpose(0, 1).contiguous().transpose(0, 1)):
        assert all(map(torch.equal, run(geglu, strided, framed(weight)), expected))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradient_of_the_formula(approximate):
    """The backward formula against finite differences in float64."""
    projected, _ = problem((3, 5), "cpu")

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, projected):
            ctx.save_for_backward(projected)
            return reference.geglu(projected, approximate)

        @staticmethod
        def backward(ctx, grad):
            return reference.geglu_backward(grad, *ctx.saved_tensors, approximate)

    assert torch.autograd.gradcheck(Formula.apply, projected.double().requires_grad_())


@LANES
@pytest.mark.parametrize("dtype", FLOATS)
def test_only_the_projection_is_kept(lane, dtype):
    projected = problem((2, 6, 48), lane, FLOATS[dtype])[0].requires_grad_()
    size = projected.numel() * projected.element_size()
    assert kept(geglu, projected) == {FLOATS[dtype]: size}
    assert kept(lambda x: plain(x, "none"), projected) == {FLOATS[dtype]: size + size // 2}


@LANES
def test_opcheck(lane):
    projected, weight = problem((2, 3, 16), lane, torch.bfloat16)
    torch.library.opcheck(torch.ops.dti_fast.geglu.default, (projected.requires_grad_(), "tanh"))
    torch.library.opcheck(torch.ops.dti_fast.geglu_backward.default, (weight, projected.detach(), "none"))


@LANES
def test_compiles_to_one_graph(lane):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(geglu, fullgraph=True, backend=counter)
    for seed in range(5):
        arguments = problem((2, 3, 16), lane, seed=seed)
        assert all(map(torch.equal, run(compiled, *arguments), run(geglu, *arguments)))
    assert counter.frame_count == 1


def test_meta_device_reads_nothing_back():
    projected, weight = problem((2, 3, 16), "meta", torch.bfloat16)
    out, gradient = run(geglu, projected, weight)
    assert out.shape == (2, 3, 16) and gradient.shape == projected.shape and gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("projected", "approximate", "message"),
    [
        (torch.zeros(2, 7), "none", "projected must be"),
        (torch.zeros(()), "none", "projected must be"),
        (torch.zeros(2, 8, dtype=torch.int64), "none", "projected must be"),
        (torch.zeros(2, 8), "sigmoid", "approximate must be"),
    ],
)
def test_wrong_arguments(projected, approximate, message):
    with pytest.raises(RuntimeError, match=message):
        geglu(projected, approximate)
    with pytest.raises(RuntimeError, match=message if projected.dim() else "must be"):
        torch.ops.dti_fast.geglu_backward(torch.zeros(2, 4), projected, approximate)


@pytest.mark.gpu
@pytest.mark.parametrize("lane", [("triton", "cuda")], indirect=True, ids=["triton"])
def test_graph_capture(lane):
    projected, weight = problem((2, 64, 1280), lane, torch.bfloat16)

    def step():
        return run(geglu, projected, weight)

    graph, captured = capture(step)
    for _ in range(3):
        projected.mul_(0.9)
        graph.replay()
        assert all(map(torch.equal, captured, step()))
