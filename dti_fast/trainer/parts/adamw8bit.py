"""AdamW with 8-bit states, by bitsandbytes, under the conventions of the training loop."""

import torch
from torch import Tensor

from dti_fast.quiet import without_remarks

with without_remarks():
    import bitsandbytes

MIN_8BIT_SIZE = 256  # bitsandbytes' own 4096 would leave most matrices of a rank-4 LoRA at 32 bits


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW8bit that skips an update exactly, and whose states exist from the start.

    Moments of a parameter with 256 elements or more are 8-bit numbers in blocks of 256 with a float32 scale each;
    smaller ones, such as the K magnitudes of an embedding, stay float32.

    As `torch.amp.GradScaler` does, the caller may set `grad_scale`, which divides the gradients, and `found_inf`:
    unless that is 0, nothing changes, not even the step count.  That count is an integer of the host, so here, once
    in a step, the host waits for the device to know `found_inf`.  In exchange the wait that bitsandbytes makes after
    each parameter is left out: its kernels and torch's run in order, as long as the current stream is the default one.

    Args:
        params: parameters or parameter groups, float32; `lr` is a number of the host.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr=lr, min_8bit_size=MIN_8BIT_SIZE)
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                self.init_state(group, p, g, i)

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise RuntimeError("AdamW8bit takes no closure")
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is not None and found_inf.item() != 0:
            return
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if grad_scale is not None:
                    p.grad.div_(grad_scale)
                self.update_step(group, p, g, i)

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """What training changes in the state of `p`: moments, their scales, and the step as a tensor."""
        state = self.state[p]
        return {"step": torch.tensor(state["step"])} | {
            name: state[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in state
        }

    def load_tensors(self, p: Tensor, stored: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        state = self.state[p]
        state["step"] = int(stored["step"])
        for name, tensor in stored.items():
            if name != "step":
                state[name].copy_(tensor)


def state_bytes(optimizer: AdamW8bit) -> tuple[int, int, int]:
    """Bytes of the optimizer's state: its 8-bit moments; all of it; and what torch's float32 AdamW would take.

    "All of it" includes the blocks' scales, and the two tables of 256 numbers, which all parameters share, once.
    """
    eight_bit, tables, rest, plain = 0, {}, 0, 0
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if value.dtype == torch.uint8:
                eight_bit += value.nbytes
            elif name.startswith("qmap"):
                tables[value.data_ptr()] = value.nbytes
            else:
                rest += value.nbytes
        plain += 2 * 4 * p.numel() + 4
    return eight_bit, eight_bit + rest + sum(tables.values()), plain
