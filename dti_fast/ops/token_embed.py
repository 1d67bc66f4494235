"""`token_embed`: prompt ids to input embeddings, the learned directions among them, in one pass."""

import torch
from torch import Tensor

from dti_fast.ops._dispatch import FLOATS, Operator, describe
from dti_fast.reference import token_embed as reference


def _check(ids, vocabulary, directions, magnitudes, first_id) -> None:
    if vocabulary.dim() != 2 or vocabulary.shape[0] == 0 or vocabulary.dtype not in FLOATS:
        raise RuntimeError(
            f"vocabulary must be float32, bfloat16, float16 or float64 [V, D], got {describe(vocabulary)}"
        )
    count, dim, device = magnitudes.shape[0], vocabulary.shape[1], vocabulary.device
    shapes = [(count, dim), *([(ids.shape[0], count, dim)] if ids.dim() else [])]
    if directions.shape not in shapes or directions.dtype != torch.float32 or directions.device != device:
        expected = " or ".join(str([*shape]) for shape in shapes)
        raise RuntimeError(f"directions must be float32 {expected} on {device}, got {describe(directions)}")
    _check_slots(ids, magnitudes, device)


def _check_backward(grad, ids, magnitudes, first_id, per_sample=False) -> None:
    if grad.shape[:-1] != ids.shape or grad.dtype not in FLOATS:
        raise RuntimeError(
            f"grad must be float32, bfloat16, float16 or float64 {[*ids.shape, 'D']}, got {describe(grad)}"
        )
    if per_sample and ids.dim() == 0:
        raise RuntimeError("a single id has no samples")
    _check_slots(ids, magnitudes, grad.device)


def _check_slots(ids, magnitudes, device) -> None:
    if ids.dtype != torch.int64 or ids.device != device:
        raise RuntimeError(f"ids must be int64 or int32 on {device}, got {describe(ids)}")
    count = magnitudes.shape[0]
    if magnitudes.shape != (count, 1) or count == 0 or magnitudes.dtype != torch.float32 or magnitudes.device != device:
        raise RuntimeError(f"magnitudes must be float32 [K, 1] on {device}, got {describe(magnitudes)}")


def _output(ids, vocabulary, directions, magnitudes, first_id) -> Tensor:
    return vocabulary.new_empty((*ids.shape, vocabulary.shape[1]))


def _output_backward(grad, ids, magnitudes, first_id, per_sample=False) -> Tensor:
    return magnitudes.new_empty((*ids.shape[: int(per_sample)], magnitudes.shape[0], grad.shape[-1]))


def _save(ctx, inputs, output) -> None:
    ids, _, directions, magnitudes, ctx.first_id = inputs
    ctx.per_sample = directions.dim() == 3
    ctx.save_for_backward(ids, magnitudes)


def _backward(ctx, grad):
    ids, magnitudes = ctx.saved_tensors
    grad = torch.ops.dti_fast.token_embed_backward(grad, ids, magnitudes, ctx.first_id, ctx.per_sample)
    return None, None, grad, None, None


Operator(
    "token_embed(Tensor ids, Tensor vocabulary, Tensor directions, Tensor magnitudes, int first_id) -> Tensor",
    stem="token_embed",
    check=_check,
    output=_output,
    reference=reference.token_embed,
    save=_save,
    backward=_backward,
)
Operator(
    "token_embed_backward(Tensor grad, Tensor ids, Tensor magnitudes, int first_id, bool per_sample=False) -> Tensor",
    stem="token_embed",
    check=_check_backward,
    output=_output_backward,
    reference=reference.token_embed_backward,
)


def token_embed(ids: Tensor, vocabulary: Tensor, directions: Tensor, magnitudes: Tensor, first_id: int) -> Tensor:
    """Input embeddings of prompts that mix frozen words with learned directions; nothing waits for the device.

    Args:
        ids: int64 or int32 `[...]`, usually `[B, S]`.
        vocabulary: float32, bfloat16, float16 or float64 `[V, D]`; frozen, never copied, gets no gradient.
        directions: float32 `[K, D]`; the one input with a gradient, float32 `[K, D]`, summed over the
            positions in a fixed order, so that it repeats bit for bit.  Or `[B, K, D]` with ids `[B, ...]`, each
            sample's own, in any strides; their gradient then is each sample's own too.
        magnitudes: float32 `[K, 1]`; frozen.
        first_id: id of the first direction.  Ids `first_id .. first_id + K - 1` may lie beyond the vocabulary
            or replace rows of it.

    Returns:
        `[..., D]` in the vocabulary's dtype: `magnitudes[k] * directions[k]`, computed in float32, for a learned
        id and the vocabulary's row for any other.  An id that is neither gives a row of NaN.

    Raises:
        RuntimeError: for a shape or dtype other than these.
    """
    ids = ids.long() if ids.dtype == torch.int32 else ids
    return torch.ops.dti_fast.token_embed(ids, vocabulary, directions, magnitudes, first_id)
