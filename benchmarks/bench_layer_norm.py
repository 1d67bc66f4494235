"""`layer_norm`, forward and backward, against eager PyTorch: `python -m benchmarks.bench_layer_norm [--smoke]`."""

import torch
import torch.nn.functional as F

from benchmarks import _harness, _parity
from dti_fast.ops import layer_norm

# Tokens and features of the transformer blocks of SDXL at 1024 px, then of SD 1.5 at 512 px.
SIZES = ((4096, 640), (1024, 1280), (4096, 320), (1024, 640), (256, 1280))


def cases(device: torch.device, smoke: bool):
    for tokens, features in ((256, 1280),) if smoke else SIZES:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if smoke else 2]:
            yield case(tokens, features, dtype, device)


def case(tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> _harness.Case:
    def make(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        x, grad = (torch.randn(1, tokens, features, generator=generator).to(device, dtype) for _ in range(2))
        weight, bias = (torch.randn(features, generator=generator).to(device, dtype) for _ in range(2))
        return x.requires_grad_(), grad, weight, bias

    def op(x, grad, weight, bias):
        out = layer_norm(x, weight, bias)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    def eager(x, grad, weight, bias):
        out = F.layer_norm(x, (features,), weight, bias)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    return _harness.Case(
        name=f"N={tokens} D={features} {str(dtype).removeprefix('torch.')}",
        bytes=5 * tokens * features * dtype.itemsize,
        make=make,
        eager=eager,
        op=op,
        error=_parity.twice_eager(make, eager),
    )


if __name__ == "__main__":
    _harness.run("layer_norm", cases, {"cpu": ("reference",), "cuda": ("triton",)})
