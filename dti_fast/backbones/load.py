"""From `--pretrained_model_name_or_path` to a backbone: a diffusers folder, a hub id, or one file."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from dti_fast.backbones import FAMILIES, Backbone
from dti_fast.backbones.components import (
    assemble,
    component_names,
    load_part,
    naming,
    pick_variant,
    read_index,
    reason,
)  # fmt: skip
from dti_fast.backbones.configs import config_folder, identify_single_file, noise_settings
from dti_fast.backbones.pocket import Pocket
from dti_fast.backbones.quantised_cache import cached_file, read_quantised, write_quantised
from dti_fast.errors import UserError
from dti_fast.frozen.quantise import PRECISIONS, quantise_frozen
from dti_fast.quiet import quiet_libraries

ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
BUNDLED = {Pocket.name: Pocket}
PREDICTION_TYPES = ("epsilon", "v_prediction")
_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # neither ./model nor ../model
_FILES = (".safetensors", ".ckpt", ".pt", ".bin", ".pth")
_TIMEOUT = 5  # seconds for the hub to answer at all


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
        family_of(read_index(path)["_class_name"], name)
    elif not re.fullmatch(_HUB_ID, name) or path.suffix in _FILES:
        raise UserError(f"there is no model {name!r}: give a diffusers folder, a .safetensors file or a hub id")
    elif path.parent.is_dir() and cached_folder(name) is None:
        raise UserError(f"there is no model {name!r}: the folder {str(path.parent)!r} is here, without {path.name!r}")


def is_at_hand(name: str) -> bool:
    """Whether a model is on this machine, so that nothing is fetched to load it."""
    source = source_of(name)
    return Path(source).exists() or bool(re.fullmatch(_HUB_ID, source) and cached_folder(source))


def model_at_hand(name: str) -> str:
    """The model that an embedding file names; what a file says is no reason to go to the hub.

    Raises:
        UserError: if it is not on this machine.
    """
    if not is_at_hand(name):
        raise UserError(
            f"the embedding was learned on {name!r}, which is not on this machine: "
            "give the model with --pretrained_model_name_or_path"
        )
    source = source_of(name)
    return name if Path(source).exists() else str(cached_folder(source))


def cached_folder(hub_id: str) -> Path | None:
    """Where the hub's cache keeps a model, complete or not; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def locate(name: str) -> str:
    """The folder or file of a model, or its hub id if it is not on this machine and the hub answers.

    Raises:
        UserError: if it is not there and the hub does not answer.
    """
    import huggingface_hub

    source = source_of(name)
    if Path(source).exists():
        return source
    offline = huggingface_hub.is_offline_mode()
    if not offline:
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT)
            return source
        except Exception:  # of the library beneath, which differs between versions of the hub's
            pass
    cached = cached_folder(source)
    if cached is None:
        why = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer: is there a network?"
        raise UserError(f"the model {name!r} is not on this machine, and {why}")
    return str(cached)


def index_of(source: str) -> dict:
    """The model_index.json of a folder or hub id; UserError if there is none or it is damaged."""
    if Path(source).is_dir():
        return read_index(Path(source))
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(source, "model_index.json")).parent
    except Exception as error:  # of the library beneath
        raise UserError(f"the model {source!r} cannot be downloaded: {reason(error)}") from error
    return read_index(folder)


def fetch(source: str, index: Mapping, variant: str | None, parts: Collection[str]) -> tuple[Path, str | None]:
    """The folder of a model, downloaded if `source` is a hub id, and the variant of the weights that it has.

    Args:
        index: the model's model_index.json.
        parts: those that are needed.

    Raises:
        UserError: if a part has no weights.
    """
    from diffusers import DiffusionPipeline

    local = Path(source).is_dir()
    unneeded = {part: None for part, entry in index.items() if isinstance(entry, list) and part not in parts}
    names = component_names(index)
    models = [part for part in (names.denoiser, "vae", *names.text_encoders) if part in parts and part in index]
    for wanted in [variant] if local or variant else [None, "fp16"]:
        try:
            folder = source
            if not local:
                folder = DiffusionPipeline.download(source, variant=wanted, use_safetensors=True, **unneeded)
            return Path(folder), pick_variant(Path(folder), models, wanted)
        except UserError as error:
            failure = error
        except Exception as error:  # of the library beneath, and of diffusers for what is not there
            failure = UserError(f"the model {source!r} cannot be downloaded: {reason(error)}")
    raise failure


