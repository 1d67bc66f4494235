"""`group_norm_silu`: values and input gradient on every backend against float64, and what autograd keeps for it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOATS, LANES, capture, check, framed, kept, poisoned, run

from dti_fast.ops import group_norm_silu
from dti_fast.reference import group_norm_silu as reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # exp, interpreter

EPS = 1e-5
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def problem(shape, device, dtype=torch.float32, *, format=torch.contiguous_format, mean=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    x, grad = (tensor.contiguous(memory_format=format) for tensor in (x + mean, grad))
    return [tensor.to(device, dtype) for tensor in (x, grad, weight, bias)]


def plain(x, groups, weight, bias, silu):
    out = F.group_norm(x, groups, weight, bias, EPS)
    return F.silu(out) if silu else out


def errors(x, grad, weight, bias, groups, silu=True):
    """Ours, plain PyTorch's and float64's output and gradient."""
    with poisoned():
        ours = run(lambda x: group_norm_silu(x, groups, weight, bias, EPS, silu), x, grad)
    theirs = run(lambda x: plain(x, groups, weight, bias, silu), x, grad)
    weight, bias = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    exact = run(lambda x: plain(x, groups, weight, bias, silu), x.double().contiguous(), grad)
    return zip(ours, theirs, exact, strict=True)


@LANES
@pytest.mark.parametrize(("dtype", "silu"), [("fp32", True), ("bf16", True), ("fp16", True), ("bf16", False)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 96, 4, 4), 32), ((2, 24, 24, 24), 2), ((3, 20, 5, 7), 4), ((2, 3, 23, 25), 1), ((1, 5, 1, 3), 5)],
    ids=str,
)
def test_values_and_gradient(lane, shape, groups, format, dtype, silu):
    x, *rest = problem(shape, lane, FLOATS[dtype], format=FORMATS[format])
    for ours, theirs, exact in errors(x, *rest, groups, silu):
        check(ours, theirs, exact)
        assert ours.is_contiguous(memory_format=FORMATS[format])


@LANES
@pytest.mark.parametrize("shape", [(3, 12), (2, 12, 9), (1, 12, 3, 4, 5), (1, 4, 2, 2, 2, 2)], ids=str)
def test_other_numbers_of_dimensions(lane, shape):
    for three in errors(*problem(shape, lane), 4):
        check(*three)


@LANES
def test_channels_last_in_three_dimensions(lane):
    for three in errors(*problem((1, 12, 3, 4, 5), lane, format=torch.channels_last_3d), 4):
        check(*three)
        assert three[0].is_contiguous(memory_format=torch.channels_last_3d)


@LANES
def test_a_group_of_the_largest_size(lane):
    """One of the 32 groups of 320 channels at 128 by 128 positions."""
    for three in errors(*problem((1, 10, 128, 128), lane), 1):
        check(*three)


@LANES
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=" ".join)
def test_without_weight_or_bias(lane, absent):
    x, grad, weight, bias = problem((2, 8, 3, 5), lane)
    weight, bias = None if "weight" in absent else weight, None if "bias" in absent else bias
    for three in errors(x, grad, weight, bias, 2):
        check(*three)


@LANES
def test_weights_wider_than_the_input(lane):
    x, grad, weight, bias = problem((2, 8, 3, 5), lane)
    x, grad = x.bfloat16(), grad.bfloat16()
    narrow = run(lambda x: group_norm_silu(x, 2, weight, bias, EPS), x, grad)
    wide = run(lambda x: group_norm_silu(x, 2, weight, bias, EPS), x.float(), grad)
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=1e-6)


@LANES
@pytest.mark.parametrize("format", FORMATS)
def test_mean_far_above_the_deviation(lane, format):
    for ours, _, exact in errors(*problem((1, 24, 24, 24), lane, format=FORMATS[format], mean=100.0), 2):
        # Half a unit in the last place of x - mean is 4e-6 of the deviation; a variance that cancelled is off by 1e-3.
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@LANES
@pytest.mark.parametrize("format", FORMATS)
def test_channels_of_a_group_far_apart(lane, format):
    x, grad, weight, bias = problem((1, 24, 24, 24), lane, format=FORMATS[format])
    x = x + 50 * torch.arange(24, device=lane)[:, None, None]
    for three in errors(x, grad, weight, bias, 2):
        check(*three)


@LANES
def test_constant_input(lane):
    _, grad, weight, bias = problem((2, 8, 3, 5), lane)
    x = torch.full_like(grad, 3.7)
    out, gradient = run(lambda x: group_norm_silu(x, 2, weight, bias, EPS), x, grad)
    torch.testing.assert_close(out, F.silu(bias)[:, None, None].expand_as(x), rtol=0, atol=1e-3)
    assert gradient.isfinite().all()


@LANES
@pytest.mark.parametrize("format", FORMATS)
def test_strided_arguments(lane, format):
    x, grad, weight, bias = problem((2, 12, 5, 6), lane, torch.bfloat16, format=FORMATS[format])
    expected = run(lambda x: group_norm_silu(x, 4, weight, bias, EPS), x, grad)
    contiguous = run(lambda x: group_norm_silu(x, 4, weight, bias, EPS), x.contiguous(), grad.contiguous())
    again = run(lambda x: group_norm_silu(x, 4, framed(weight), framed(bias), EPS), framed(x), framed(grad))
    assert all(map(torch.equal, again, contiguous))
    wide = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)
    sliced = run(lambda x: group_norm_silu(x, 4, weight, bias, EPS), wide[:, :12], grad.contiguous())
    assert all(map(torch.equal, sliced, expected))
    assert all(tensor.is_contiguous(memory_format=FORMATS[format]) for tensor in sliced)


@LANES
def test_no_samples(lane):
    out, gradient = run(lambda x: group_norm_silu(x, 2), *problem((0, 8, 3, 3), lane)[:2])
    assert out.shape == gradient.shape == (0, 8, 3, 3)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_gradient_of_the_formula(silu, affine, format):
    """The backward formula against finite differences in float64."""
    x, _, weight, bias = (t.double() for t in problem((2, 4, 2, 3), "cpu", format=FORMATS[format]))
    weight, bias = (weight, bias) if affine else (None, None)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out, *statistics = reference.group_norm_silu(x, 2, weight, bias, EPS, silu)
            ctx.save_for_backward(x, *statistics)
            return out

        @staticmethod
        def backward(ctx, grad):
            return reference.group_norm_silu_backward(grad, *ctx.saved_tensors, weight, bias, silu)

    assert torch.autograd.gradcheck(Formula.apply, x.requires_grad_())


@LANES
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_only_x_and_two_numbers_a_group_are_kept(lane, dtype, format):
    x, _, weight, bias = problem((2, 8, 6, 6), lane, FLOATS[dtype], format=FORMATS[format])
    x.requires_grad_()
    frozen = weight, bias
    size, statistics = x.numel() * x.element_size(), 2 * 2 * 4 * 4
    for silu in (True, False):
        ours = kept(lambda x, silu=silu: group_norm_silu(x, 4, *frozen, EPS, silu), x, frozen)
        assert sum(ours.values()) == size + statistics
        assert ours[torch.float32] == statistics + (size if dtype == "fp32" else 0)
    stock = kept(lambda x: plain(x, 4, *frozen, True), x, frozen)
    assert 2 * size < sum(stock.values()) <= 2 * size + statistics


@LANES
def test_weight_and_bias_are_frozen(lane):
    x, _, weight, bias = problem((2, 8, 3, 3), lane)
    for trainable in (weight, bias):
        trainable.requires_grad_()
        with pytest.raises(RuntimeError, match="gives weight and bias no gradient"):
            group_norm_silu(x.requires_grad_(), 2, weight, bias, EPS)
        with torch.no_grad():
            group_norm_silu(x, 2, weight, bias, EPS)
        trainable.requires_grad_(False)


@LANES
@pytest.mark.parametrize("format", FORMATS)
def test_repeats_bit_for_bit(lane, format):
    x, grad, weight, bias = problem((1, 40, 20, 20), lane, format=FORMATS[format])
    first, again = (run(lambda x: group_norm_silu(x, 4, weight, bias, EPS), x, grad) for _ in range(2))
    assert all(map(torch.equal, first, again))


@LANES
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(lane, format):
    x, grad, weight, bias = problem((2, 8, 3, 3), lane, torch.bfloat16, format=FORMATS[format])
    op = torch.ops.dti_fast.group_norm_silu.default
    torch.library.opcheck(op, (x.clone().requires_grad_(), 2, weight, bias, EPS, True))
    _, mean, rstd = op(x, 2, weight, bias, EPS, True)
    backward = torch.ops.dti_fast.group_norm_silu_backward.default
    torch.library.opcheck(backward, (grad, x, mean, rstd, weight, bias, True))


@LANES
def test_compiles_to_one_graph(lane):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend=counter)
    for seed in range(5):
        x, grad, weight, bias = problem((2, 8, 3, 3), lane, seed=seed)
        ours = run(lambda x, w=weight, b=bias: compiled(x, 2, w, b, EPS), x, grad)
        expected = run(lambda x, w=weight, b=bias: group_norm_silu(x, 2, w, b, EPS), x, grad)
        assert all(map(torch.equal, ours, expected))
    assert counter.frame_count == 1


def test_meta_device_reads_nothing_back():
    x, grad, weight, bias = problem((2, 8, 3, 3), "meta", torch.bfloat16, format=torch.channels_last)
    out, gradient = run(lambda x: group_norm_silu(x, 2, weight, bias, EPS), x, grad)
    assert out.dtype == gradient.dtype == torch.bfloat16
    assert out.stride() == gradient.stride() == x.stride()


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(8), "x must be"),
        (0, torch.zeros(2, 8, 0), "x must be"),
        (0, torch.zeros(2, 8, 3, dtype=torch.int64), "x must be"),
        (1, 3, "num_groups must divide"),
        (1, 0, "num_groups must divide"),
        (2, torch.zeros(7), "weight must be"),
        (3, torch.zeros(8, dtype=torch.int64), "bias must be"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments = [torch.zeros(2, 8, 3), 4, torch.zeros(8), torch.zeros(8)]
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        group_norm_silu(*arguments)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 8, 4), "grad must be"),
        (2, torch.zeros(2), "mean must be"),
        (3, torch.zeros(2, 2), "rstd must be"),
        (4, torch.zeros(4), "weight must be"),
    ],
)
def test_wrong_arguments_of_the_backward(index, wrong, message):
    x, groups, channels = torch.zeros(2, 8, 3), torch.zeros(2, 4), torch.zeros(8)
    arguments = [x, x, groups, groups, channels, channels, True]
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dti_fast.group_norm_silu_backward(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("lane", [("triton", "cuda")], indirect=True, ids=["triton"])
@pytest.mark.parametrize("format", FORMATS)
def test_graph_capture(lane, format):
    x, grad, weight, bias = problem((1, 320, 64, 64), lane, torch.bfloat16, format=FORMATS[format])

    def step():
        return run(lambda x: group_norm_silu(x, 32, weight, bias, EPS), x, grad)

    graph, captured = capture(step)
    for _ in range(3):
        x.mul_(0.9).add_(0.1)
        graph.replay()
        assert all(map(torch.equal, captured, step()))
