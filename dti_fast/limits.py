"""The range of every setting, whichever command takes it."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dti_fast.errors import UserError


class Limit(NamedTuple):
    """What a number must be, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


def _at_least(low: int) -> Limit:
    return Limit(f"must be at least {low}", lambda value: value >= low)


_POSITIVE = Limit("must be positive", lambda value: value > 0)
_NOT_NEGATIVE = Limit("must not be negative", lambda value: value >= 0)
_SEED = Limit("must lie in [0, 2147483648)", lambda value: 0 <= value < 2**31)
_DECAY = Limit("must lie in [0, 1)", lambda value: 0 <= value < 1)
# Latents are an eighth of the picture; below 4 of them a side there is nothing for a denoiser to halve.
_SIDE = Limit("must be a multiple of 8 and at least 32", lambda value: value >= 32 and value % 8 == 0)

LIMITS = {
    # pictures and models
    "resolution": _SIDE,
    "vram": _POSITIVE,
    # training
    "train_batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "max_train_steps": _at_least(1),
    "learning_rate": _NOT_NEGATIVE,
    "lr_warmup_steps": _NOT_NEGATIVE,
    "seed": _SEED,
    # the method
    "num_vectors": _at_least(1),
    "magnitude": _POSITIVE,
    "kappa": _NOT_NEGATIVE,
    "beta": _DECAY,
    "momentum": _DECAY,
    "adam_weight_decay": _NOT_NEGATIVE,
    "reg_lambda": _NOT_NEGATIVE,
    # what learns beside the embedding
    "lora_rank": _NOT_NEGATIVE,
    "lora_alpha": _POSITIVE,
    "lora_learning_rate": _NOT_NEGATIVE,
    "lora_start_step": _at_least(1),
    "dco_beta": _NOT_NEGATIVE,
    "magnitude_learning_rate": _NOT_NEGATIVE,
    "magnitude_prior": _NOT_NEGATIVE,
    # output
    "checkpointing_steps": _at_least(1),
    "checkpoints_total_limit": _at_least(1),
    "save_steps": _at_least(1),
    "logging_steps": _at_least(1),
    "validation_steps": _at_least(1),
    "num_validation_images": _NOT_NEGATIVE,
    # drawing and measuring
    "num_images": _at_least(1),
    "num_inference_steps": Limit("must lie between 1 and 1000", lambda value: 1 <= value <= 1000),
    "guidance_scale": _NOT_NEGATIVE,
    "batch_size": _at_least(1),
    "seeds": _SEED,
    "steps": _at_least(2),
    "save": Limit("must lie between 0 and 1", lambda value: 0 <= value <= 1),
    "renorm": _POSITIVE,
}


def check_limits(settings: Mapping[str, object]) -> None:
    """Raise a UserError for the first number in `settings` that is not finite or breaks its limit.

    Values that are no numbers pass; of a list every number is checked.
    """
    for name, setting in settings.items():
        for value in setting if isinstance(setting, list | tuple) else [setting]:
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if not math.isfinite(value):
                raise UserError(f"--{name} must be a finite number, got {value}")
            if name in LIMITS and not LIMITS[name].holds(value):
                raise UserError(f"--{name} {LIMITS[name].words}, got {value}")
