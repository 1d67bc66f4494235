"""A backbone of the right shapes without weights: what counting needs."""

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dti_fast.backbones import Backbone
from dti_fast.backbones.components import assemble, build_model, class_of, component_names, load_part, naming
from dti_fast.backbones.configs import CONFIGS, config_folder
from dti_fast.backbones.load import (
    ALIASES,
    BUNDLED,
    check_model,
    check_vocabularies,
    family_of,
    identify,
    index_of,
    locate,
)  # fmt: skip
from dti_fast.quiet import quiet_libraries


@quiet_libraries()
def skeleton(name: str, dtype: torch.dtype) -> Backbone:
    """What `load_backbone` gives for `name`, its weights uninitialised; cheap only under `FakeTensorMode`.

    Of a model on the hub the configurations alone are fetched; those of `CONFIGS` come with the package.

    Raises:
        UserError: as `load_backbone`.
    """
    folder = configurations(name)
    index = index_of(folder)
    family = family_of(index["_class_name"], name)
    names, parts = component_names(index), {}
    default_dtype = torch.get_default_dtype()
    try:
        for part in (names.denoiser, "vae", *names.text_encoders):
            own = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            torch.set_default_dtype(own if part == "vae" else dtype)  # a fake module cannot be cast
            with naming(part, folder):
                parts[part] = build_model(folder, part, index[part])
        with unset_fake_temporarily():
            for part in ("scheduler", *names.tokenizers):
                with naming(part, folder):
                    parts[part] = _without_weights(folder, part, index[part])
        with naming("pipeline", folder):
            pipeline = assemble(index, parts, family.load_arguments)
    finally:
        torch.set_default_dtype(default_dtype)
    backbone = family(pipeline)
    check_vocabularies(backbone, name)
    return backbone


def _without_weights(folder: str, part: str, index: tuple[str, str]):
    """A tokenizer or scheduler of a folder or hub id."""
    if Path(folder).is_dir():
        return load_part(Path(folder), part, index, torch.get_default_dtype())
    return class_of(*index).from_pretrained(folder, subfolder=part)


def configurations(name: str) -> str:
    """A folder or hub id that holds the configurations of a model."""
    if name in BUNDLED:
        return str(BUNDLED[name].folder)
    shipped = {**{config: config for config in CONFIGS}, **{full: alias for alias, full in ALIASES.items()}}
    if name in shipped:
        return str(config_folder(shipped[name]))
    check_model(name)
    return str(config_folder(identify(Path(name)))) if Path(name).is_file() else locate(name)
