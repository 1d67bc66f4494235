"""Prompt ids to input embeddings in one pass, and the gradient with respect to the learned directions.

    k      = id - first_id
    out[i] = magnitudes[k] directions[k] for 0 <= k < K, vocabulary[id] for another id below V, else NaN
    d directions[k] = magnitudes[k] sum over positions i with id = first_id + k of grad[i]

Shapes: ids `[N]`, vocabulary `[V, D]`, directions `[K, D]`, magnitudes `[K, 1]`, out and grad `[N, D]`.  For each of B
samples their own: directions and their gradient `[B, K, D]`, a sample being N / B positions.
Dtypes: ids int64; vocabulary, out and grad float32, bfloat16 or float16; the rest float32; arithmetic float32.
Launch: forward one program a position; backward one program for `COLUMNS` columns of one direction, which reads all
ids, or those of its sample, and adds the rows of its own in a fixed order.
Bytes: forward one row in and one row out a position, the least possible; backward one row in for each position of a
learned id and `[K, D]` out, besides `8 N` for the ids, read by every program.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _token_embed_kernel(
    ids_ptr,  # [N]
    vocabulary_ptr,  # [V, D]
    directions_ptr,  # [K, D] or [B, K, D]
    magnitudes_ptr,  # [K, 1]
    out_ptr,  # [N, D] contiguous
    vocabulary_row,  # strides, in elements
    vocabulary_column,
    directions_sample,  # 0 without samples
    directions_row,
    directions_column,
    magnitudes_row,
    first_id,
    S,  # positions of a sample
    V,
    K,
    D,
    COLUMNS: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    inside = column < D
    # Blocks from here on, because Triton's interpreter loses the type of a compared scalar.
    token = tl.load(ids_ptr + position) + tl.zeros([COLUMNS], tl.int64)
    k = token - first_id
    # Masks and not branches: of the two rows only the one that is meant is read.
    learned = inside & (k >= 0) & (k < K)
    known = inside & (token >= 0) & (token < V) & ~learned
    magnitude = tl.load(magnitudes_ptr + k * magnitudes_row, mask=learned, other=0.0)
    own = directions_ptr + position // S * directions_sample
    direction = tl.load(own + k * directions_row + column * directions_column, mask=learned, other=0.0)
    word = tl.load(vocabulary_ptr + token * vocabulary_row + column * vocabulary_column, mask=known, other=float("nan"))
    row = tl.where(learned, (magnitude * direction).to(word.dtype), word)
    tl.store(out_ptr + position * D + column, row, mask=inside)


@triton.jit
def _token_embed_backward_kernel(
    grad_ptr,  # [N, D] contiguous
    ids_ptr,  # [N]
    magnitudes_ptr,  # [K, 1]
    out_ptr,  # [K, D] or [B, K, D] contiguous
    magnitudes_row,
    first_id,
    S,  # positions of a sample, or all
    K,
    D,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = row % K
    first = row // K * S
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    total = tl.zeros([POSITIONS, COLUMNS], tl.float32)
    for start in range(0, S, POSITIONS):
        position = start + tl.arange(0, POSITIONS)[:, None]  # [POSITIONS, 1]
        token = tl.load(ids_ptr + first + position, mask=position < S, other=first_id - 1)
        mine = (token == first_id + k) & (column < D)
        total += tl.load(grad_ptr + (first + position) * D + column, mask=mine, other=0.0).to(tl.float32)
    gradient = tl.load(magnitudes_ptr + k * magnitudes_row) * tl.sum(total, axis=0, keep_dims=True)
    tl.store(out_ptr + row * D + column, gradient, mask=column < D)


def token_embed(ids, vocabulary, directions, magnitudes, first_id: int) -> Tensor:
    """Launch on the current stream; arguments as in `dti_fast.ops.token_embed`, already checked."""
    V, D = vocabulary.shape
    out = torch.empty((*ids.shape, D), dtype=vocabulary.dtype, device=vocabulary.device)
    if out.numel() == 0:
        return out
    columns = triton.next_power_of_2(D)
    _token_embed_kernel[(ids.numel(),)](
        ids.reshape(-1), vocabulary, directions, magnitudes, out,
        *vocabulary.stride(), *(0, *directions.stride())[-3:], magnitudes.stride(0),
        first_id, ids[0].numel() if directions.dim() == 3 else ids.numel(), V, magnitudes.shape[0], D,
        COLUMNS=columns, num_warps=min(max(columns // 256, 1), 8), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def token_embed_backward(grad, ids, magnitudes, first_id: int, per_sample: bool = False) -> Tensor:
    """Launch on the current stream; arguments as in `dti_fast.ops`' `token_embed_backward`, already checked."""
    K, D = magnitudes.shape[0], grad.shape[-1]
    out = torch.empty((*ids.shape[: int(per_sample)], K, D), dtype=torch.float32, device=grad.device)
    if out.numel() == 0:
        return out
    B = ids.shape[0] if per_sample else 1
    columns = min(triton.next_power_of_2(D), 128)
    _token_embed_backward_kernel[(B * K, triton.cdiv(D, columns))](
        grad.reshape(-1, D).contiguous(), ids.reshape(-1), magnitudes, out,
        magnitudes.stride(0), first_id, ids.numel() // B, K, D,
        POSITIONS=32, COLUMNS=columns, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def aot_cases() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Launches on meta tensors for `dti_fast.kernels._aot`, by name."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    V, K = 49408, 4
    ids, magnitudes = empty(4, 77, dtype=torch.int64), empty(K, 1)
    for D in (768, 1280, 2048, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"B=4 S=77 D={D}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            vocabulary, directions, grad = empty(V, D, dtype=dtype), empty(K, D), empty(4, 77, D, dtype=dtype)
            yield f"forward {name}", lambda v=vocabulary, d=directions: token_embed(ids, v, d, magnitudes, V)
            yield f"backward {name}", lambda g=grad: token_embed_backward(g, ids, magnitudes, V)
        samples, grad = empty(1, K, D).expand(4, K, D), empty(4, 77, D, dtype=torch.bfloat16)
        yield f"forward {name}, per sample", lambda v=vocabulary, d=samples: token_embed(ids, v, d, magnitudes, V)
        yield f"backward {name}, per sample", lambda g=grad: token_embed_backward(g, ids, magnitudes, V, True)
