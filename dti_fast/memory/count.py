"""What each segment of a training step keeps alive, needs in passing, and computes: counted, not run.

A step is a walk over segments: text encoders, each block of the denoiser, loss, and all of them backwards.  How much a
segment leaves alive, what it needs in passing and how many FLOPs it takes depends on the recomputation of its own part
alone.  So one count for each mode gives the memory of every mixture of modes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from dti_fast.memory.live_bytes import LiveBytes

TEXT = "text_encoders"  # the part of a step outside of the denoiser's blocks

aten = torch.ops.aten
_FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(frozen=True)
class Segment:
    """A stretch of a step between two boundaries.

    Attributes:
        part: the block's name, or `TEXT` outside of blocks.
        live: bytes that it leaves alive beyond those that it found; negative if it frees.
        peak: the most bytes alive beyond those that it found.
        flops: of matrix products, convolutions and attention.
    """

    part: str
    live: int
    peak: int
    flops: int


@dataclass(frozen=True)
class Count:
    """The segments of one pass; the first `forward` of them are the forward pass."""

    segments: list[Segment]
    forward: int

    def saved(self, part: str) -> int:
        """Bytes that a part keeps alive for the backward pass."""
        return sum(s.live for s in self.segments[: self.forward] if s.part == part)

    def as_list(self) -> list:
        """`forward`, and each segment's attributes as a list."""
        return [self.forward, *(list(vars(segment).values()) for segment in self.segments)]

    def flops(self, part: str) -> int:
        return sum(s.flops for s in self.segments if s.part == part)


@dataclass(frozen=True)
class Step:
    """Memory and work of one pass, forward and backward.

    Attributes:
        saved: bytes alive between the two.
        peak: the most bytes alive at any time, without weights.
        flops: of both.
    """

    saved: int
    peak: int
    flops: int


class _Walk(LiveBytes):
    def __init__(self):
        super().__init__()
        self.segments: list[Segment] = []
        self._part, self._found, self._flops = TEXT, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = _FLOPS.get(func.overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def enter(self, part: str, *_) -> None:
        """End the present segment; the next one belongs to `part`."""
        self.segments.append(Segment(self._part, self.live - self._found, self.peak - self._found, self._flops))
        self._part, self._found, self._flops = part, self.live, 0
        self.peak = self.live


def count_step(denoiser: nn.Module, blocks: Sequence[str], loss: Callable[[], Tensor]) -> Count:
    """Count one forward and backward pass under `FakeTensorMode`.

    Args:
        denoiser: a fake model.
        blocks: names of its parts that are told apart, in the order of the forward pass.
        loss: computes the scalar loss; calls `denoiser` once, with a condition that requires a gradient.  Calls
            without gradients, which keep nothing whatever is recomputed, belong to `TEXT`.
    """
    walk = _Walk()

    def watch_text(module, args, kwargs):
        if torch.is_grad_enabled():
            conditions = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            widest = max(conditions, key=Tensor.numel)
            widest.register_hook(partial(walk.enter, TEXT))  # backward is through the blocks

    def enter(name, module, args):
        if torch.is_grad_enabled():
            walk.enter(name)

    def leave(name, module, args, output):
        if not torch.is_grad_enabled():
            return
        walk.enter(TEXT)
        hidden = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
        hidden.register_hook(partial(walk.enter, name))  # backward enters the block

    handles = [denoiser.register_forward_pre_hook(watch_text, with_kwargs=True)]
    for name in blocks:
        block = denoiser.get_submodule(name)
        handles.append(block.register_forward_pre_hook(partial(enter, name)))
        handles.append(block.register_forward_hook(partial(leave, name)))
    try:
        with walk:
            result = loss()
            walk.enter(TEXT)
            forward = len(walk.segments)
            result.backward()
            walk.enter(TEXT)
    finally:
        for handle in handles:
            handle.remove()
    return Count(walk.segments, forward)


def uniform(counts: Mapping[str, Count], mode: str) -> dict[str, str]:
    """`mode` for every part."""
    return {segment.part: mode for segment in counts[mode].segments}


def compose(counts: Mapping[str, Count], modes: Mapping[str, str]) -> Step:
    """The pass in which every part has its own mode.

    Args:
        counts: for each mode, the count of the pass with all parts in it.
        modes: for each part.
    """
    live = peak = flops = saved = 0
    some = next(iter(counts.values()))
    for i, segment in enumerate(some.segments):
        segment = counts[modes[segment.part]].segments[i]
        peak = max(peak, live + segment.peak)
        live += segment.live
        flops += segment.flops
        if i + 1 == some.forward:
            saved = live
    return Step(saved, peak, flops)


def ladder(counts: Mapping[str, Count]) -> list[dict[str, str]]:
    """Mixtures of modes, from the first of `counts` everywhere down to the least memory.

    From rung to rung one part changes, the one that frees most bytes for a FLOP; rungs whose peak is no lower than the
    last one's are left out.
    """
    modes = uniform(counts, next(iter(counts)))
    rungs = [dict(modes)]
    while True:
        best, best_rate = None, 0.0
        for part, mode in modes.items():
            for other in counts:
                freed = counts[mode].saved(part) - counts[other].saved(part)
                rate = freed / max(counts[other].flops(part) - counts[mode].flops(part), 1)
                if freed > 0 and rate > best_rate:
                    best, best_rate = (part, other), rate
        if best is None:
            return [_plainly(counts, rung) for rung in rungs]
        modes[best[0]] = best[1]
        if compose(counts, modes).peak < compose(counts, rungs[-1]).peak:
            rungs.append(dict(modes))


def _plainly(counts: Mapping[str, Count], modes: dict[str, str]) -> dict[str, str]:
    """The same plan in fewer words: where two modes do the same to a part, it gets the one that most parts have."""
    usual = max(counts, key=list(modes.values()).count)

    def effect(mode, part):
        return counts[mode].saved(part), counts[mode].flops(part)

    return {part: usual if effect(usual, part) == effect(mode, part) else mode for part, mode in modes.items()}
