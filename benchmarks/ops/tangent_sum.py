"""`tangent_sum`, against its formula operation by operation; `dtype` is the gradients'."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks._ops import Case, normal
from dti_fast.ops import tangent_sum
from dti_fast.reference import tangent_sum as reference

# Samples, vectors and their width, in the text encoders of SD 1.5 and SDXL and in a T5.
SIZES = ((4, 4, 768), (4, 4, 1280), (16, 4, 1280), (4, 4, 4096))
SMOKE = (4, 4, 768)


def case(B: int, K: int, D: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    def make(seed: int) -> tuple:
        grad, p = normal(seed, torch.float32, device, (B, K, D), (K, D))
        return grad.to(dtype), F.normalize(p)

    def exact(grad, p) -> tuple:
        return reference.tangent_sum(grad.double(), p.double())

    size = K * D * (B * dtype.itemsize + 4 + 4) + 4 * K
    return Case(f"B={B} K={K} D={D}", size, ("sum", "count"), make, tangent_sum, reference.tangent_sum, exact)


def error_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    yield case(8, 9, 768, dtype=dtype, device=device)._replace(name="")
