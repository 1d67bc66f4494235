"""Which implementation serves an op on a device, and why.

Every op is defined once, with one check and one fake; its implementations carry the op's own name:

    triton     dti_fast.kernels.<stem>.<op>
    native     torch.ops.dti_fast_C.<op>, built from csrc/
    reference  plain PyTorch, which alone computes in float64

`operators` is the one list of ops: tables, benchmarks and tests read it.
"""

import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

library = torch.library.Library("dti_fast", "FRAGMENT")
operators: dict[str, "Operator"] = {}

_BACKENDS = ("triton", "native", "reference")
_PREFERRED = {"cuda": ("triton", "native"), "cpu": ("native",)}


class Serving(NamedTuple):
    """`backend` serves `op` on `device`, or None does; `why` says what spoke against the others."""

    op: str
    device: str
    backend: str | None
    why: str


class Operator:
    """An op of the namespace `dti_fast`.

    Args:
        schema: as in `torch.library.define`; its first argument is the tensor whose device decides.
        stem: name of the op's module in `dti_fast.kernels`.
        check: called with the op's arguments before any implementation; raises for a wrong shape or dtype.
        reference: the implementation in plain PyTorch, called with the op's arguments.
        output: empty outputs for the op's arguments; None for an op that returns nothing.
        fused: the other backends that implement it.
        save: of a differentiable op, called with autograd's context, inputs and output: keeps what `backward` needs.
        backward: the gradients of the inputs, called with the context and the gradients of the outputs.  They have
            no derivative themselves, and asking for one is an error.
        keeps: what reports of memory call the tensor that autograd keeps for it.
    """

    def __init__(
        self,
        schema: str,
        *,
        stem: str,
        check: Callable,
        reference: Callable,
        output: Callable | None = None,
        fused: tuple[str, ...] = ("triton", "native"),
        save: Callable | None = None,
        backward: Callable | None = None,
        keeps: str | None = None,
    ):
        self.name = schema.partition("(")[0]
        self.stem, self.check, self.reference, self.output, self.fused = stem, check, reference, output, fused
        self.backward, self.keeps = backward, keeps
        self._chosen: dict[tuple[str, str | None, bool], Callable] = {}
        operators[self.name] = self
        library.define(schema)
        library.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dti_fast::{self.name}", self.fake, lib=library)
        if backward is not None:
            name = f"dti_fast::{self.name}"
            torch.library.register_autograd(name, self._first_derivative, setup_context=save, lib=library)
        arguments = self.overload._schema.arguments
        positional = [a for a in arguments if not a.kwarg_only]
        self._tensors = [i for i, a in enumerate(positional) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self._written = [i for i, a in enumerate(positional) if a in written]
        self._written_by_name = [a.name for a in written if a.kwarg_only]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.dti_fast, self.name).default

    def run(self, *args, **kwargs):
        self.check(*args, **kwargs)
        wide = False
        for i in self._tensors:  # a plain loop, because this precedes every launch
            if args[i] is not None and args[i].dtype is torch.float64:
                wide = True
        key = args[0].device.type, os.environ.get("DTI_FAST_BACKEND"), wide
        implementation = self._chosen.get(key) or self._choose(*key)
        out = implementation(*args, **kwargs)
        for written in (*(args[i] for i in self._written), *(kwargs.get(name) for name in self._written_by_name)):
            if written is not None and not written.is_inference():  # so that autograd notices if it kept this one
                torch.autograd.graph.increment_version(written)
        return out

    def _first_derivative(self, ctx, *grads):
        if torch.is_grad_enabled():  # under create_graph=True, and only then
            raise RuntimeError(
                f"dti_fast.ops.{self.name} has no second derivative: take its gradient without create_graph=True, "
                "or use plain PyTorch here"
            )
        return self.backward(ctx, *grads)

    def fake(self, *args, **kwargs):
        self.check(*args, **kwargs)
        return None if self.output is None else self.output(*args, **kwargs)

    def serving(self, device: str, forced: str | None, wide: bool = False, *, build: bool) -> Serving:
        """Decide; `wide` is for float64 among the arguments, `build` allows compiling csrc/ where it is needed."""
        if forced is not None:
            if forced not in _BACKENDS:
                raise ValueError(f"DTI_FAST_BACKEND must be one of {', '.join(_BACKENDS)}, got {forced!r}")
            obstacle = self._obstacle(forced, device, wide, build=build)
            return Serving(self.name, device, None if obstacle else forced, obstacle or "forced by DTI_FAST_BACKEND")
        obstacles = []
        for backend in _PREFERRED.get(device, ()):
            # A CPU can wait until its user builds; a GPU without Triton would run a dozen tiny kernels a step.
            obstacle = self._obstacle(backend, device, wide, build=build and device == "cuda")
            if obstacle is None:
                return Serving(self.name, device, backend, "; ".join(obstacles) or "preferred here")
            obstacles.append(f"{backend}: {obstacle}")
        return Serving(self.name, device, "reference", "; ".join(obstacles) or f"no kernels for {device}")

    def _obstacle(self, backend: str, device: str, wide: bool, *, build: bool) -> str | None:
        if backend == "reference":
            return None
        if wide:
            return "the kernels take no float64"
        if backend not in self.fused:
            return f"{self.name} has no {backend} implementation"
        if backend == "triton":
            return _triton_obstacle(device)
        from dti_fast.ops import _native  # late, so that `python -m dti_fast.ops._build` finds _build not yet imported

        return _native.obstacle(device, build=build)

    def _choose(self, device: str, forced: str | None, wide: bool) -> Callable:
        serving = self.serving(device, forced, wide, build=True)
        if serving.backend is None:
            raise RuntimeError(f"DTI_FAST_BACKEND={forced} cannot serve {self.name} on {device}: {serving.why}")
        if serving.backend == "reference" and device == "cuda" and forced is None and self.fused and not wide:
            warnings.warn(f"dti_fast.ops.{self.name} runs unfused: {serving.why}", stacklevel=2)
        if serving.backend == "triton":
            implementation = getattr(importlib.import_module(f"dti_fast.kernels.{self.stem}"), self.name)
            implementation = _on_its_device(implementation) if device == "cuda" else implementation
        elif serving.backend == "native":
            importlib.import_module("dti_fast.ops._native").load(device)
            implementation = getattr(torch.ops.dti_fast_C, self.name).default
        else:
            implementation = self.reference
        self._chosen[device, forced, wide] = implementation
        return implementation


