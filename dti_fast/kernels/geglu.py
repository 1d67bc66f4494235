"""The gated linear unit and its gradient, one elementwise pass each.

    out      = hidden gelu(gate)
    d hidden = grad gelu(gate)
    d gate   = grad hidden gelu'(gate)

Shapes: projected and its gradient `[R, 2F]`, hidden then gate; out and grad `[R, F]`.
Dtypes: float32, bfloat16 or float16; arithmetic float32.
Launch: one program for `ROWS` rows of `COLUMNS` columns, of both halves.
Bytes: forward `3 R F` elements, backward `5 R F`, the least possible.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 4, 256, 4


@triton.jit
def _geglu_kernel(
    projected_ptr,  # [R, 2F] contiguous
    out_ptr,  # [R, F] contiguous
    R,
    F,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _tile(R, F, ROWS, COLUMNS)
    hidden_at = projected_ptr + row * (2 * F) + column
    hidden = tl.load(hidden_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(hidden_at + F, mask=inside, other=0.0).to(tl.float32)
    gelu, _ = _gelu(gate, TANH)
    tl.store(out_ptr + row * F + column, hidden * gelu, mask=inside)


@triton.jit
def _geglu_backward_kernel(
    grad_ptr,  # [R, F] contiguous
    projected_ptr,  # [R, 2F] contiguous
    out_ptr,  # [R, 2F] contiguous
    R,
    F,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _tile(R, F, ROWS, COLUMNS)
    offset = row * (2 * F) + column
    hidden = tl.load(projected_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected_ptr + offset + F, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
    gelu, slope = _gelu(gate, TANH)
    tl.store(out_ptr + offset, grad * gelu, mask=inside)
    tl.store(out_ptr + offset + F, grad * hidden * slope, mask=inside)


@triton.jit
def _tile(R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    blocks = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    return row, column, (row < R) & (column < F)


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """gelu(x) and gelu'(x)."""
    if TANH:
        # (1 + tanh(u)) / 2 is the sigmoid of 2u, from an exponential that neither overflows nor cancels.
        square = x * x
        twice = x * (1.5957691216057308 + 0.07135481282735949 * square)
        small = tl.exp(-tl.abs(twice))
        inverse = 1.0 / (1.0 + small)
        share = tl.where(twice < 0.0, small * inverse, inverse)
        slope = share + x * small * inverse * inverse * (1.5957691216057308 + 0.21406443848207847 * square)
    else:
        share = 0.5 + 0.5 * tl.math.erf(0.7071067811865476 * x)
        slope = share + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    return x * share, slope


def geglu(projected, approximate: str) -> Tensor:
    """Launch on the current stream; arguments as in `dti_fast.ops.geglu`, already checked."""
    F = projected.shape[-1] // 2
    out = torch.empty((*projected.shape[:-1], F), dtype=projected.dtype, device=projected.device)
    _launch(_geglu_kernel, projected.contiguous(), out, out.numel(), F, approximate)
    return out


def geglu_backward(grad, projected, approximate: str) -> Tensor:
    """Launch on the current stream; arguments as in `dti_fast.ops`' `geglu_backward`, already checked."""
    out = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    arguments = grad.contiguous(), projected.contiguous(), out
    _launch(_geglu_backward_kernel, *arguments, grad.numel(), grad.shape[-1], approximate)
    return out


def _launch(kernel, *arguments) -> None:
    *tensors, count, F, approximate = arguments
    if count == 0:
        return
    R = count // F
    kernel[(triton.cdiv(R, ROWS) * triton.cdiv(F, COLUMNS),)](
        *tensors, R, F,
        TANH=approximate == "tanh", ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Launches on meta tensors for `dti_fast.kernels._aot`, by name."""
    # One kernel serves every width: those of SD 1.5 and SDXL are multiples of 16, from 1280 to 5120.
    for dtype, approximate in ((torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "tanh")):
        projected = torch.empty(1, 1024, 2 * 5120, dtype=dtype, device="meta")
        grad = torch.empty(1, 1024, 5120, dtype=dtype, device="meta")
        case = f"F=5120, {'bf16' if dtype == torch.bfloat16 else 'fp32'}, approximate {approximate}"
        yield f"forward {case}", lambda p=projected, a=approximate: geglu(p, a)
        yield f"backward {case}", lambda g=grad, p=projected, a=approximate: geglu_backward(g, p, a)
