"""`geglu`, forward and backward, against eager PyTorch: `python -m benchmarks.bench_geglu [--smoke]`."""

import torch
import torch.nn.functional as F

from benchmarks import _harness, _parity
from dti_fast.ops import geglu

# Tokens and features of the transformer blocks of SDXL at 1024 px, then of SD 1.5 at 512 px.
SIZES = ((4096, 2560), (1024, 5120), (4096, 1280), (1024, 2560), (256, 5120))


def cases(device: torch.device, smoke: bool):
    for tokens, features in ((256, 1280),) if smoke else SIZES:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if smoke else 2]:
            yield case(tokens, features, dtype, device)


def case(tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> _harness.Case:
    def make(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        projected = torch.randn(1, tokens, 2 * features, generator=generator).to(device, dtype)
        weight = torch.randn(1, tokens, features, generator=generator).to(device, dtype)
        return projected.requires_grad_(), weight

    def op(projected, weight):
        out = geglu(projected)
        return out.detach(), torch.autograd.grad(out, projected, weight)[0]

    def eager(projected, weight):
        """As in diffusers."""
        hidden, gate = projected.chunk(2, dim=-1)
        out = hidden * F.gelu(gate)
        return out.detach(), torch.autograd.grad(out, projected, weight)[0]

    return _harness.Case(
        name=f"N={tokens} F={features} {str(dtype).removeprefix('torch.')}",
        bytes=8 * tokens * features * dtype.itemsize,
        make=make,
        eager=eager,
        op=op,
        error=_parity.twice_eager(make, eager),
    )


if __name__ == "__main__":
    _harness.run("geglu", cases, {"cpu": ("reference",), "cuda": ("triton",)})
