"""`sphere_step_` and SphericalSGD: every backend against float64, and what must hold whatever the arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F

from dti_fast import SphericalSGD, sphere
from dti_fast.ops import sphere_step_
from dti_fast.reference.sphere_step import sphere_step

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # rows beyond K, interpreter

ULP = torch.finfo(torch.float32).eps
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def number(value, device="cpu"):
    return torch.tensor(value, dtype=torch.float32, device=device)


def problem(K, D, device="cpu", *, grad=torch.float32, mu=torch.float32, beta=0.0, scale=None, found=None, seed=0):
    """Arguments and options of one step."""
    generator = torch.Generator().manual_seed(seed)

    def rows(dtype=torch.float32):
        return F.normalize(torch.randn(K, D, generator=generator)).to(device, dtype)

    p, g = rows(), 3 * rows(grad)
    moment = torch.rand(K, 1, generator=generator).add(0.5).to(device) if beta else None
    arguments = [p, g, None if mu is None else rows(mu), moment, number(7.0, device), number(0.04, device)]
    options = {"kappa": 0.5 if mu is not None else 0.0, "beta": beta, "eps": 1e-8}
    options |= {"grad_scale": None if scale is None else number(scale, device)}
    options |= {"found_inf": None if found is None else number(found, device)}
    return arguments, options


def widen(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def errors(arguments, options):
    """Largest error of the op and of plain PyTorch in float32, both against float64, for p and the second moment."""
    exact = sphere_step(*map(widen, arguments), **{name: widen(value) for name, value in options.items()})
    plain = sphere_step(*arguments, **options)
    sphere_step_(*arguments, **options)
    results = arguments[0], arguments[3], options.get("momentum_buffer")
    for ours, theirs, truth in zip(results, plain, exact, strict=True):
        if truth is not None:
            assert ours.isfinite().all()
            size = truth.abs().max().item()
            yield (ours - truth).abs().max().item(), (theirs - truth).abs().max().item(), size


def check(arguments, options):
    for ours, theirs, size in errors(arguments, options):
        assert ours <= 2 * theirs + 4 * ULP * size


@pytest.mark.parametrize("K", [1, 4, 33])
@pytest.mark.parametrize("D", [1, 3, 127, 768, 1280, 2304, 4096, 8192])
def test_shapes(lane, K, D):
    check(*problem(K, D, lane, grad=torch.bfloat16, beta=0.9, scale=1024.0, found=0.0))


@pytest.mark.parametrize("grad", FLOATS)
@pytest.mark.parametrize("mu", [None, *FLOATS])
def test_dtypes(lane, grad, mu):
    check(*problem(4, 200, lane, grad=FLOATS[grad], mu=FLOATS.get(mu)))


@pytest.mark.parametrize("found", [None, 0.0])
@pytest.mark.parametrize("scale", [None, 65536.0])
@pytest.mark.parametrize("beta", [0.0, 0.999])
@pytest.mark.parametrize("mu", [None, torch.float32], ids=["plain", "prior"])
def test_options(lane, mu, beta, scale, found):
    check(*problem(3, 48, lane, mu=mu, beta=beta, scale=scale, found=found))


def with_momentum(arguments, options, momentum=0.9, seed=5):
    """The same step with a running mean that is of an earlier point, and so not tangent at this one."""
    mean = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(seed)).to(arguments[0].device)
    return arguments, options | {"momentum": momentum, "momentum_buffer": 0.3 * F.normalize(mean)}


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize(("K", "D"), [(1, 1), (3, 127), (4, 1280), (33, 8192), (4099, 5)])
def test_momentum(lane, K, D, beta):
    check(*with_momentum(*problem(K, D, lane, grad=torch.bfloat16, beta=beta, scale=1024.0, found=0.0)))
    check(*with_momentum(*problem(K, D, lane, mu=None, beta=beta), momentum=0.3))


def test_every_row_has_its_own_scale(lane):
    """As if each row's gradient had been divided before."""
    scales = torch.tensor([[1.0], [4.0], [2.0]], device=lane)
    arguments, options = with_momentum(*problem(3, 127, lane, beta=0.9))
    twin = [t.clone() for t in arguments]
    twin[1] /= scales
    twin_options = options | {"momentum_buffer": options["momentum_buffer"].clone()}
    options["grad_scale"] = torch.full((3, 2), torch.nan, device=lane)[:, 1:].copy_(scales)
    sphere_step_(*arguments, **options)
    sphere_step_(*twin, **twin_options)
    torch.testing.assert_close(arguments[0], twin[0])
    torch.testing.assert_close(options["momentum_buffer"], twin_options["momentum_buffer"])


