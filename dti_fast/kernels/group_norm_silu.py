"""Group normalisation with SiLU, and its gradient with respect to the input, in three launches each.

    mean = sum x / M,  rstd = 1 / sqrt(sum (x - mean)^2 / M + eps)
    h    = (x - mean) rstd,  z = h weight + bias
    out  = z sigmoid(z), or z
    g    = grad silu'(z) weight
    dx   = rstd (g - sum g / M - h sum (g h) / M)

Shapes: x, out, grad and dx `[N, C, S]`, S positions, stored as that or with the channels last; weight and bias `[C]` or
None; mean and rstd `[N, G]`; M = S C / G elements a group.
Dtypes: mean and rstd float32, the others float32, bfloat16 or float16; arithmetic float32.
Launch: the first kernel reduces channels, the second combines the channels of a group, the third applies the result.
A program of the first and the third takes the tile that `TILE` has for the layout; one of the second takes a group.
Channels are reduced before groups because 10 or 30 channels of a group, when they come last in memory, cannot be read
by vector loads.  Sums run in a fixed order, without atomics: results repeat bit for bit.
Variance: squares are summed around the mean of their own part, and the parts are combined by Chan's formula,
sum (M_i + n_i (mean_i - mean)^2).  So no digits cancel, however far the mean lies from zero.
Bytes: forward `3 N C S` elements, backward `5 N C S`, besides 8 bytes for every `positions` elements, written and read
again.  The second read of x, and of x and grad, is the price of groups that no multiprocessor holds: in SDXL at 1024 px
they have up to 491,520 elements.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dti_fast.reference.group_norm_silu import memory_format


@triton.jit
def _statistics_kernel(
    x_ptr,  # [N, C, S]
    part_mean_ptr,  # [N, C, chunks]
    part_squares_ptr,  # [N, C, chunks]
    C,
    S,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    sample, channel, chunk, offset, inside = _tile(C, S, channel_stride, position_stride, CHANNELS, POSITIONS)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / tl.minimum(S - chunk * POSITIONS, POSITIONS)
    centred = tl.where(inside, x - mean, 0.0)
    part = (sample * C + channel) * tl.cdiv(S, POSITIONS) + chunk
    tl.store(part_mean_ptr + part, mean, mask=channel < C)
    tl.store(part_squares_ptr + part, tl.sum(centred * centred, axis=1, keep_dims=True), mask=channel < C)


@triton.jit(do_not_specialize=["parts"])
def _combine_statistics_kernel(
    part_mean_ptr,  # [N G, parts]
    part_squares_ptr,  # [N G, parts]
    mean_ptr,  # [N G]
    rstd_ptr,  # [N G]
    parts,  # of a group: its channels times the chunks
    S,
    eps,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(S, POSITIONS)
    elements = (parts // chunks).to(tl.float32) * S
    # Around the first part's mean, so that a large one is not rounded once for each part.
    pivot = tl.load(part_mean_ptr + group * parts)
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(S - part % chunks * POSITIONS, POSITIONS)
        part_mean = tl.load(part_mean_ptr + group * parts + part, mask=part < parts, other=0.0)
        total += tl.where(part < parts, count * (part_mean - pivot), 0.0)
    mean = pivot + tl.sum(total, axis=0) / elements
    squares = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(S - part % chunks * POSITIONS, POSITIONS)
        part_mean = tl.load(part_mean_ptr + group * parts + part, mask=part < parts, other=0.0)
        part_squares = tl.load(part_squares_ptr + group * parts + part, mask=part < parts, other=0.0)
        between = part_mean - mean
        squares += tl.where(part < parts, part_squares + count * between * between, 0.0)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, tl.rsqrt(tl.sum(squares, axis=0) / elements + eps))


@triton.jit(do_not_specialize=["group_size"])
def _normalise_kernel(
    x_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    out_ptr,  # [N, C, S]
    C,
    S,
    channel_stride,
    position_stride,
    group_size,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    sample, channel, _, offset, inside = _tile(C, S, channel_stride, position_stride, CHANNELS, POSITIONS)
    h, _ = _normalised(x_ptr + offset, inside, mean_ptr, rstd_ptr, sample, channel, C, group_size)
    z = h * _frozen(weight_ptr, channel, C, 1.0) + _frozen(bias_ptr, channel, C, 0.0)
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(out_ptr + offset, z, mask=inside)


@triton.jit(do_not_specialize=["group_size"])
def _sums_kernel(
    grad_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    part_sum_ptr,  # [N, C, chunks] of g
    part_along_ptr,  # [N, C, chunks] of g h
    C,
    S,
    channel_stride,
    position_stride,
    group_size,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    sample, channel, chunk, offset, inside = _tile(C, S, channel_stride, position_stride, CHANNELS, POSITIONS)
    h, _ = _normalised(x_ptr + offset, inside, mean_ptr, rstd_ptr, sample, channel, C, group_size)
    g = _before_silu(grad_ptr + offset, inside, h, weight_ptr, bias_ptr, channel, C, SILU)
    part = (sample * C + channel) * tl.cdiv(S, POSITIONS) + chunk
    tl.store(part_sum_ptr + part, tl.sum(g, axis=1, keep_dims=True), mask=channel < C)
    tl.store(part_along_ptr + part, tl.sum(g * h, axis=1, keep_dims=True), mask=channel < C)


@triton.jit(do_not_specialize=["parts"])
def _combine_sums_kernel(
    part_sum_ptr,  # [N G, parts]
    part_along_ptr,  # [N G, parts]
    sum_ptr,  # [N G]
    along_ptr,  # [N G]
    parts,
    PARTS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    total = tl.zeros([PARTS], tl.float32)
    along = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(part_sum_ptr + group * parts + part, mask=part < parts, other=0.0)
        along += tl.load(part_along_ptr + group * parts + part, mask=part < parts, other=0.0)
    tl.store(sum_ptr + group, tl.sum(total, axis=0))
    tl.store(along_ptr + group, tl.sum(along, axis=0))


@triton.jit(do_not_specialize=["group_size"])
def _gradient_kernel(
    grad_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    sum_ptr,  # [N, G] of g
    along_ptr,  # [N, G] of g h
    out_ptr,  # [N, C, S]
    C,
    S,
    channel_stride,
    position_stride,
    group_size,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    sample, channel, _, offset, inside = _tile(C, S, channel_stride, position_stride, CHANNELS, POSITIONS)
    h, rstd = _normalised(x_ptr + offset, inside, mean_ptr, rstd_ptr, sample, channel, C, group_size)
    g = _before_silu(grad_ptr + offset, inside, h, weight_ptr, bias_ptr, channel, C, SILU)
    group = sample * (C // group_size) + channel // group_size
    elements = group_size.to(tl.float32) * S
    total = tl.load(sum_ptr + group, mask=channel < C, other=0.0) / elements
    along = tl.load(along_ptr + group, mask=channel < C, other=0.0) / elements
    tl.store(out_ptr + offset, rstd * (g - total - h * along), mask=inside)


@triton.jit
def _tile(C, S, channel_stride, position_stride, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """This program's sample, channels `[CHANNELS, 1]` and chunk of positions; its elements' offsets and mask."""
    blocks = tl.cdiv(C, CHANNELS)
    chunks = tl.cdiv(S, POSITIONS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    chunk = tl.program_id(0) // blocks % chunks
    sample = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    position = chunk * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    offset = channel.to(tl.int64) * channel_stride + position.to(tl.int64) * position_stride
    return sample, channel, chunk, sample * C * S + offset, (channel < C) & (position < S)


@triton.jit
def _normalised(x_at, inside, mean_ptr, rstd_ptr, sample, channel, C, group_size):
    """h and rstd."""
    group = sample * (C // group_size) + channel // group_size
    mean = tl.load(mean_ptr + group, mask=channel < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=channel < C, other=0.0)
    return (tl.load(x_at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd, rstd


@triton.jit
def _before_silu(grad_at, inside, h, weight_ptr, bias_ptr, channel, C, SILU: tl.constexpr):
    """g, which is 0 outside."""
    weight = _frozen(weight_ptr, channel, C, 1.0)
    g = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32) * weight
    if SILU:
        z = h * weight + _frozen(bias_ptr, channel, C, 0.0)
        share = tl.sigmoid(z)
        g *= share * (1.0 + z * (1.0 - share))
    return g


@triton.jit
def _frozen(pointer, channel, C, DEFAULT: tl.constexpr):
    value = tl.full(channel.shape, DEFAULT, tl.float32)
    if pointer is not None:
        value = tl.load(pointer + channel, mask=channel < C, other=DEFAULT).to(tl.float32)
    return value


class Launch(NamedTuple):
    channels: int
    positions: int
    warps: int


# By whether the channels come last.  The more positions, the fewer parts to combine, at 8 bytes each.
TILE = {False: Launch(16, 512, warps=8), True: Launch(64, 128, warps=8)}
PARTS = 1024  # that a program combines at once


def group_norm_silu(x, num_groups: int, weight, bias, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream; arguments as in `dti_fast.ops`' `group_norm_silu`, already checked."""
    x = x.contiguous(memory_format=memory_format(x))
    out = torch.empty_like(x)
    mean, rstd = _numbers(x, x.shape[0], num_groups)
    if x.numel() == 0:
        return out, mean, rstd
    sizes, chunks, grid, options = _launch(x)
    weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    group_size = x.shape[1] // num_groups
    parts = _numbers(x, *x.shape[:2], chunks)
    _statistics_kernel[grid](x, *parts, *sizes, **options)
    _combine_statistics_kernel[(mean.numel(),)](
        *parts, mean, rstd, group_size * chunks, sizes[1], eps,
        POSITIONS=options["POSITIONS"], PARTS=PARTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _normalise_kernel[grid](x, mean, rstd, weight, bias, out, *sizes, group_size, SILU=silu, **options)
    return out, mean, rstd


def group_norm_silu_backward(grad, x, mean, rstd, weight, bias, silu: bool) -> Tensor:
    """Launch on the current stream; arguments as in `dti_fast.ops`' `group_norm_silu_backward`, already checked."""
    grad, x = (tensor.contiguous(memory_format=memory_format(x)) for tensor in (grad, x))
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    sizes, chunks, grid, options = _launch(x)
    saved = [None if tensor is None else tensor.contiguous() for tensor in (mean, rstd, weight, bias)]
    group_size = x.shape[1] // mean.shape[1]
    parts = _numbers(x, *x.shape[:2], chunks)
    _sums_kernel[grid](grad, x, *saved, *parts, *sizes, group_size, SILU=silu, **options)
    sums = _numbers(x, *mean.shape)
    _combine_sums_kernel[(mean.numel(),)](
        *parts, *sums, group_size * chunks, PARTS=PARTS, num_warps=4, enable_fp_fusion=True
    )
    _gradient_kernel[grid](grad, x, *saved, *sums, out, *sizes, group_size, SILU=silu, **options)
    return out


def _launch(x: Tensor) -> tuple[tuple[int, int, int, int], int, tuple[int], dict]:
    """C, S and the strides of channels and positions; chunks of positions; grid and options of the tiled kernels."""
    N, C, S = *x.shape[:2], x.shape[2:].numel()
    last = memory_format(x) != torch.contiguous_format
    tile = TILE[last]
    chunks = triton.cdiv(S, tile.positions)
    options = {"CHANNELS": tile.channels, "POSITIONS": tile.positions, "num_warps": tile.warps}
    grid = (N * triton.cdiv(C, tile.channels) * chunks,)
    return (C, S, 1, C) if last else (C, S, S, 1), chunks, grid, options | {"enable_fp_fusion": True}


def _numbers(x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    first, second = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    return first, second


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches on meta tensors for `dti_fast.kernels._aot`, by name."""
    # One kernel serves every size: in SD 1.5 and SDXL channels and positions are multiples of 16.
    for layout, dtype, silu in (
        ("NCHW", torch.float32, True),
        ("NCHW", torch.bfloat16, True),
        ("NCHW", torch.bfloat16, False),
        ("NHWC", torch.float32, True),
        ("NHWC", torch.bfloat16, True),
    ):
        name = f"{layout}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}{', SiLU' if silu else ''}"
        memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        x = torch.empty(1, 320, 128, 128, dtype=dtype, device="meta", memory_format=memory)
        weight = torch.empty(320, dtype=dtype, device="meta")
        mean = torch.empty(1, 32, device="meta")
        yield f"forward {name}", lambda x=x, w=weight, s=silu: group_norm_silu(x, 32, w, w, 1e-5, s)
        yield (
            f"backward {name}",
            lambda x=x, w=weight, m=mean, s=silu: group_norm_silu_backward(x, x, m, m, w, w, s),
        )
