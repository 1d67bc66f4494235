"""Per-sample gradients of unit rows, normalised along the sphere and added, in one pass over memory.

    u[b]  = grad[b] - (grad[b] . p) p
    sum   = sum over b with u[b] != 0 of u[b] / |u[b]|
    count = number of those b

Shapes: grad `[B, K, D]` and p `[K, D]` with any strides; sum `[K, D]`, count `[K, 1]`.
Dtypes: grad float32, bfloat16 or float16; the rest float32; arithmetic float32.
Launch: one program for a row, which goes through the samples in their order with the row whole in registers.
Bytes: grad and p read once, the sum written once, the least possible: for float32 `4 K D (B + 2)`.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tangent_sum_kernel(
    grad_ptr,  # [B, K, D]
    p_ptr,  # [K, D]
    sum_ptr,  # [K, D] contiguous
    count_ptr,  # [K, 1] contiguous
    grad_sample,  # strides, in elements
    grad_row,
    grad_column,
    p_row,
    p_column,
    B,
    D,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :].to(tl.int64)  # [1, COLUMNS]
    inside = column < D
    p = tl.load(p_ptr + row * p_row + column * p_column, mask=inside, other=0.0)
    total = tl.zeros([1, COLUMNS], tl.float32)
    count = tl.zeros([1, 1], tl.float32)
    at = grad_ptr + row * grad_row + column * grad_column
    for _ in range(B):
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        g -= tl.sum(g * p, axis=1, keep_dims=True) * p
        norm_squared = tl.sum(g * g, axis=1, keep_dims=True)  # [1, 1]
        seen = norm_squared != 0.0
        total += tl.where(seen, g / tl.sqrt(tl.where(seen, norm_squared, 1.0)), 0.0)
        count += seen.to(tl.float32)
        at += grad_sample
    tl.store(sum_ptr + row * D + column, total, mask=inside)
    tl.store(count_ptr + row + tl.zeros([1, 1], tl.int64), count)


def tangent_sum(grad, p) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; arguments as in `dti_fast.ops.tangent_sum`, already checked."""
    B, K, D = grad.shape
    total = torch.empty((K, D), dtype=torch.float32, device=p.device)
    count = torch.empty((K, 1), dtype=torch.float32, device=p.device)
    if D == 0:
        return total, count.zero_()
    columns = max(triton.next_power_of_2(D), 32)
    if K > 0:
        _tangent_sum_kernel[(K,)](
            grad, p, total, count, *grad.stride(), *p.stride(), B, D,
            COLUMNS=columns, num_warps=min(max(columns // 256, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return total, count


def aot_cases() -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]]]]:
    """Launches on meta tensors for `dti_fast.kernels._aot`, by name."""
    for D in (768, 1280, 2048, 4096, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.empty((4, 4, D), dtype=dtype, device="meta")
            p = torch.empty((4, D), device="meta")
            name = f"B=4 K=4 D={D}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            yield name, lambda grad=grad, p=p: tangent_sum(grad, p)
