"""`geglu`, forward and backward."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks._ops import Case, layer_case, normal
from dti_fast.ops import geglu

# Tokens and features of the transformer blocks of SDXL at 1024 px, then of SD 1.5 at 512 px.
SIZES = ((4096, 2560), (1024, 5120), (4096, 1280), (1024, 2560), (256, 5120))
SMOKE = (256, 1280)


def case(tokens: int, features: int, approximate: str = "none", *, dtype: torch.dtype, device: torch.device) -> Case:
    def plain(projected):
        """As in diffusers."""
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * F.gelu(gate, approximate=approximate)

    return layer_case(
        f"N={tokens} F={features}",
        8 * tokens * features * dtype.itemsize,
        lambda seed: normal(seed, dtype, device, (1, tokens, 2 * features), (1, tokens, features)),
        lambda projected: geglu(projected, approximate),
        plain,
    )


def error_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for approximate in ("none", "tanh"):
        yield case(16, 1280, approximate, dtype=dtype, device=device)._replace(name=approximate)
