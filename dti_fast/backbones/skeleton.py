"""A backbone of the right shapes without weights: what counting needs."""

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dti_fast.backbones import Backbone
from dti_fast.backbones.components import build_model, class_of, component_names
from dti_fast.backbones.configs import CONFIGS, config_folder
from dti_fast.backbones.load import ALIASES, BUNDLED, check_model, family_of, identify
from dti_fast.errors import UserError
from dti_fast.quiet import quiet_libraries


@quiet_libraries()
def skeleton(name: str, dtype: torch.dtype) -> Backbone:
    """What `load_backbone` gives for `name`, its weights uninitialised; cheap only under `FakeTensorMode`.

    Of a model on the hub the configurations alone are fetched; those of `CONFIGS` come with the package.

    Raises:
        UserError: as `load_backbone`.
    """
    import diffusers

    folder = configurations(name)
    default_dtype = torch.get_default_dtype()
    try:
        index = diffusers.DiffusionPipeline.load_config(folder)
        family = family_of(index["_class_name"], name)
        names, parts = component_names(index), {}
        for part in (names.denoiser, "vae", *names.text_encoders):
            own = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            torch.set_default_dtype(own if part == "vae" else dtype)  # a fake module cannot be cast
            parts[part] = build_model(folder, part, index[part])
        with unset_fake_temporarily():
            for part in ("scheduler", *names.tokenizers):
                parts[part] = class_of(*index[part]).from_pretrained(folder, subfolder=part)
        pipeline_class = getattr(diffusers, index["_class_name"])
        absent = {part: None for part, value in index.items() if isinstance(value, list) and part not in parts}
        settings = {key: value for key, value in index.items() if not key.startswith("_") and key not in absent}
        pipeline = pipeline_class(**{**settings, **absent, **parts, **family.load_arguments})
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"the configuration of {name!r} cannot be read: {reason}") from error
    finally:
        torch.set_default_dtype(default_dtype)
    pipeline.set_progress_bar_config(disable=True)
    return family(pipeline)


def configurations(name: str) -> str:
    """A folder or hub id that holds the configurations of a model."""
    if name in BUNDLED:
        return str(BUNDLED[name].folder)
    shipped = {**{config: config for config in CONFIGS}, **{full: alias for alias, full in ALIASES.items()}}
    if name in shipped:
        return str(config_folder(shipped[name]))
    check_model(name)
    return str(config_folder(identify(Path(name)))) if Path(name).is_file() else name