def backends() -> list[Serving]:
    """Which implementation serves each op on each kind of device here, and why; builds nothing.

    A row whose `backend` is None is an op that raises here, because `DTI_FAST_BACKEND` forces what cannot run.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    forced = os.environ.get("DTI_FAST_BACKEND")
    return [operator.serving(device, forced, build=False) for operator in operators.values() for device in devices]


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """float64 for a float64 tensor, float32 for any other."""
    return torch.promote_types(tensor.dtype, torch.float32)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether numbers can be read; those of a tensor on the meta device or of a fake one cannot."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def describe(tensor: torch.Tensor) -> str:
    """Dtype, shape and device, for messages."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}".removeprefix("torch.")


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device and its stream, which need not be those of the tensors."""

    @functools.wraps(launch)
    def guarded(*args, **kwargs):
        device = args[0].device
        if device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return guarded


def _triton_obstacle(device: str) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device == "cpu":
        if not triton.knobs.runtime.interpret:
            return "on the CPU Triton runs under TRITON_INTERPRET=1 only"
        try:
            numpy = importlib.metadata.version("numpy")
        except importlib.metadata.PackageNotFoundError:
            return "Triton's interpreter needs numpy"
        # It makes a number of an array of one, which numpy gave up.
        if _release(triton.__version__) < (3, 7) and _release(numpy) >= (2, 4):
            return "the interpreter of Triton before 3.7 does not run with numpy from 2.4 on"
    return None if device in _PREFERRED else f"the kernels are not proven on {device}"


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
