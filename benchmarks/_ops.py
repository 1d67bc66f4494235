"""What the benchmarks of ops share: the ops themselves, their problems, and errors against float64.

The ops are read from `dti_fast.ops.operators`.  benchmarks/ops/<stem>.py has an op's problems:

    SIZES                       arguments of `case`, from real models
    SMOKE                       a small one
    case(*size, dtype, device)  what is timed
    error_cases(dtype, device)  what the table of errors shows
"""

import importlib
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dti_fast.ops import operators
from dti_fast.ops._dispatch import Operator


def by_stem() -> dict[str, Operator]:
    """The public op of every stem; those registered behind it are its gradient."""
    found = {}
    for operator in operators.values():
        found.setdefault(operator.stem, operator)
    return found


def problems(stem: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.ops.{stem}")


class Case(NamedTuple):
    """One problem.

    name: of its size or options.
    bytes: the least traffic of one call.
    results: names of the tensors that a call returns.
    make: fresh arguments from a seed, on the benchmark's device.
    op: the public op, called with the arguments under each forced backend.
    eager: the same in plain PyTorch, the baseline.
    exact: the same in float64.
    """

    name: str
    bytes: int
    results: tuple[str, ...]
    make: Callable[[int], tuple]
    op: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]]

    def calls(self, backends: Iterable[str]) -> dict[str, tuple[str | None, Callable]]:
        """By name: the backend to force and what to call."""
        return {"eager": (None, self.eager)} | {backend: (backend, self.op) for backend in backends}

    def errors(self, backends: Iterable[str]) -> dict[str, tuple[dict[str, float], float]]:
        """Of each result: the largest error of each of `calls` against float64, and the largest exact element."""
        truths = self.exact(*self.make(0))
        table = {name: ({}, truth.abs().max().item()) for name, truth in zip(self.results, truths, strict=True)}
        for name, (backend, call) in self.calls(backends).items():
            with forced(backend):
                tensors = call(*self.make(0))
            for (errors, _), ours, truth in zip(table.values(), tensors, truths, strict=True):
                errors[name] = (ours - truth).abs().max().item()
        return table


def layer_case(name: str, bytes: int, make: Callable[[int], tuple], ours: Callable, plain: Callable) -> Case:
    """A layer, forward and backward.

    `make` gives x, the gradient with respect to the output and frozen tensors; `ours` and `plain` are called with x
    and the frozen ones.
    """

    def both(layer: Callable) -> Callable:
        def call(x: Tensor, grad: Tensor, *frozen: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            out = layer(x, *frozen)
            return out.detach(), torch.autograd.grad(out, x, grad)[0]

        return call

    def exact(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        # Contiguous, because torch's channels-last variance on a CPU cancels even in float64.
        return both(plain)(*(tensor.double().contiguous() for tensor in arguments))

    return Case(name, bytes, ("output", "gradient"), make, both(ours), both(plain), exact)


def normal(seed: int, dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers, drawn on the device itself: on the host a large problem would take seconds."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


@contextmanager
def forced(backend: str | None):
    """DTI_FAST_BACKEND for a while; None leaves the choice to the op."""
    before = os.environ.pop("DTI_FAST_BACKEND", None)
    if backend is not None:
        os.environ["DTI_FAST_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("DTI_FAST_BACKEND", None)
        if before is not None:
            os.environ["DTI_FAST_BACKEND"] = before
