"""`layer_norm`: values and input gradient on every backend against float64, and what autograd keeps for it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOATS, LANES, capture, check, framed, kept, poisoned, run

from dti_fast.ops import layer_norm
from dti_fast.reference import layer_norm as reference

EPS = 1e-5


def problem(shape, device, dtype=torch.float32, *, mean=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [tensor.to(device, dtype) for tensor in (x + mean, grad, weight, bias)]


def errors(x, grad, weight, bias):
    """Ours, plain PyTorch's and float64's output and gradient."""
    with poisoned():
        ours = run(lambda x: layer_norm(x, weight, bias, EPS), x, grad)
    plain = run(lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, EPS), x, grad)
    weight, bias = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    exact = run(lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, EPS), x.double(), grad)
    return zip(ours, plain, exact, strict=True)


@LANES
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 9, 320), (1, 1280), (5, 2048), (3, 8192), (33, 37), (7, 3), (640,)], ids=str)
def test_values_and_gradient(lane, shape, dtype):
    for three in errors(*problem(shape, lane, FLOATS[dtype])):
        check(*three)


@LANES
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=" ".join)
def test_without_weight_or_bias(lane, absent):
    x, grad, weight, bias = problem((4, 100), lane)
    weight, bias = None if "weight" in absent else weight, None if "bias" in absent else bias
    for three in errors(x, grad, weight, bias):
        check(*three)


@LANES
def test_weights_wider_than_the_rows(lane):
    x, grad, weight, bias = problem((4, 100), lane)
    x, grad = x.bfloat16(), grad.bfloat16()
    out, gradient = run(lambda x: layer_norm(x, weight, bias, EPS), x, grad)
    again = run(lambda x: layer_norm(x, weight, bias, EPS), x.float(), grad)
    for narrow, wide in zip((out, gradient), again, strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=1e-6)


@LANES
@pytest.mark.parametrize("shape", [(6, 320), (3, 1281)], ids=str)
def test_mean_far_above_the_deviation(lane, shape):
    for ours, _, exact in errors(*problem(shape, lane, mean=100.0)):
        # Half a unit in the last place of x - mean is 4e-6 of the deviation; a variance that cancelled is off by 1e-3.
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@LANES
@pytest.mark.parametrize("D", [1, 64])
def test_constant_rows(lane, D):
    x, grad, weight, bias = problem((3, D), lane)
    x = x[:, :1].expand(3, D)
    out, gradient = run(lambda x: layer_norm(x, weight, bias, EPS), x, grad)
    torch.testing.assert_close(out, bias.expand(3, D), rtol=0, atol=1e-4)
    assert gradient.isfinite().all()


@LANES
def test_strided_arguments(lane):
    x, grad, weight, bias = problem((3, 5, 40), lane, torch.bfloat16)
    expected = run(lambda x: layer_norm(x, weight, bias, EPS), x, grad)
    for strided in (framed(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        again = run(lambda x: layer_norm(x, framed(weight), framed(bias), EPS), strided, framed(grad))
        assert all(map(torch.equal, again, expected))


@LANES
def test_no_rows(lane):
    out, gradient = run(lambda x: layer_norm(x, None, None, EPS), *problem((2, 0, 8), lane)[:2])
    assert out.shape == gradient.shape == (2, 0, 8)


def test_gradient_of_the_formula():
    """The backward formula against finite differences in float64."""
    x, _, weight, bias = (tensor.double() for tensor in problem((3, 5), "cpu"))

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out, *statistics = reference.layer_norm(x, weight, bias, EPS)
            ctx.save_for_backward(x, *statistics)
            return out

        @staticmethod
        def backward(ctx, grad):
            return reference.layer_norm_backward(grad, *ctx.saved_tensors, weight)

    assert torch.autograd.gradcheck(Formula.apply, x.requires_grad_())


@LANES
@pytest.mark.parametrize("dtype", FLOATS)
def test_only_x_and_two_numbers_a_row_are_kept(lane, dtype):
    x, _, weight, bias = problem((2, 6, 48), lane, FLOATS[dtype])
    x.requires_grad_()
    ours = kept(lambda x: layer_norm(x, weight, bias, EPS), x, (weight, bias))
    stock = kept(lambda x: F.layer_norm(x, (48,), weight, bias, EPS), x, (weight, bias))
    size = x.numel() * x.element_size()
    assert sum(ours.values()) == size + 2 * 12 * 4
    assert ours[torch.float32] == 2 * 12 * 4 + (size if dtype == "fp32" else 0)
    assert stock[FLOATS[dtype]] >= size and sum(stock.values()) <= sum(ours.values())  # nothing to gain here


@LANES
def test_weight_and_bias_are_frozen(lane):
    x, _, weight, bias = problem((2, 8), lane)
    for trainable in (weight, bias):
        trainable.requires_grad_()
        with pytest.raises(RuntimeError, match="gives weight and bias no gradient"):
            layer_norm(x.requires_grad_(), weight, bias, EPS)
        with torch.no_grad():
            layer_norm(x, weight, bias, EPS)
        trainable.requires_grad_(False)


@LANES
def test_repeats_bit_for_bit(lane):
    x, grad, weight, bias = problem((9, 1000), lane)
    first, again = (run(lambda x: layer_norm(x, weight, bias, EPS), x, grad) for _ in range(2))
    assert all(map(torch.equal, first, again))


@LANES
def test_opcheck(lane):
    x, grad, weight, bias = problem((2, 3, 16), lane, torch.bfloat16)
    op = torch.ops.dti_fast.layer_norm.default
    torch.library.opcheck(op, (x.clone().requires_grad_(), weight, bias, EPS))
    torch.library.opcheck(op, (x.clone().requires_grad_(), None, None, EPS))
    _, mean, rstd = op(x, weight, bias, EPS)
    torch.library.opcheck(torch.ops.dti_fast.layer_norm_backward.default, (grad, x, mean, rstd, weight))


@LANES
def test_compiles_to_one_graph(lane):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_norm, fullgraph=True, backend=counter)
    for seed in range(5):
        x, grad, weight, bias = problem((2, 3, 16), lane, seed=seed)
        ours = run(lambda x, w=weight, b=bias: compiled(x, w, b, EPS), x, grad)
        assert all(map(torch.equal, ours, run(lambda x, w=weight, b=bias: layer_norm(x, w, b, EPS), x, grad)))
    assert counter.frame_count == 1


def test_meta_device_reads_nothing_back():
    x, grad, weight, bias = problem((2, 3, 16), "meta", torch.bfloat16)
    out, gradient = run(lambda x: layer_norm(x, weight, bias, EPS), x, grad)
    assert out.shape == gradient.shape == (2, 3, 16) and out.dtype == gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(()), "x must be"),
        (0, torch.zeros(2, 0), "x must be"),
        (0, torch.zeros(2, 8, dtype=torch.int64), "x must be"),
        (1, torch.zeros(7), "weight must be"),
        (1, torch.zeros(8, dtype=torch.int64), "weight must be"),
        (2, torch.zeros(1, 8), "bias must be"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments = [torch.zeros(2, 8), torch.zeros(8), torch.zeros(8)]
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        layer_norm(*arguments)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [(0, torch.zeros(2, 7), "grad must be"), (2, torch.zeros(2), "mean must be"), (3, torch.zeros(3, 1), "rstd must")],
)
def test_wrong_arguments_of_the_backward(index, wrong, message):
    arguments = [torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(8)]
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dti_fast.layer_norm_backward(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("lane", [("triton", "cuda")], indirect=True, ids=["triton"])
def test_graph_capture(lane):
    x, grad, weight, bias = problem((2, 64, 1280), lane, torch.bfloat16)

    def step():
        return run(lambda x: layer_norm(x, weight, bias, EPS), x, grad)

    graph, captured = capture(step)
    for _ in range(3):
        x.mul_(0.9).add_(0.1)
        graph.replay()
        assert all(map(torch.equal, captured, step()))
