"""Which device a run is on, and in which precision it computes there."""

import re

import torch

from dti_fast.errors import UserError

DEVICES = ("cuda", "xpu", "mps")  # in the order of preference


def pick_device(choice: str = "auto") -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N`, `mps` or `xpu`; `auto` is the first of `DEVICES` there is.

    Raises:
        UserError: if there is no such device here.
    """
    present = [kind for kind in DEVICES if getattr(torch, kind).is_available()]
    if choice == "auto":
        return torch.device(present[0] if present else "cpu")
    name = re.fullmatch(rf"(cpu|{'|'.join(DEVICES)})(?::([0-9]+))?", choice)
    if name is None:
        raise UserError(f"--device is auto, cpu, cuda, cuda:N, mps or xpu, got {choice!r}")
    kind, index = name.groups()
    count = 1 if kind == "cpu" else getattr(torch, kind).device_count() if kind in present else 0
    if int(index or 0) >= count:
        raise UserError(f"there is no device {choice!r} here; leave out --device to take the best there is")
    return torch.device(choice)


def pick_precision(choice: str, device: torch.device) -> torch.dtype:
    """The dtype for `auto`, `no`, `fp16` or `bf16`; `auto` is 16 bits on a CUDA or Intel GPU and float32 elsewhere."""
    if choice == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        return torch.bfloat16 if device.type == "xpu" else torch.float32
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice]


def precision_name(dtype: torch.dtype) -> str:
    """`dtype` as --mixed_precision names it."""
    return {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
