"""One Riemannian step of unit rows in one pass over memory.

    g  = grad / grad_scale - kappa mu
    g  = momentum m + (1 - momentum) g    with momentum
    g  = g - (g . p) p
    m  = g                                with momentum
    nu = beta nu + (1 - beta) |g|^2,  nu_hat = nu / (1 - beta^step)
    p  = normalise(p - lr g / (sqrt(nu_hat) + eps)), or p itself where g = 0

A row whose grad is zero throughout keeps p, nu and m, and so does every row where found_inf is set.

Shapes: p, grad, mu, m `[K, D]` with any strides; nu `[K, 1]`; step and grad_scale one number or `[K, 1]`; lr and
found_inf one number each.
Dtypes: p, nu, m and the numbers float32; grad and mu float32, bfloat16 or float16; arithmetic float32.
Launch: one program for every `rows` rows, each row whole in registers; `launch` is the fixed table.
Bytes: p, grad, mu read once and p written once, the least possible: for float32 `16 K D`, without a prior `12 K D`.
With momentum m is read and written too, `8 K D`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sphere_step_kernel(
    p_ptr,  # [K, D]
    grad_ptr,  # [K, D]
    mu_ptr,  # [K, D] or None
    moment_ptr,  # [K, 1] or None
    buffer_ptr,  # [K, D] or None
    step_ptr,  # one number or [K, 1]
    lr_ptr,
    scale_ptr,  # one number or [K, 1] or None
    found_ptr,  # or None
    p_row,  # strides, in elements
    p_column,
    grad_row,
    grad_column,
    mu_row,
    mu_column,
    moment_row,
    buffer_row,
    buffer_column,
    step_row,
    scale_row,
    K,
    D,
    kappa,
    beta,
    one_minus_beta,
    log_beta,
    eps,
    momentum,
    one_minus_momentum,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    inside = (row < K) & (column < D)
    row = row.to(tl.int64)
    column = column.to(tl.int64)

    p_at = p_ptr + row * p_row + column * p_column
    p = tl.load(p_at, mask=inside, other=0.0)
    g = tl.load(grad_ptr + row * grad_row + column * grad_column, mask=inside, other=0.0).to(tl.float32)
    used = tl.sum((g != 0.0).to(tl.int32), axis=1, keep_dims=True) > 0  # [ROWS, 1]
    if scale_ptr is not None:
        g = g / tl.load(scale_ptr + row * scale_row, mask=row < K, other=1.0)
    if mu_ptr is not None:
        g -= kappa * tl.load(mu_ptr + row * mu_row + column * mu_column, mask=inside, other=0.0).to(tl.float32)
    if buffer_ptr is not None:
        buffer_at = buffer_ptr + row * buffer_row + column * buffer_column
        g = momentum * tl.load(buffer_at, mask=inside, other=0.0) + one_minus_momentum * g
    g -= tl.sum(g * p, axis=1, keep_dims=True) * p
    norm_squared = tl.sum(g * g, axis=1, keep_dims=True)  # [ROWS, 1]

    write = (row < K) & used
    if found_ptr is not None:
        # A block, because Triton's interpreter loses the type of a compared scalar.
        found = tl.load(found_ptr) + tl.zeros([ROWS, 1], tl.float32)
        write = write & (found == 0.0)
    if buffer_ptr is not None:
        tl.store(buffer_at, g, mask=inside & write)
    if moment_ptr is not None:
        moment_at = moment_ptr + row * moment_row
        moment = beta * tl.load(moment_at, mask=row < K, other=1.0) + one_minus_beta * norm_squared
        tl.store(moment_at, moment, mask=write)
        step = tl.load(step_ptr + row * step_row, mask=row < K, other=1.0)
        norm = tl.sqrt(moment / _one_minus_exp(step * log_beta))
    else:
        norm = tl.sqrt(norm_squared)

    moved = p - (tl.load(lr_ptr) / (norm + eps)) * g
    length = tl.sqrt(tl.sum(moved * moved, axis=1, keep_dims=True))
    # A row that does not move is not written: normalising again would change its last bits.
    tl.store(p_at, moved / length, mask=inside & write & (norm_squared != 0.0))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without the cancellation near 0, where a Taylor polynomial serves."""
    near = tl.maximum(x, -0.5)
    series = 1.0 + near / 9
    series = 1.0 + near / 8 * series
    series = 1.0 + near / 7 * series
    series = 1.0 + near / 6 * series
    series = 1.0 + near / 5 * series
    series = 1.0 + near / 4 * series
    series = 1.0 + near / 3 * series
    series = 1.0 + near / 2 * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


