"""Input embeddings of a prompt whose last few ids are learned directions and whose other ids are frozen.

Letters: V vocabulary rows, K learned vectors, D dimensions, `...` the shape of the ids (usually batch, sequence), B the
first number of that shape, the samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_embed(
    ids: Tensor,  # [...] int64
    vocabulary: Tensor,  # [V, D] frozen
    directions: Tensor,  # [K, D], or [B, K, D]: each sample's own
    magnitudes: Tensor,  # [K, 1]
    first_id: int,  # ids first_id .. first_id + K - 1 are the learned ones, inside the vocabulary or beyond it
) -> Tensor:
    """The embeddings `[..., D]` in the vocabulary's dtype.

    k      = id - first_id
    out[i] = magnitudes[k] directions[k]    for 0 <= k < K
             vocabulary[id]                 for another id below V
             NaN                            for any id that is neither
    """
    count = len(magnitudes)
    slot, learned = _slots(ids, count, first_id)
    vectors = (magnitudes * directions).to(vocabulary.dtype).flatten(0, -2)
    known = (ids >= 0) & (ids < len(vocabulary))
    frozen = F.embedding(ids.clamp(0, len(vocabulary) - 1), vocabulary)
    frozen = frozen.masked_fill(~known.unsqueeze(-1), torch.nan)
    slot = slot.clamp(0, count - 1)
    if directions.dim() == 3:
        slot = slot + count * _samples(ids)
    return torch.where(learned.unsqueeze(-1), F.embedding(slot, vectors), frozen)


def token_embed_backward(
    grad: Tensor,  # [..., D] gradient with respect to the embeddings
    ids: Tensor,  # [...] int64
    magnitudes: Tensor,  # [K, 1]
    first_id: int,
    per_sample: bool = False,
) -> Tensor:
    """Gradient with respect to the directions, in the magnitudes' dtype, summed in the order of the positions.

    d directions[k] = magnitudes[k] sum over positions i with id = first_id + k of grad[i]

    That is `[K, D]`, or with `per_sample` `[B, K, D]`, each over the positions of one sample.
    """
    count = len(magnitudes)
    slot, learned = _slots(ids, count, first_id)
    shape, rows = (count, grad.shape[-1]), count
    if per_sample:
        slot, shape, rows = slot + count * _samples(ids), (len(ids), *shape), count * len(ids)
    # Every other position falls into the extra row, which the sum leaves out: NaN there stays there.
    slot = torch.where(learned, slot, rows)
    sums = torch.ops.aten.embedding_dense_backward(grad.to(magnitudes.dtype), slot, rows + 1, rows, False)
    return magnitudes * sums[:rows].view(shape)


def _slots(ids: Tensor, count: int, first_id: int) -> tuple[Tensor, Tensor]:
    slot = ids - first_id
    return slot, (slot >= 0) & (slot < count)


def _samples(ids: Tensor) -> Tensor:
    """The number of each id's sample, as `[B, 1, ...]`."""
    return torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.dim() - 1))
