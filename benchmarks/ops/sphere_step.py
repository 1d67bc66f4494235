"""`sphere_step_` with the prior, against its formula operation by operation; `dtype` is the gradient's."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks._ops import Case, normal
from dti_fast.ops import sphere_step_
from dti_fast.reference.sphere_step import sphere_step

# Vectors and their width: a concept or a thousand, in the text encoders of SD 1.5 and SDXL and in a T5.
SIZES = ((4, 768), (4, 1280), (4, 4096), (1000, 768), (100_000, 768))
SMOKE = (4, 768)


def case(
    K: int, D: int, beta: float = 0.0, kappa: float = 1e-4, *, dtype: torch.dtype, device: torch.device
) -> Case:  # fmt: skip
    options = {"kappa": kappa, "beta": beta, "eps": 1e-8}

    def make(seed: int) -> tuple:
        p, grad, mu = (F.normalize(rows) for rows in normal(seed, torch.float32, device, *[(K, D)] * 3))
        moment = torch.ones(K, 1, device=device) if beta else None
        step, lr = (torch.tensor(number, device=device) for number in (3.0, 0.04))
        return p, grad.to(dtype), mu, moment, step, lr

    def op(p, *arguments) -> tuple:
        sphere_step_(p, *arguments, **options)
        return (p,)

    @torch.no_grad()
    def eager(p, *arguments) -> tuple:
        p.copy_(sphere_step(p, *arguments, **options)[0])
        return (p,)

    def exact(*arguments) -> tuple:
        return sphere_step(*(None if t is None else t.double() for t in arguments), **options)[:1]

    size = K * D * (4 + dtype.itemsize + 4 + 4) + (8 * K if beta else 0)
    return Case(f"K={K} D={D}", size, ("p",), make, op, eager, exact)


def error_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for beta in (0.0, 0.9):
        yield case(33, 768, beta, 0.1, dtype=dtype, device=device)._replace(name=f"beta {beta}")
