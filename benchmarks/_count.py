"""FLOPs and bytes of a step, counted on fake tensors: nothing is computed, the model has its real size."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks._models import Task, make_task
from benchmarks._peers import SEED
from dti_fast.data.draws import draw
from dti_fast.memory.live_bytes import LiveBytes

aten = torch.ops.aten


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Gradients of query, key, value and of the weights; that kernels compute the scores again is their own affair."""
    return 2 * sdpa_flop_count(query, key, value)


FORMULAS = {
    op: formula
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for op, formula in (
        (getattr(aten, f"_scaled_dot_product_{name}"), _attention),
        (getattr(aten, f"_scaled_dot_product_{name}_backward"), _attention_backward),
    )
}


class Counts(NamedTuple):
    """FLOPs of a step's forward and backward (1 multiply-add is 2), bytes kept between the UNet's two, and the peak."""

    flops: int
    live: int
    peak: int


def count(contenders: dict[str, Callable], model: str, resolution: int, batch: int) -> dict[str, Counts]:
    """Counts of every contender, a context manager of `benchmarks._peers`, in bfloat16."""
    with FakeTensorMode():
        task = make_task(model, resolution, batch, torch.bfloat16, torch.device("cpu"))
        return {name: count_task(contender, task) for name, contender in contenders.items()}


def count_task(contender: Callable, task: Task) -> Counts:
    """Counts of `contender` on a task that exists, its tensors fake or real."""
    with contender(task) as ready:
        unet, seen = task.backbone.denoiser, []
        draws = draw(task.data, task.batch, len(task.path), SEED, 0)
        with LiveBytes() as memory:
            hooks = [
                unet.register_forward_pre_hook(lambda *_: seen.append(memory.live)),
                unet.register_forward_hook(lambda *_: seen.append(memory.live)),
            ]
            ready.loss(draws).backward()
        for hook in hooks:
            hook.remove()
        # In a pass of its own: the counter of FLOPs keeps what recomputation would have freed.
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as operations:
            ready.loss(draws).backward()
    return Counts(operations.get_total_flops(), seen[1] - seen[0], memory.peak)
