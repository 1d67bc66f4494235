"""`group_norm_silu`, forward and backward, against eager PyTorch.

python -m benchmarks.bench_group_norm_silu [--smoke]
"""

import torch
import torch.nn.functional as F

from benchmarks import _harness, _parity
from dti_fast.ops import group_norm_silu

GROUPS = 32
# Channels and side of SDXL's residual blocks at 1024 px, on the way down and, with what the skips bring, up.
SIZES = ((320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32), (2560, 32))
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def cases(device: torch.device, smoke: bool):
    for channels, side in ((320, 16),) if smoke else SIZES:
        for layout in FORMATS:
            for dtype in (torch.float32, torch.bfloat16)[: 1 if smoke else 2]:
                yield case(channels, side, layout, dtype, device)


def case(channels: int, side: int, layout: str, dtype: torch.dtype, device: torch.device) -> _harness.Case:
    def make(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        x, grad = (torch.randn(1, channels, side, side, generator=generator).to(device, dtype) for _ in range(2))
        x, grad = (tensor.contiguous(memory_format=FORMATS[layout]) for tensor in (x, grad))
        weight, bias = (torch.randn(channels, generator=generator).to(device, dtype) for _ in range(2))
        return x.requires_grad_(), grad, weight, bias

    def op(x, grad, weight, bias):
        out = group_norm_silu(x, GROUPS, weight, bias)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    def eager(x, grad, weight, bias):
        out = F.silu(F.group_norm(x, GROUPS, weight, bias))
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    return _harness.Case(
        name=f"C={channels} {side}x{side} {layout} {str(dtype).removeprefix('torch.')}",
        bytes=5 * channels * side * side * dtype.itemsize,
        make=make,
        eager=eager,
        op=op,
        error=_parity.twice_eager(make, eager),
    )


if __name__ == "__main__":
    _harness.run("group_norm_silu", cases, {"cpu": ("reference",), "cuda": ("triton",)})