def test_one_number_may_have_two_dimensions(lane):
    """It serves every row, and is not the first of a column."""
    arguments, options = problem(5, 40, lane, beta=0.9)
    twin = [t.clone() for t in arguments]
    arguments[4] = torch.full((1, 2), torch.nan, device=lane)[:, :1].copy_(arguments[4])
    sphere_step_(*arguments, **options | {"grad_scale": number([[2.0]], lane)})
    sphere_step_(*twin, **options | {"grad_scale": number(2.0, lane)})
    assert torch.equal(arguments[0], twin[0])


def test_hundred_steps_with_momentum(lane):
    """Against parallel transport in float64 by the exponential map's own geometry: projection shortens it by the cosine
    of the turn and does nothing else."""
    K, D, lr, momentum = 2, 768, 0.1, 0.9
    generator = torch.Generator().manual_seed(1)
    p = F.normalize(torch.randn(K, D, generator=generator)).to(lane)
    v = F.normalize(p.double().cpu())
    buffer, mean = torch.zeros(K, D, device=lane), torch.zeros(K, D, dtype=torch.float64)
    for t in range(1, 101):
        gradient = torch.randn(K, D, generator=generator)
        options = {"kappa": 0.0, "beta": 0.0, "eps": 0.0, "momentum": momentum, "momentum_buffer": buffer}
        sphere_step_(p, gradient.to(lane), None, None, number(float(t), lane), number(lr, lane), **options)
        mean = momentum * mean + (1 - momentum) * sphere.tangent(v, gradient.double())
        length = mean.norm(dim=-1, keepdim=True)
        turn, unit = math.atan(lr), mean / length
        v, mean = sphere.exp(v, -turn * unit), length * math.cos(turn) * (math.cos(turn) * unit + math.sin(turn) * v)
        assert (mean * v).sum(-1).abs().max() < 1e-9
    assert (p.cpu() - v).abs().max() < 1e-6


def test_many_short_rows(lane):
    check(*problem(4099, 5, lane, beta=0.9))


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.999999])
@pytest.mark.parametrize("step", [1.0, 2.0, 700.0, 1e7])
def test_bias_correction(lane, beta, step):
    arguments, options = problem(2, 16, lane, beta=beta)
    arguments[4].fill_(step)
    check(arguments, options)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).clone()


@pytest.mark.parametrize("column", [1, 2])
def test_views_between_sentinels(lane, column):
    K, D = 4, 100
    arguments, options = problem(K, D, lane, grad=torch.bfloat16, beta=0.9)
    arguments, options = with_momentum(arguments, options)
    homes = []
    for index, tensor in enumerate((*arguments[:4], options["momentum_buffer"])):
        width = tensor.shape[1]
        home = torch.full((K + 2, width * column + 5), torch.nan, dtype=tensor.dtype, device=lane)
        view = home[1:-1, 3 : 3 + width * column : column]
        view.copy_(tensor)
        if index < 4:
            arguments[index] = view
        else:
            options["momentum_buffer"] = view
        homes.append((home, view))
    check(arguments, options)
    for home, view in homes:
        view.fill_(torch.nan)
        assert home.isnan().all()


def test_broadcast_and_transposed_arguments(lane):
    arguments, options = problem(6, 40, lane)
    arguments[1] = torch.randn(40, 6, device=lane).T
    arguments[2] = arguments[2][:1].expand(6, 40)
    check(arguments, options)


