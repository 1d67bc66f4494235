"""Layer normalisation of rows held in registers, and its gradient with respect to them.

    mean = sum x / D,  rstd = 1 / sqrt(sum (x - mean)^2 / D + eps)
    h    = (x - mean) rstd
    out  = h weight + bias
    g    = grad weight
    dx   = rstd (g - sum g / D - h sum (g h) / D)

Shapes: x, out, grad and dx `[R, D]`; weight and bias `[D]` or None; mean and rstd `[R]`.
Dtypes: mean and rstd float32, the others float32, bfloat16 or float16; arithmetic float32.
Launch: one program for every `rows` rows, each row whole in registers; `launch` is the fixed table.
Bytes: forward `2 R D` elements, backward `3 R D`, the least possible, besides `8 R` and one weight and bias a program.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # [R, D] contiguous
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    out_ptr,  # [R, D] contiguous
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    R,
    D,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    inside = (row < R) & (column < D)
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / D
    # The row is at hand, so the variance is summed around its mean and cannot cancel.
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + eps)
    out = centred * rstd
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + column, out, mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < R)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


@triton.jit
def _layer_norm_backward_kernel(
    grad_ptr,  # [R, D] contiguous
    x_ptr,  # [R, D] contiguous
    mean_ptr,  # [R]
    rstd_ptr,  # [R]
    weight_ptr,  # [D] or None
    out_ptr,  # [R, D] contiguous
    R,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    inside = (row < R) & (column < D)
    mean = tl.load(mean_ptr + row, mask=row < R, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < R, other=0.0)
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    normalised = (x - mean) * rstd
    along = tl.sum(g * normalised, axis=1, keep_dims=True) / D  # g is 0 outside
    dx = rstd * (g - tl.sum(g, axis=1, keep_dims=True) / D - normalised * along)
    tl.store(out_ptr + row * D + column, dx, mask=inside)


class Launch(NamedTuple):
    rows: int
    columns: int
    warps: int


def launch(D: int) -> Launch:
    """The tile for rows of D: 16 elements a thread; several rows where they are short."""
    columns = max(triton.next_power_of_2(D), 32)
    rows = min(max(2048 // columns, 1), 16)
    return Launch(rows, columns, warps=min(max(rows * columns // 512, 1), 16))


def layer_norm(x, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream; arguments as in `dti_fast.ops`' `layer_norm`, already checked."""
    D = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) for _ in range(2))
    if R := mean.numel():
        tile = launch(D)
        weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
        _layer_norm_kernel[(triton.cdiv(R, tile.rows),)](
            x.contiguous(), weight, bias, out, mean, rstd, R, D, eps,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, mean, rstd


def layer_norm_backward(grad, x, mean, rstd, weight) -> Tensor:
    """Launch on the current stream; arguments as in `dti_fast.ops`' `layer_norm_backward`, already checked."""
    D = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if R := mean.numel():
        tile = launch(D)
        weight = None if weight is None else weight.contiguous()
        _layer_norm_backward_kernel[(triton.cdiv(R, tile.rows),)](
            grad.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous(), weight, out, R, D,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches on meta tensors for `dti_fast.kernels._aot`, by name."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    # The tiles of 640, 768 and of 1280, 2048 are the same.
    half, single = torch.bfloat16, torch.float32
    for D, dtype in ((320, half), (640, half), (1280, half), (1280, single), (8192, single)):
        name = f"D={D}, {'bf16' if dtype == half else 'fp32'}"
        x, weight, row = empty(1, 1024, D, dtype=dtype), empty(D, dtype=dtype), empty(1, 1024, 1)
        yield f"forward {name}", lambda x=x, w=weight: layer_norm(x, w, w, 1e-5)
        yield f"backward {name}", lambda x=x, w=weight, r=row: layer_norm_backward(x, x, r, r, w)
