"""`layer_norm`, forward and backward, of rows whose mean is half a deviation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks._ops import Case, layer_case, normal
from dti_fast.ops import layer_norm

# Tokens and features of the transformer blocks of SDXL at 1024 px, then of SD 1.5 at 512 px.
SIZES = ((4096, 640), (1024, 1280), (4096, 320), (1024, 640), (256, 1280))
SMOKE = (256, 1280)


def case(tokens: int, features: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    def make(seed: int) -> tuple:
        x, *others = normal(seed, dtype, device, *[(1, tokens, features)] * 2, *[(features,)] * 2)
        return x + 0.5, *others

    return layer_case(
        f"N={tokens} D={features}",
        5 * tokens * features * dtype.itemsize,
        make,
        layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (features,), weight, bias),
    )


def error_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    yield case(64, 1280, dtype=dtype, device=device)._replace(name="")
