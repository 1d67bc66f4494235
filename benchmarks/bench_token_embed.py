"""`token_embed`, forward and backward, against eager PyTorch: `python -m benchmarks.bench_token_embed [--smoke]`."""

import torch
import torch.nn.functional as F

from benchmarks import _harness
from dti_fast.ops import token_embed

V, K, S = 49408, 4, 77


def cases(device: torch.device, smoke: bool):
    for B, D in ((4, 768),) if smoke else ((1, 768), (4, 768), (4, 1280), (16, 1280)):
        for dtype in (torch.float32, torch.bfloat16)[: 1 if smoke else 2]:
            yield case(B, D, dtype, device)


def case(B: int, D: int, dtype: torch.dtype, device: torch.device) -> _harness.Case:
    vocabulary = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    magnitudes = torch.full((K, 1), 0.4, device=device)

    def make(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, V, (B, S), generator=generator)
        ids[:, 5 : 5 + K] = torch.arange(V, V + K)
        directions = F.normalize(torch.randn(K, D, generator=generator)).to(device).requires_grad_()
        weight = torch.randn(B, S, D, generator=generator).to(device, dtype)
        return ids.to(device), directions, weight

    def op(ids, directions, weight):
        out = token_embed(ids, vocabulary, directions, magnitudes, V)
        return out.detach(), torch.autograd.grad(out, directions, weight)[0]

    def eager(ids, directions, weight):
        """As peers do it: look everything up, then put the learned vectors in their places."""
        learned = ids >= V
        out = F.embedding(ids.clamp(max=V - 1), vocabulary)
        vectors = F.embedding((ids - V).clamp(min=0), (magnitudes * directions).to(dtype))
        out = torch.where(learned.unsqueeze(-1), vectors, out)
        return out.detach(), torch.autograd.grad(out, directions, weight)[0]

    def error(call) -> tuple[float, float]:
        arguments = make(0)
        ids, _, weight = arguments
        exact = torch.stack([0.4 * weight[ids == V + k].double().sum(0) for k in range(K)])
        expected, plain = eager(*arguments)
        out, gradient = call(*arguments)
        if not torch.equal(out, expected):  # one product and one rounding: there is one answer
            return float("inf"), 0.0
        allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
        return (gradient - exact).abs().max().item(), allowed.item()

    return _harness.Case(
        name=f"B={B} S={S} D={D} {str(dtype).removeprefix('torch.')}",
        bytes=2 * B * S * D * dtype.itemsize + B * K * D * dtype.itemsize + K * D * 4,
        make=make,
        eager=eager,
        op=op,
        error=error,
    )


if __name__ == "__main__":
    _harness.run("token_embed", cases, {"cpu": ("native",), "cuda": ("triton", "native")})