@quiet_libraries()
def load_backbone(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    base_precision: str | None = None,
    quantised_cache: Path | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
) -> Backbone:
    """Load a model straight in `dtype` onto `device`; its VAE in float32, or bfloat16 if `dtype` is.

    With `base_precision` "int8" or "nf4" the denoiser and the text encoders go to the device already quantised, layer
    by layer: on the device no more than the quantised model and one matrix in full, in main memory the model in
    `dtype`, or only the quantised one if `quantised_cache`, a folder, holds it already.

    `prediction_type`, `epsilon` or `v_prediction`, overrides the model's own, which a single file need not say.

    `variant` is which weights of a folder to load, such as `fp16`; by default the plain ones, or where there are none
    what there is.

    Raises:
        UserError: if the model cannot be found, is damaged or of a family that cannot be trained, or if bitsandbytes is
            missing.
    """
    check_model(name)
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise UserError(f"a model predicts {' or '.join(PREDICTION_TYPES)}, not {prediction_type!r}")
    quantise = base_precision in PRECISIONS
    source = locate(name)
    single = Path(source).is_file()
    vae_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if single and variant is not None:
        raise UserError(f"{name!r} is one file, which has no variant {variant!r}")
    folder = config_folder(identify(Path(source))) if single else None
    index = read_index(folder) if single else index_of(source)
    names = component_names(index)
    parts = (names.denoiser, "vae", *names.text_encoders, *names.tokenizers, "scheduler")
    if not single:
        folder, variant = fetch(source, index, variant, parts)
    family = family_of(index["_class_name"], name)
    cached, ready = None, {}
    if quantise and quantised_cache:
        cached = cached_file(quantised_cache, Path(source) if single else folder, base_precision, dtype, variant)
        ready = read_quantised(cached, folder, base_precision) if cached.is_file() else {}
    if single:
        pipeline = _load_file(Path(source), folder, index, dtype, ready)
        pipeline.vae.to(vae_dtype)
    else:
        loaded = dict(ready)
        for part in parts:
            if part not in loaded and index.get(part) not in (None, [None, None]):
                loaded[part] = load_part(folder, part, index[part], vae_dtype if part == "vae" else dtype, variant)
        pipeline = _assembled(name, index, loaded, family.load_arguments)
    if prediction_type is not None:
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    backbone = family(pipeline)
    check_vocabularies(backbone, name)
    if quantise and not ready:
        for model in (backbone.denoiser, *backbone.text_encoders):
            quantise_frozen(model, base_precision, device)
        if cached:
            write_quantised(cached, pipeline)
    pipeline.to(device)
    return backbone


def _assembled(name: str, index: Mapping, parts: Mapping, arguments: Mapping):
    """The pipeline; UserError if a part that it cannot be without is missing, or the parts do not fit."""
    names = component_names(index)
    missing = [part for part in (names.denoiser, "vae", "scheduler") if parts.get(part) is None]
    if missing:
        raise UserError(f"the model {name!r} has no {' and no '.join(missing)}")
    with naming("pipeline", name):
        return assemble(index, parts, arguments)


def _load_file(path: Path, folder: Path, index: Mapping, dtype: torch.dtype, ready: Mapping):
    """The pipeline of a single file, its VAE in `dtype` too; `folder` has its configurations."""
    import diffusers

    try:
        pipeline = getattr(diffusers, index["_class_name"]).from_single_file(
            str(path), config=str(folder), local_files_only=True, dtype=dtype, **ready
        )
    except Exception as error:  # diffusers raises many kinds for a damaged file
        raise UserError(f"the model {str(path)!r} cannot be loaded: {reason(error)}") from error
    for part, model in pipeline.components.items():
        lacking = (
            [] if not isinstance(model, torch.nn.Module) else [k for k, p in model.named_parameters() if p.is_meta]
        )
        if lacking:
            raise UserError(f"the model {str(path)!r} is incomplete: it lacks weights of its {part} ({lacking[0]})")
    settings = noise_settings(path)
    if settings:
        kind, config = type(pipeline.scheduler), pipeline.scheduler.config
        if settings.keys() - config.keys():  # PNDM knows no zero terminal SNR
            kind = diffusers.DDIMScheduler
        pipeline.scheduler = kind.from_config(config, **settings)
    return pipeline


def check_vocabularies(backbone: Backbone, name: str) -> None:
    """Raise a UserError unless each tokenizer's ids have rows in its text encoder; give each a length, if it has none.

    Without tokenizer_config.json a tokenizer knows no limit, and the pipelines pad to it.
    """
    if not backbone.text_encoders or None in backbone.tokenizers:
        raise UserError(f"the model {name!r} has no text encoder with a tokenizer, so there is nothing to train")
    for text_encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True):
        rows = text_encoder.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise UserError(f"the model {name!r} has a tokenizer of {len(tokenizer)} words, its text encoder {rows}")
        positions = getattr(text_encoder.config, "max_position_embeddings", None)
        if positions is not None and tokenizer.model_max_length > 1_000_000:
            tokenizer.model_max_length = positions


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
