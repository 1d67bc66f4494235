"""The parts of a diffusers pipeline: what they are called, and models made from configurations alone."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dti_fast.errors import UserError


@dataclass(frozen=True)
class ComponentNames:
    """What a pipeline calls its parts."""

    denoiser: str
    text_encoders: list[str]
    tokenizers: list[str]


def component_names(components: Mapping) -> ComponentNames:
    """The parts among the components of a pipeline, or those that model_index.json names; absent ones are left out.

    Raises:
        UserError: if there is no denoiser or no text encoder.
    """
    there = {name for name, value in components.items() if value is not None and value != [None, None]}
    denoiser = next((name for name in ("transformer", "unet") if name in there), None)
    suffixes = [suffix for suffix in ("", "_2", "_3") if f"text_encoder{suffix}" in there]
    if denoiser is None or not suffixes:
        raise UserError("this pipeline has no denoiser with a text encoder, so there is nothing to train")
    return ComponentNames(denoiser, [f"text_encoder{s}" for s in suffixes], [f"tokenizer{s}" for s in suffixes])


def build_model(folder: str | Path, part: str, index: tuple[str, str]) -> nn.Module:
    """A model of a diffusers folder from its configuration alone, in torch's default dtype.

    Args:
        folder: a folder or hub id.
        part: the subfolder.
        index: library and class, as model_index.json names them.
    """
    model_class = class_of(*index)
    if index[0] == "diffusers":
        return model_class.from_config(model_class.load_config(folder, subfolder=part))
    config = model_class.config_class.from_pretrained(folder, subfolder=part)
    config.dtype = torch.get_default_dtype()  # transformers builds some parts in the dtype that the file names
    return model_class(config)


def class_of(library: str, name: str):
    """The class that model_index.json names."""
    return getattr(importlib.import_module(library), name)
