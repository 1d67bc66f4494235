"""`group_norm_silu`, forward and backward, of groups whose mean is half a deviation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks._ops import Case, layer_case, normal
from dti_fast.ops import group_norm_silu

GROUPS = 32
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Channels and side of SDXL's residual blocks at 1024 px, on the way down and, with what the skips bring, up.
SIZES = tuple(
    (channels, side, layout)
    for channels, side in ((320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32), (2560, 32))
    for layout in FORMATS
)
SMOKE = (320, 16, "NHWC")


def case(channels: int, side: int, layout: str, *, dtype: torch.dtype, device: torch.device) -> Case:
    def make(seed: int) -> tuple:
        x, grad, *frozen = normal(seed, dtype, device, *[(1, channels, side, side)] * 2, *[(channels,)] * 2)
        return *(tensor.contiguous(memory_format=FORMATS[layout]) for tensor in (x + 0.5, grad)), *frozen

    return layer_case(
        f"C={channels} {side}x{side} {layout}",
        5 * channels * side * side * dtype.itemsize,
        make,
        lambda x, weight, bias: group_norm_silu(x, GROUPS, weight, bias),
        lambda x, weight, bias: F.silu(F.group_norm(x, GROUPS, weight, bias)),
    )


def error_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for layout in FORMATS:
        yield case(320, 32, layout, dtype=dtype, device=device)._replace(name=layout)
