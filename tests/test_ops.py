"""What holds for every op, whatever it computes: derivatives, devices, dtypes, what is written in place."""

import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks._ops import by_stem, problems
from dti_fast import ops
from dti_fast.ops import _dispatch

CPU = torch.device("cpu")
DIFFERENTIABLE = [stem for stem, operator in by_stem().items() if operator.backward is not None]


def test_every_op_is_one_file_and_public():
    for stem, operator in by_stem().items():
        assert getattr(ops, operator.name).__module__ == f"dti_fast.ops.{stem}"
    assert {operator.name for operator in by_stem().values()} < set(ops.__all__)


@pytest.mark.parametrize("stem", DIFFERENTIABLE)
def test_a_second_derivative_is_an_error(stem, monkeypatch):
    module = problems(stem)
    case = module.case(*module.SMOKE, dtype=torch.float32, device=CPU)
    case.op(*case.make(0))
    monkeypatch.setattr(torch.autograd, "grad", partial(torch.autograd.grad, create_graph=True))
    with pytest.raises(RuntimeError, match=f"{stem} has no second derivative"):
        case.op(*case.make(0))


def test_a_gradient_penalty_is_an_error_and_not_silently_nothing():
    x = torch.randn(2, 8, requires_grad=True)
    out = ops.geglu(x).sum()
    with pytest.raises(RuntimeError, match="geglu has no second derivative"):
        torch.autograd.grad(out + x.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("current", [0, 1])
def test_triton_launches_on_the_device_of_the_tensors(monkeypatch, current):
    """Of two devices, recorded by stand-ins: where each launch happens."""
    state = SimpleNamespace(current=current, switched=0)

    @contextmanager
    def device(wanted):
        before, state.current, state.switched = state.current, wanted.index, state.switched + 1
        try:
            yield
        finally:
            state.current = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = SimpleNamespace(geglu=lambda x, approximate: state.current)
    monkeypatch.setitem(sys.modules, "dti_fast.kernels.geglu", kernel)
    monkeypatch.setattr(_dispatch, "_triton_obstacle", lambda device: None)
    monkeypatch.delenv("DTI_FAST_BACKEND", raising=False)
    operator = _dispatch.operators["geglu"]
    monkeypatch.setattr(operator, "_chosen", {})
    monkeypatch.setattr(operator, "check", lambda *args: None)
    tensor = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float32)
    assert operator.run(tensor, "none") == 1
    assert state == SimpleNamespace(current=current, switched=int(current != 1))


def test_an_interpreter_that_cannot_run_is_an_obstacle(monkeypatch):
    monkeypatch.setenv("DTI_FAST_BACKEND", "triton")
    monkeypatch.setattr(_dispatch.operators["geglu"], "_chosen", {})
    triton = pytest.importorskip("triton")

    def install(triton_version, numpy_version):
        monkeypatch.setattr(triton, "__version__", triton_version)
        monkeypatch.setattr(_dispatch.importlib.metadata, "version", {"numpy": numpy_version}.__getitem__)

    install("3.6.0", "2.4.6")
    with pytest.raises(RuntimeError, match=r"before 3\.7 does not run with numpy from 2\.4 on"):
        ops.geglu(torch.ones(2, 8))
    for versions in (("3.7.1", "2.4.6"), ("3.6.0", "2.3.5")):
        install(*versions)
        assert _dispatch._triton_obstacle("cpu") is None


def step(p, **options):
    one = torch.ones((), device=p.device)
    ops.sphere_step_(p, torch.ones_like(p), None, None, one, one, kappa=0.0, beta=0.0, eps=1e-8, **options)


def test_autograd_notices_what_is_written_in_place(lane):
    p = F.normalize(torch.randn(2, 8, device=lane)).requires_grad_()
    loss = p.square().sum()
    step(p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(lane):
    with torch.inference_mode():
        p = F.normalize(torch.randn(2, 8, device=lane))
        before = p.clone()
        step(p)
        assert not torch.equal(p, before)


@pytest.mark.parametrize("stem", DIFFERENTIABLE)
def test_float64_is_computed_in_float64_by_plain_pytorch(stem, monkeypatch):
    monkeypatch.delenv("DTI_FAST_BACKEND", raising=False)
    for case in problems(stem).error_cases(torch.float64, CPU):
        # Directions, magnitudes and their gradient are float32 whatever the vocabulary is.
        allowed = 1e-12 if stem != "token_embed" else 1e-6
        for (errors, size), tensor in zip(case.errors(["reference"]).values(), case.op(*case.make(0)), strict=True):
            assert errors["reference"] <= allowed * size
            assert tensor.dtype == (torch.float32 if allowed > 1e-9 and tensor.dim() == 2 else torch.float64)
        monkeypatch.setenv("DTI_FAST_BACKEND", "triton")
        with pytest.raises(RuntimeError, match=f"triton cannot serve {stem} on cpu: the kernels take no float64"):
            case.op(*case.make(0))
        monkeypatch.delenv("DTI_FAST_BACKEND")


def test_int32_ids(lane):
    arguments = torch.randn(20, 8), F.normalize(torch.randn(2, 8)), torch.rand(2, 1)
    vocabulary, directions, magnitudes = (tensor.to(lane) for tensor in arguments)
    ids, results = torch.tensor([[0, 20, 3, 21, 22]], device=lane), []
    for dtype in (torch.int64, torch.int32):
        out = ops.token_embed(ids.to(dtype), vocabulary, directions.requires_grad_(), magnitudes, 20)
        results.append((out.detach(), *torch.autograd.grad(out[:, :4].sum(), directions)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("lr", [0.25, np.float32(0.25), torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.25])])
def test_learning_rates_are_any_number(lane, lr):
    results = []
    for rate in (torch.tensor(0.25, device=lane), lr.to(lane) if isinstance(lr, torch.Tensor) else lr):
        p = torch.eye(2, 8, device=lane)
        ops.sphere_step_(p, torch.ones_like(p), None, None, 1, rate, kappa=0.0, beta=0.0, eps=1e-8)
        results.append(p)
    assert torch.equal(*results)
    assert torch.allclose(torch.acos(results[0].diagonal()).tan(), torch.tensor(0.25, device=lane))
