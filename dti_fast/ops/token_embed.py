"""`token_embed`: prompt ids to input embeddings, the learned directions among them, in one pass."""

import torch
from torch import Tensor

from dti_fast.reference import token_embed as reference

_library = torch.library.Library("dti_fast", "FRAGMENT")
_library.define(
    "token_embed(Tensor ids, Tensor vocabulary, Tensor directions, Tensor magnitudes, int first_id) -> Tensor"
)
_library.define("token_embed_backward(Tensor grad, Tensor ids, Tensor magnitudes, int first_id) -> Tensor")


def _check(ids, vocabulary, directions, magnitudes, first_id) -> None:
    torch._check(ids.dtype == torch.int64, lambda: f"ids must be int64, got {ids.dtype}")
    torch._check(vocabulary.dim() == 2, lambda: f"vocabulary must be [V, D], got {list(vocabulary.shape)}")
    torch._check(
        vocabulary.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"vocabulary must be float32, bfloat16 or float16, got {vocabulary.dtype}",
    )
    torch._check(
        directions.dim() == 2 and directions.shape[1] == vocabulary.shape[1] and directions.dtype == torch.float32,
        lambda: f"directions must be float32 [K, {vocabulary.shape[1]}], got {_say(directions)}",
    )
    _check_magnitudes(magnitudes)
    torch._check(
        magnitudes.shape[0] == directions.shape[0],
        lambda: f"{directions.shape[0]} directions need as many magnitudes, got {magnitudes.shape[0]}",
    )


def _check_magnitudes(magnitudes) -> None:
    torch._check(
        magnitudes.dim() == 2 and magnitudes.shape[1] == 1 and magnitudes.dtype == torch.float32,
        lambda: f"magnitudes must be float32 [K, 1], got {_say(magnitudes)}",
    )


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _fake(ids, vocabulary, directions, magnitudes, first_id):
    _check(ids, vocabulary, directions, magnitudes, first_id)
    return vocabulary.new_empty((*ids.shape, vocabulary.shape[1]))


def _fake_backward(grad, ids, magnitudes, first_id):
    _check_magnitudes(magnitudes)
    return magnitudes.new_empty((magnitudes.shape[0], grad.shape[-1]))


def _reference(ids, vocabulary, directions, magnitudes, first_id):
    _check(ids, vocabulary, directions, magnitudes, first_id)
    return reference.token_embed(ids, vocabulary, directions, magnitudes, first_id)


def _save(ctx, inputs, output) -> None:
    ids, _, _, magnitudes, ctx.first_id = inputs
    ctx.save_for_backward(ids, magnitudes)


def _backward(ctx, grad):
    ids, magnitudes = ctx.saved_tensors
    grad = torch.ops.dti_fast.token_embed_backward(grad, ids, magnitudes, ctx.first_id)
    return None, None, grad, None, None


_library.impl("token_embed", _reference, "CompositeExplicitAutograd")
_library.impl("token_embed_backward", reference.token_embed_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dti_fast::token_embed", _fake, lib=_library)
torch.library.register_fake("dti_fast::token_embed_backward", _fake_backward, lib=_library)
torch.library.register_autograd("dti_fast::token_embed", _backward, setup_context=_save, lib=_library)


def token_embed(ids: Tensor, vocabulary: Tensor, directions: Tensor, magnitudes: Tensor, first_id: int) -> Tensor:
    """Input embeddings of prompts that mix frozen words with learned directions; nothing waits for the device.

    Args:
        ids: int64 `[...]`, usually `[B, S]`.
        vocabulary: float32, bfloat16 or float16 `[V, D]`; frozen, never copied, gets no gradient.
        directions: float32 `[K, D]`; the one input with a gradient, float32 `[K, D]`, summed over the
            positions in a fixed order, so that it repeats bit for bit.
        magnitudes: float32 `[K, 1]`; frozen.
        first_id: id of the first direction.  Ids `first_id .. first_id + K - 1` may lie beyond the vocabulary
            or replace rows of it.

    Returns:
        `[..., D]` in the vocabulary's dtype: `magnitudes[k] * directions[k]`, computed in float32, for a learned
        id and the vocabulary's row for any other.  An id that is neither gives a row of NaN.

    Raises:
        RuntimeError: for a shape or dtype other than these.
    """
    return torch.ops.dti_fast.token_embed(ids, vocabulary, directions, magnitudes, first_id)
