"""The parts of a diffusers pipeline: what they are called, their files, and models with and without weights."""

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dti_fast.errors import UserError

LIBRARIES = ("diffusers", "transformers")
# Such as model.safetensors, model.fp16.safetensors, and either in pieces, numbered before or after the variant.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")


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


def read_index(folder: Path) -> dict:
    """The model_index.json of a diffusers folder; UserError if there is none or it is damaged."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is no diffusers pipeline: it has no model_index.json")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(f"{str(path)!r} is damaged: it names no pipeline")
    for part, entry in index.items():
        if isinstance(entry, list) and (len(entry) != 2 or {type(e) for e in entry} not in ({str}, {type(None)})):
            raise UserError(f"{str(path)!r} is damaged: {part} is {entry}, no library and class")
    return index


def class_of(library: str, name: str):
    """The class that model_index.json names.

    Raises:
        UserError: if it is none of diffusers or transformers: a file decides on no other import.
    """
    found = getattr(importlib.import_module(library), name, None) if library in LIBRARIES else None
    if found is None:
        raise UserError(f"{name!r} of {library!r} is no class of {' or '.join(LIBRARIES)} as installed here")
    return found


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weights of one part of a pipeline: those of `variant` (such as fp16) if it has them, else the plain ones."""
    found = _variants(folder)
    return found.get(variant) or found.get(None, [])


def pick_variant(folder: Path, parts: list[str], variant: str | None) -> str | None:
    """The variant to load: the wanted one, or by default the plain weights, or what there is instead of them.

    Args:
        folder: a diffusers folder.
        parts: those that have weights.

    Raises:
        UserError: if a part has no safetensors weights, or none of that variant, or of several other ones.
    """
    found = {part: _variants(folder / part) for part in parts}
    for part, variants in found.items():
        if not variants:
            pickled = any(folder.glob(f"{part}/*.bin"))
            hint = "only pickled ones, which are not read: convert them first" if pickled else "download it again"
            raise UserError(f"{str(folder / part)!r} holds no .safetensors weights; {hint}")
    others = sorted({name for variants in found.values() for name in variants if name is not None})
    if variant is not None:
        lacking = [part for part, variants in found.items() if not {variant, None} & set(variants)]
        if variant not in others or lacking:
            there = f"there is {', '.join(others)}" if others else "there are only the plain weights"
            raise UserError(
                f"{str(folder)!r} has no variant {variant!r} of {', '.join(lacking) or 'any part'}; {there}"
            )
        return variant
    alone = [set(variants) for variants in found.values() if None not in variants]
    if not alone:
        return None
    shared = sorted(set.intersection(*alone))
    if len(shared) != 1 and "fp16" not in shared:
        raise UserError(f"{str(folder)!r} holds the variants {', '.join(others)}; choose one with --variant")
    return "fp16" if "fp16" in shared else shared[0]


def _variants(folder: Path) -> dict[str | None, list[Path]]:
    """The files of weights of one part, by variant; None for the plain ones."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    return found


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


@contextmanager
def naming(part: str, folder: str | Path) -> Iterator[None]:
    """Turn what goes wrong in the block into a UserError that names the part of the model in `folder`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged file
        raise UserError(f"the {part} of {str(folder)!r} is damaged or incomplete: {reason(error)}") from error


def load_part(folder: Path, part: str, index: tuple[str, str], dtype: torch.dtype, variant: str | None = None):
    """A model, tokenizer or scheduler of a diffusers folder, from safetensors and JSON alone; models in `dtype`.

    Raises:
        UserError: that names the part, if it is missing, damaged or incomplete.
    """
    place = folder / part
    if not place.is_dir():
        raise UserError(f"the model has no {part}: there is no folder {str(place)!r}")
    part_class = class_of(*index)
    with naming(part, folder):
        if not issubclass(part_class, nn.Module):
            loaded = part_class.from_pretrained(folder, subfolder=part, local_files_only=True)
            if hasattr(loaded, "vocab_files_names"):
                _check_tokenizer(loaded, place)
            return loaded
        own = variant if variant in _variants(place) else None
        model, info = part_class.from_pretrained(
            folder, subfolder=part, dtype=dtype, variant=own, use_safetensors=True, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    missing = [*info["missing_keys"], *(_key(entry) for entry in info["mismatched_keys"])]
    missing += [name for name, tensor in model.named_parameters() if tensor.is_meta and name not in missing]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the {part} of {str(folder)!r} is damaged or incomplete: its weights lack {sorted(missing)[0]}{more}, "
            "or have it in another shape than config.json says"
        )
    return model


def assemble(index: Mapping, parts: Mapping, arguments: Mapping):
    """The pipeline that a model_index.json describes, of `parts` alone; `arguments` go before what it says."""
    pipeline_class = class_of("diffusers", index["_class_name"])
    settings = {key: None if isinstance(value, list) else value for key, value in index.items()}
    known = inspect.signature(pipeline_class.__init__).parameters
    settings = {key: value for key, value in settings.items() if key in known}
    return pipeline_class(**{**settings, **parts, **arguments})


def reason(error: Exception) -> str:
    """The first line of an exception."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_tokenizer(tokenizer, folder: Path) -> None:
    """Raise unless the files of a tokenizer are there and it makes tokens: without them one is made of nothing."""
    files = dict(type(tokenizer).vocab_files_names)
    whole = files.pop("tokenizer_file", None)
    if whole is None or not (folder / whole).is_file():
        lacking = [name for name in files.values() if not (folder / name).is_file()]
        if lacking or not files:
            raise UserError(
                f"the {folder.name} of {str(folder.parent)!r} is incomplete: there is no {' or '.join(lacking)}"
            )
    if not tokenizer("a photo", add_special_tokens=False).input_ids:
        raise UserError(f"the {folder.name} of {str(folder.parent)!r} is damaged: it makes no tokens of text")


def _key(entry) -> str:
    """The name of a tensor in the report of either library."""
    return entry if isinstance(entry, str) else entry[0]
