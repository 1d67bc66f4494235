"""`sphere_step_` against the same formula in eager PyTorch: `python -m benchmarks.bench_sphere_step [--smoke]`."""

import torch
import torch.nn.functional as F

from benchmarks import _harness
from dti_fast.ops import sphere_step_
from dti_fast.reference.sphere_step import sphere_step

OPTIONS = {"kappa": 1e-4, "beta": 0.0, "eps": 1e-8}
SHAPES = ((4, 768), (4, 1280), (4, 4096), (1000, 768), (100_000, 768))


def cases(device: torch.device, smoke: bool):
    shapes = SHAPES[:1] if smoke else SHAPES if device.type == "cuda" else SHAPES[:4]
    for K, D in shapes:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if smoke else 2]:
            yield case(K, D, dtype, device)


def case(K: int, D: int, dtype: torch.dtype, device: torch.device) -> _harness.Case:
    def make(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        p, grad, mu = (F.normalize(torch.randn(K, D, generator=generator)) for _ in range(3))
        return p.to(device), grad.to(device, dtype), mu.to(device), torch.ones((), device=device), lr

    lr = torch.tensor(0.04, device=device)

    def error(call) -> tuple[float, float]:
        p, grad, mu, step, _ = arguments = make(0)
        wide = (p.double(), grad.double(), mu.double(), None, step.double(), lr.double())
        exact, _ = sphere_step(*wide, **OPTIONS)
        plain, _ = sphere_step(p, grad, mu, None, step, lr, **OPTIONS)
        allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        call(*arguments)
        return (p - exact).abs().max().item(), allowed.item()

    return _harness.Case(
        name=f"K={K} D={D} {str(dtype).removeprefix('torch.')}",
        bytes=K * D * (4 + dtype.itemsize + 4 + 4),
        make=make,
        eager=eager,
        op=lambda p, grad, mu, step, lr: sphere_step_(p, grad, mu, None, step, lr, **OPTIONS),
        error=error,
    )


@torch.no_grad()
def eager(p, grad, mu, step, lr) -> None:
    p.copy_(sphere_step(p, grad, mu, None, step, lr, **OPTIONS)[0])


if __name__ == "__main__":
    _harness.run("sphere_step_", cases, {"cpu": ("native",), "cuda": ("triton", "native")})