class Launch(NamedTuple):
    rows: int
    columns: int
    warps: int


def launch(K: int, D: int) -> Launch:
    """The tile for `[K, D]`: whole rows, up to 16 elements a thread; several rows where they are short and many."""
    columns = max(triton.next_power_of_2(D), 32)
    rows = max(1024 // columns, 1) if K >= 4096 else 1
    return Launch(rows, columns, warps=min(max(rows * columns // 256, 1), 16))


def sphere_step_(
    p, grad, mu, second_moment, step, lr, *,
    kappa, beta, eps, momentum=0.0, momentum_buffer=None, grad_scale=None, found_inf=None,
) -> None:  # fmt: skip
    """Launch on the current stream; arguments as in `dti_fast.ops.sphere_step_`, already checked."""
    K, D = p.shape
    if p.numel() == 0:
        return
    tile = launch(K, D)
    arguments = _arguments(
        p, grad, mu, second_moment, momentum_buffer, step, lr, kappa, beta, eps, momentum, grad_scale, found_inf
    )
    _sphere_step_kernel[(triton.cdiv(K, tile.rows),)](
        *arguments, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, enable_fp_fusion=True
    )


def _arguments(
    p: Tensor, grad: Tensor, mu: Tensor | None, second_moment: Tensor | None, buffer: Tensor | None, step, lr,
    kappa, beta, eps, momentum, scale: Tensor | None, found,
) -> tuple:  # fmt: skip
    mu = mu if kappa != 0.0 else None
    return (
        p, grad, mu, second_moment, buffer, step, lr, scale, found,
        *p.stride(), *grad.stride(), *((0, 0) if mu is None else mu.stride()),
        0 if second_moment is None else second_moment.stride(0),
        *((0, 0) if buffer is None else buffer.stride()),
        _row_stride(step), 0 if scale is None else _row_stride(scale),
        *p.shape,
        kappa, beta, 1 - beta, math.log(beta) if beta > 0 else 0.0, eps, momentum, 1 - momentum,
    )  # fmt: skip


def _row_stride(numbers: Tensor) -> int:
    """0 for one number that serves all rows."""
    return numbers.stride(0) if numbers.numel() > 1 else 0


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Launches on meta tensors for `dti_fast.kernels._aot`, by name."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for K, D in ((4, 768), (4, 1280), (4, 2048), (4, 4096), (4, 8192), (100_000, 64)):
        p, one = empty(K, D), empty()
        yield (
            f"K={K} D={D}, fp32, no prior",
            lambda p=p, one=one: sphere_step_(p, p, None, None, one, one, kappa=0.0, beta=0.0, eps=1e-8),
        )
        gradient, moment = empty(K, D, dtype=torch.bfloat16), empty(K, 1)
        yield (
            f"K={K} D={D}, bf16 gradient, every option",
            lambda p=p, one=one, gradient=gradient, moment=moment: sphere_step_(
                p, gradient, p, moment, one, one, kappa=1e-4, beta=0.9, eps=1e-8, grad_scale=one, found_inf=one
            ),
        )
        yield (
            f"K={K} D={D}, fp32, momentum",
            lambda p=p, one=one, moment=moment: sphere_step_(
                p, p, p, None, one, one,
                kappa=1e-4, beta=0.0, eps=1e-8, momentum=0.9, momentum_buffer=p, grad_scale=moment, found_inf=one,
            ),
        )  # fmt: skip
