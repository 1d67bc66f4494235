"""A run within the memory of a card: the plan that fits, and a thriftier one whenever the card still runs out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from dti_fast.backbones import Backbone
from dti_fast.data.draws import Draws
from dti_fast.errors import UserError
from dti_fast.frozen.quantise import PRECISIONS
from dti_fast.memory.estimator import Estimator
from dti_fast.memory.plan import CUDA_CONTEXT, GIB, Plan

SMALL_PICTURES = 1 << 18  # pixels of the pictures that are drawn together where nothing is planned
LOWER = 0.9  # the next plan's step has at most this share of the peak of one that did not fit

T = TypeVar("T")


class OutOfMemory(UserError):
    """The card ran out of memory under the thriftiest plan."""


class Budget:
    """Keeps a run within its card: makes the plan, and goes on under a thriftier one if memory runs out all the same.

    Without a limit nothing is planned, and a step is what the settings say.

    Args:
        estimator: of the run.
        allowed: the precisions that the weights may have, best first (`precisions`).
        attention: as for `Backbone.optimize_frozen`.
        limit: bytes to keep within; None for no limit.
        binding: whether it is an error if no plan fits; else the smallest is tried.
        say: takes a line for the person who waits.

    Raises:
        UserError: if no plan fits a binding limit.
    """

    def __init__(
        self,
        estimator: Estimator,
        allowed: Sequence[str],
        attention: str,
        limit: float | None,
        binding: bool,
        say: Callable[[str], None],
    ):
        self._estimator, self._allowed, self._attention, self._say = estimator, allowed, attention, say
        self._plan: Plan | None = None
        self._limit = limit or 0.0
        if limit is None:
            return
        try:
            self._plan = estimator.choose(allowed, limit)
        except UserError as error:
            if binding:
                raise
            self._plan = estimator.smallest(allowed)
            say(f"{error}; trying that, since it is a prediction")
        say(f"{limit / GIB:.1f} GiB: {self._plan.describe()}; {self._plan.total / GIB:.1f} GiB predicted")

    @property
    def base_precision(self) -> str | None:
        """ "int8", "nf4", or None for weights that are stored as they compute."""
        return self._precision if self._precision in PRECISIONS else None

    @property
    def _precision(self) -> str:
        return self._plan.precision if self._plan else self._allowed[0]

    @property
    def tiled_decoding(self) -> bool:
        """Whether previews are decoded in tiles."""
        return self._plan is not None and self._plan.tiled_decoding

    def drawn_at_once(self, size: int) -> int:
        """How many pictures of `size` pixels a preview draws in one batch; without a limit only small ones together."""
        if self._plan is None:
            return max(1, SMALL_PICTURES // size**2)
        return 1 if self._plan.tiled_decoding else self._plan.drawn_at_once(self._limit)

    @contextmanager
    def encoding(self, backbone: Backbone) -> Iterator[None]:
        """Let the VAE have the card for itself, if the plan says so; afterwards it waits in main memory."""
        waiting = [m for m in backbone.modules() if m is not backbone.vae]
        if not (self._plan and self._plan.encode_alone):
            waiting = []
        devices = [next(module.parameters()).device for module in waiting]
        for module in waiting:
            module.to("cpu")
        try:
            yield
        finally:
            backbone.vae.to("cpu")
            for module, device in zip(waiting, devices, strict=True):
                module.to(device)

    def apply(self, backbone: Backbone) -> None:
        """Make the frozen model keep what the plan says."""
        backbone.optimize_frozen(self._plan.modes if self._plan else self._estimator.modes[0], self._attention)

    def attempt(self, backbone: Backbone, compute: Callable[[list[Draws]], T], passes: list[Draws]) -> T:
        """`compute` over the passes, cut into the plan's micro-batches; again under a lower plan if memory runs out.

        All micro-batches have one size, so that the mean over them is the mean over the passes.  `compute` has to start
        anew whenever it is called.

        Raises:
            OutOfMemory: if memory runs out and there is no lower plan.
        """
        while True:
            size = self._plan.micro_batch if self._plan else self._estimator.batch
            try:
                return compute([part for draws in passes for part in draws.split(size)])
            except torch.OutOfMemoryError:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise OutOfMemory("out of memory while capturing the step; try --cuda_graph off") from None
                # The exception keeps the graph alive, so leave its handler first.
            torch.cuda.empty_cache()
            self._step_down()
            self.apply(backbone)

    def _step_down(self) -> None:
        estimator = self._estimator
        present = self._plan or estimator.plan(self._precision, estimator.modes[0], estimator.batch)
        lower = [p for p in estimator.plans(self._precision) if p.step.peak <= LOWER * present.step.peak]
        if not lower:
            raise OutOfMemory(
                f"out of memory with {present.describe()}, and no plan needs less; "
                "try a smaller --resolution, or --base_precision nf4"
            )
        cheapest = min(lower, key=lambda plan: plan.cost)
        self._plan = replace(cheapest, encode_alone=present.encode_alone, tiled_decoding=True)
        self._say(f"out of memory: the step is repeated with {self._plan.describe()}")


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may have, those that it has already included."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + CUDA_CONTEXT
