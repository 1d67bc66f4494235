"""From `--pretrained_model_name_or_path` to a backbone: a diffusers folder, a hub id, or one file."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from dti_fast.backbones import FAMILIES, Backbone
from dti_fast.backbones.configs import config_folder, identify_single_file
from dti_fast.backbones.pocket import Pocket
from dti_fast.backbones.quantised_cache import cached_file, read_quantised, write_quantised
from dti_fast.errors import UserError
from dti_fast.frozen.quantise import PRECISIONS, quantise_frozen
from dti_fast.quiet import quiet_libraries

ALIASES = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
BUNDLED = {Pocket.name: Pocket}


def source_of(name: str) -> str:
    """Where the model called `name` is: a folder, a file, or a hub id."""
    return str(BUNDLED[name].folder) if name in BUNDLED else ALIASES.get(name, name)


def check_model(name: str) -> None:
    """Raise a UserError if `name` plainly names no model; reads a few kB and imports nothing heavy."""
    path = Path(name)
    if name in (*BUNDLED, *ALIASES):
        return
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{name!r} is not a .safetensors file; pickled checkpoints are not read, convert it first")
        identify(path)
    elif path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise UserError(f"{name!r} is no diffusers pipeline: it has no model_index.json")
        try:
            family_of(json.loads(index.read_text(encoding="utf-8"))["_class_name"], name)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(index)!r} is damaged: {error}") from None
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"there is no model {name!r}: give a diffusers folder, a .safetensors file or a hub id")


@quiet_libraries()
def load_backbone(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    base_precision: str | None = None,
    quantised_cache: Path | None = None,
    prediction_type: str | None = None,
) -> Backbone:
    """Load a model straight in `dtype` onto `device`; its VAE in float32, or bfloat16 if `dtype` is.

    With `base_precision` "int8" or "nf4" the denoiser and the text encoders go to the device already quantised, layer
    by layer: on the device no more than the quantised model and one matrix in full, in main memory the model in
    `dtype`, or only the quantised one if `quantised_cache`, a folder, holds it already.

    `prediction_type`, `epsilon` or `v_prediction`, overrides the model's own: no single file says it.

    Raises:
        UserError: if the model cannot be found or is of a family that cannot be trained, or if bitsandbytes is missing.
    """
    check_model(name)
    quantise = base_precision in PRECISIONS
    import diffusers

    source = source_of(name)
    vae_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    cached, ready = None, {}
    try:
        single = Path(source).is_file()
        folder = str(config_folder(identify(Path(source)))) if single else source
        index = diffusers.DiffusionPipeline.load_config(folder)
        class_name = index["_class_name"]
        family = family_of(class_name, name)
        if quantise and quantised_cache:
            configs = Path(folder) if Path(folder).is_dir() else Path(diffusers.DiffusionPipeline.download(folder))
            cached = cached_file(quantised_cache, Path(source) if single else configs, base_precision, dtype)
            ready = read_quantised(cached, configs, base_precision) if cached.is_file() else {}
        if single:
            pipeline = getattr(diffusers, class_name).from_single_file(
                source, config=folder, local_files_only=True, dtype=dtype, **ready
            )
            pipeline.vae.to(vae_dtype)
        else:
            absent = {part: None for part, value in index.items() if value == [None, None]}
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source, dtype={"default": dtype, "vae": vae_dtype}, **{**absent, **family.load_arguments, **ready}
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"the model {name!r} cannot be loaded: {reason}") from error
    if prediction_type is not None:
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    backbone = family(pipeline)
    if quantise and not ready:
        for model in (backbone.denoiser, *backbone.text_encoders):
            quantise_frozen(model, base_precision, device)
        if cached:
            write_quantised(cached, pipeline)
    pipeline.to(device)
    return backbone


def family_of(class_name: str, name: str) -> type[Backbone]:
    """The family of the model `name`, whose pipeline is a `class_name`; UserError if there is none."""
    if name in BUNDLED:
        return BUNDLED[name]
    if class_name not in FAMILIES:
        raise UserError(f"{name!r} is a {class_name}; dti-fast trains {' and '.join(FAMILIES)}")
    return FAMILIES[class_name]


def identify(path: Path) -> str:
    """Which of `CONFIGS` a single file is of; UserError if none."""
    try:
        return identify_single_file(path)
    except ValueError as error:
        raise UserError(str(error)) from None
