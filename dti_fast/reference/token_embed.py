"""Input embeddings of a prompt whose last few ids are learned directions and whose other ids are frozen.

Letters: V vocabulary rows, K learned vectors, D dimensions, `...` the shape of the ids (usually batch, sequence).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_embed(
    ids: Tensor,  # [...] int64
    vocabulary: Tensor,  # [V, D] frozen
    directions: Tensor,  # [K, D]
    magnitudes: Tensor,  # [K, 1]
    first_id: int,  # ids first_id .. first_id + K - 1 are the learned ones, inside the vocabulary or beyond it
) -> Tensor:
    """The embeddings `[..., D]` in the vocabulary's dtype.

    k      = id - first_id
    out[i] = magnitudes[k] directions[k]    for 0 <= k < K
             vocabulary[id]                 for another id below V
             NaN                            for any id that is neither
    """
    slot, learned = _slots(ids, len(directions), first_id)
    vectors = (magnitudes * directions).to(vocabulary.dtype)
    known = (ids >= 0) & (ids < len(vocabulary))
    frozen = F.embedding(ids.clamp(0, len(vocabulary) - 1), vocabulary)
    frozen = frozen.masked_fill(~known.unsqueeze(-1), torch.nan)
    return torch.where(learned.unsqueeze(-1), F.embedding(slot.clamp(0, len(directions) - 1), vectors), frozen)


def token_embed_backward(
    grad: Tensor,  # [..., D] gradient with respect to the embeddings
    ids: Tensor,  # [...] int64
    magnitudes: Tensor,  # [K, 1]
    first_id: int,
) -> Tensor:
    """Gradient with respect to the directions `[K, D]`, in the magnitudes' dtype, summed in the order of the positions.

    d directions[k] = magnitudes[k] sum over positions i with id = first_id + k of grad[i]
    """
    count = len(magnitudes)
    slot, learned = _slots(ids, count, first_id)
    # Every other position falls into the extra row, which the sum leaves out: NaN there stays there.
    slot = torch.where(learned, slot, count)
    sums = torch.ops.aten.embedding_dense_backward(grad.to(magnitudes.dtype), slot, count + 1, count, False)
    return magnitudes * sums[:count]


def _slots(ids: Tensor, count: int, first_id: int) -> tuple[Tensor, Tensor]:
    slot = ids - first_id
    return slot, (slot >= 0) & (slot < count)
