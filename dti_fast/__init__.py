"""dti-fast: teach a text-to-image model a new concept as a direction.

Importing this costs torch alone; whatever needs diffusers or transformers is imported when it is used.
"""

import importlib

from dti_fast import ops, sphere
from dti_fast.ops import backends
from dti_fast.optim import DirectionSGD, SphericalAdam, SphericalSGD
from dti_fast.tokens import TokenEmbedding

__version__ = "0.1.0"

_LAZY = {
    "load_embedding": "dti_fast.pipelines",
    "optimize_frozen": "dti_fast.frozen",
    "restore": "dti_fast.frozen",
    "Session": "dti_fast.session",
    "train": "dti_fast.session",
    "TrainConfig": "dti_fast.trainer.config",
}

__all__ = [
    "DirectionSGD", "SphericalAdam", "SphericalSGD", "TokenEmbedding", "load_embedding", "ops", "optimize_frozen",
    "restore", "Session", "sphere", "train", "TrainConfig", "backends",
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dti_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