def test_rows_stay_on_the_sphere_and_turn_by_arctan_lr(lane):
    arguments, options = problem(5, 768, lane)
    before = arguments[0].double()
    sphere_step_(*arguments, **options)
    after = arguments[0].double()
    assert (after.norm(dim=-1) - 1).abs().max() < 1e-6
    assert (sphere.distance(before, after) - math.atan(0.04)).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("mu", [None, torch.float32], ids=["plain", "prior"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_row_without_loss_gradient_keeps_its_bits(lane, beta, mu, scale):
    """With a prior too: normalised alone, it would turn the row by a whole step."""
    arguments, options = problem(5, 127, lane, mu=mu, beta=beta, scale=scale, found=0.0)
    arguments[0].mul_(1 + 1e-6)  # not quite unit: normalising would show
    arguments[1][2] = 0
    arguments[1][3], arguments[1][3, 126] = 0, 1e-30  # one element is enough
    before, moment = arguments[0].clone(), None if beta == 0 else arguments[3].clone()
    again = [None if t is None else t.clone() for t in arguments]
    sphere_step_(*arguments, **options)
    changed = (arguments[0] != before).any(-1)
    assert changed.tolist() == [True, True, False, mu is not None, True]
    again, options = with_momentum(again, options)
    mean = options["momentum_buffer"].clone()
    sphere_step_(*again, **options)
    for now, then in ((again[0], before), (options["momentum_buffer"], mean)):
        assert (now != then).any(-1).tolist() == [True, True, False, True, True]
    if beta:
        assert (arguments[3] != moment).flatten().tolist() == [True, True, False, True, True]


def test_row_with_a_nan_in_its_gradient_is_not_taken_for_unused(lane):
    arguments, options = problem(3, 127, lane)
    arguments[1].zero_()[1, 5] = torch.nan
    sphere_step_(*arguments, **options)
    assert arguments[0].isnan().any(-1).tolist() == [False, True, False]


def test_every_row_has_its_own_step(lane):
    """Rows that started at different steps, as if each were alone."""
    steps = torch.tensor([[1.0], [7.0], [300.0]], device=lane)
    arguments, options = problem(3, 127, lane, beta=0.999)
    arguments[4] = torch.full((3, 2), torch.nan, device=lane)[:, 1:].copy_(steps)
    alone = [[t[k : k + 1].clone() for t in (*arguments[:4], steps)] + arguments[5:] for k in range(3)]
    for each in alone:
        sphere_step_(*each[:4], each[4].reshape(()), each[5], **options)
    check(arguments, options)
    torch.testing.assert_close(arguments[0], torch.cat([each[0] for each in alone]))


def test_overflow_skips_exactly(lane):
    arguments, options = problem(4, 127, lane, grad=torch.float16, beta=0.9, scale=65536.0, found=1.0)
    arguments[1][0], arguments[1][1, 3], arguments[1][2] = torch.nan, torch.inf, 0
    arguments, options = with_momentum(arguments, options)
    kept = arguments[0], arguments[3], options["momentum_buffer"]
    before = [bits(tensor) for tensor in kept]
    sphere_step_(*arguments, **options)
    assert all(map(torch.equal, map(bits, kept), before))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_hundred_steps(lane, beta):
    """A restatement in float64 that shares no code with the reference."""
    K, D, lr, kappa = 2, 768, 0.04, 0.3
    generator = torch.Generator().manual_seed(1)
    v = F.normalize(torch.randn(K, D, generator=generator, dtype=torch.float64))
    mu = F.normalize(torch.randn(K, D, generator=generator))
    p = v.float().to(lane)
    v = p.double().cpu()
    moment = torch.zeros(K, 1, device=lane) if beta else None
    nu = 0.0
    for t in range(1, 101):
        gradient = torch.randn(K, D, generator=generator)
        arguments = (p, gradient.to(lane), mu.to(lane), moment, number(float(t), lane), number(lr, lane))
        sphere_step_(*arguments, kappa=kappa, beta=beta, eps=1e-8)
        direction = sphere.tangent(v, gradient.double() - kappa * mu.double())
        nu = beta * nu + (1 - beta) * direction.square().sum(-1, keepdim=True)
        v = sphere.retract(v, -lr * direction / (nu / (1 - beta**t)).sqrt())
    assert (p.cpu() - v).abs().max() < 1e-6


def test_optimizer_leaves_the_gradient_alone(lane):
    p = torch.nn.Parameter(F.normalize(torch.randn(3, 64, device=lane)))
    p.grad = torch.randn(3, 64, device=lane)
    gradient, before = p.grad, bits(p.grad)
    SphericalSGD([p], lr=0.04, kappa=0.1, mu=p.detach().clone(), beta=0.9).step()
    assert p.grad is gradient and torch.equal(bits(gradient), before)


def test_optimizer_under_grad_scaler(lane):
    start = F.normalize(torch.randn(3, 64, device=lane))
    mu = F.normalize(torch.randn(3, 64, device=lane))
    gradient = torch.randn(3, 64, device=lane)

    def optimizer(p):
        return SphericalSGD([p], lr=0.04, kappa=0.1, mu=mu, beta=0.9)

    plain, scaled = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    plain.grad = gradient.clone()
    optimizer(plain).step()

    scaler, ours = torch.amp.GradScaler(lane, init_scale=256.0), optimizer(scaled)
    scaler.scale((scaled * gradient).sum()).backward()
    scaler.step(ours)
    scaler.update()
    assert (scaled - plain).abs().max() < 4 * ULP

    before = [bits(scaled), *(bits(value) for value in ours.state[scaled].values())]
    scaled.grad.fill_(torch.inf)
    scaler.scale(torch.zeros((), device=lane))
    scaler.step(ours)
    scaler.update()
    after = [bits(scaled), *(bits(value) for value in ours.state[scaled].values())]
    assert all(map(torch.equal, before, after))
    assert scaler.get_scale() == 128.0


def test_opcheck(lane):
    arguments, options = problem(3, 32, lane, grad=torch.bfloat16, beta=0.9, scale=2.0, found=0.0)
    torch.library.opcheck(torch.ops.dti_fast.sphere_step_.default, tuple(arguments), options)
    arguments, options = with_momentum(*problem(3, 32, lane, mu=None))
    torch.library.opcheck(torch.ops.dti_fast.sphere_step_.default, tuple(arguments), options)


def test_compiles_to_one_graph(lane):
    from torch._dynamo.testing import CompileCounterWithBackend

    arguments, options = problem(3, 32, lane)
    twin = [None if argument is None else argument.clone() for argument in arguments]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: sphere_step_(*a, **options), fullgraph=True, backend=counter)
    for step in range(1, 6):
        for each, call in ((arguments, compiled), (twin, lambda *a: sphere_step_(*a, **options))):
            each[4].fill_(step)
            each[5].fill_(0.04 / step)
            call(*each)
    assert counter.frame_count == 1
    assert torch.equal(arguments[0], twin[0])


def test_meta_device_reads_nothing_back():
    arguments, options = problem(3, 32, "cpu", beta=0.9, scale=2.0, found=0.0)
    options = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    sphere_step_(*(argument.to("meta") for argument in arguments), **options)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.ones(3, 8, dtype=torch.float64), "p must be float32"),
        (1, torch.ones(3, 7), "grad must be"),
        (2, torch.ones(2, 8), "mu must be"),
        (2, None, "kappa needs mu"),
        (3, torch.ones(3, 1), "second_moment goes with"),
        (4, torch.ones(2), "step must be one"),
        (4, torch.ones(2, 1), "step must be one"),
        (5, torch.ones((), device="meta"), "lr must be one float32"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments, options = problem(3, 8)
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        sphere_step_(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("lane", [("triton", "cuda"), ("native", "cuda")], indirect=True, ids=["triton", "cuda"])
def test_graph_capture(lane):
    arguments, options = problem(4, 768, lane, beta=0.9, scale=2.0, found=0.0)
    twin = [argument.clone() for argument in arguments]
    sphere_step_(*[argument.clone() for argument in arguments], **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sphere_step_(*arguments, **options)
    for step in range(1, 4):
        for each in (arguments, twin):
            each[4].fill_(step)
            each[5].fill_(0.04 / step)
        graph.replay()
        sphere_step_(*twin, **options)
    assert torch.equal(arguments[0], twin[0]) and torch.equal(arguments[3], twin[3])


def test_optimizer_follows_its_parameter_to_another_device():
    """mu and a state that was loaded stay where they were: torch moves neither."""
    p = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(2, 8), dim=-1))
    optimizer = SphericalSGD([p], lr=1, kappa=0.1, mu=p.detach().clone(), beta=0.5)
    p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    moved = torch.nn.Parameter(p.detach().to("meta"))
    other = SphericalSGD([moved], lr=1, kappa=0.1, mu=p.detach().clone(), beta=0.5)
    other.load_state_dict(state)
    moved.grad = torch.empty_like(moved)
    other.step()
    assert other.state[moved]["step"].device.type == other.param_groups[0]["mu"].device.type == "meta"


@pytest.mark.parametrize("D", [768, 1280, 2048])
def test_text_encoders_are_compiled_ahead(D):
    kernels = pytest.importorskip("dti_fast.kernels.sphere_step")
    assert any(f"D={D}," in case for case, _ in kernels.aot_cases())
