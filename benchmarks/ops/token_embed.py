"""`token_embed`, forward and backward; `dtype` is the vocabulary's."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks._ops import Case, normal
from dti_fast.ops import token_embed
from dti_fast.reference import token_embed as reference

K, S = 4, 77
# Prompts and width, in the text encoders of SD 1.5 and SDXL.
SIZES = ((1, 768), (4, 768), (4, 1280), (16, 1280))
SMOKE = (4, 768)


def case(B: int, D: int, times: int = 1, V: int = 49408, *, dtype: torch.dtype, device: torch.device) -> Case:
    """Prompts that name each of the K directions `times` times."""
    (vocabulary,) = normal(0, dtype, device, (V, D))
    magnitudes = torch.full((K, 1), 0.4, device=device)

    def make(seed: int) -> tuple:
        directions, grad = normal(seed, torch.float32, device, (K, D), (B, S, D))
        ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(seed))
        ids[:, 5 : 5 + times * K] = torch.arange(V, V + K).repeat(times)
        return ids.to(device), F.normalize(directions).requires_grad_(), grad.to(dtype)

    def op(ids, directions, grad) -> tuple:
        out = token_embed(ids, vocabulary, directions, magnitudes, V)
        return out.detach(), torch.autograd.grad(out, directions, grad)[0]

    def eager(ids, directions, grad) -> tuple:
        """As peers do it: look everything up, then put the learned vectors in their places."""
        learned = ids >= V
        out = F.embedding(ids.clamp(max=V - 1), vocabulary)
        vectors = F.embedding((ids - V).clamp(min=0), (magnitudes * directions).to(dtype))
        out = torch.where(learned.unsqueeze(-1), vectors, out)
        return out.detach(), torch.autograd.grad(out, directions, grad)[0]

    def exact(ids, directions, grad) -> tuple:
        wide = [tensor.detach().double() for tensor in (vocabulary, directions, magnitudes, grad)]
        return reference.token_embed(ids, *wide[:3], V), reference.token_embed_backward(wide[3], ids, wide[2], V)

    size = (2 * B * S * D + times * B * K * D) * dtype.itemsize + K * D * 4
    return Case(f"B={B} S={S} D={D}", size, ("embeddings", "gradient"), make, op, eager, exact)


def error_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    yield case(2, 768, times=5, V=32, dtype=dtype, device=device)._replace(name="")
