"""The libraries that csrc/ is built into: whether they can serve a device, and loading them."""

from functools import cache

import torch

from dti_fast.ops import _build


def obstacle(device: str, *, build: bool) -> str | None:
    """Why the native kernels cannot serve `device`, or None; `build` allows compiling what is missing."""
    if device not in _build.PARTS:
        return f"csrc/ has no kernels for {device}"
    if device == "cuda" and torch.version.cuda is None:
        return "this torch is not a CUDA build"
    try:
        for part in _build.PARTS[device]:
            if _build.find(part) is not None:
                continue
            if failure := _build.failure(part):
                return f"its build failed (python -m dti_fast.ops._build tries again): {failure}"
            if not build:
                return "not built (python -m dti_fast.ops._build)"
            _build.build(part)
    except _build.BuildError as error:
        return str(error)
    return None


@cache
def load(device: str) -> None:
    """Register the kernels of `device`, which are built, under `torch.ops.dti_fast_C`."""
    for part in _build.PARTS[device]:
        torch.ops.load_library(str(_build.find(part)))
