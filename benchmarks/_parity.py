"""The parity gate of layers that give an output and an input gradient."""

from collections.abc import Callable

import torch


def twice_eager(make: Callable[[int], tuple], eager: Callable) -> Callable[[Callable], tuple[float, float]]:
    """`Case.error` for calls that return tensors: at most twice the error of `eager`, both against it in float64.

    The error is the worst tensor's, as a share of what that tensor is allowed.
    """

    def error(call: Callable) -> tuple[float, float]:
        arguments = make(0)
        exact = eager(*(t.detach().double().requires_grad_(t.requires_grad) for t in arguments))
        shares = []
        for ours, plain, truth in zip(call(*arguments), eager(*arguments), exact, strict=True):
            allowed = 2 * (plain - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
            shares.append((ours - truth).abs().max() / allowed)
        return torch.stack(shares).max().item(), 1.0

    return error
