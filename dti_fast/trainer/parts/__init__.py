"""What learns in a run: parameters with an optimizer each, and all of them under one loss scaler."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Trainable:
    """Parameters, under the names that checkpoints give them, and the optimizer that moves them.

    The optimizer leaves everything as it is while its `found_inf` is non-zero, and never waits for the device (but
    see `Ancillary`).
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of one parameter."""
        return dict(self.optimizer.state[p])

    def load_state_of(self, p: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_of` gave."""
        self.optimizer.state[p] = {key: value.to(p.device) for key, value in tensors.items()}


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one to a loss scaler: an overflow in the gradients of any skips the update of all."""

    _step_supports_amp_scaling = True

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.found_inf = getattr(self, "found_inf", None)
            optimizer.grad_scale = getattr(self, "grad_scale", None)
            optimizer.step()
