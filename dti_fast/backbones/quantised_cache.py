"""Quantised models kept in a folder, so that the next start neither reads the full weights nor quantises them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dti_fast import __version__
from dti_fast.backbones.components import build_model, component_names, read_index, weight_files
from dti_fast.errors import UserError
from dti_fast.files import read_tensors, write_tensors
from dti_fast.frozen.quantise import quantise_frozen

_SAMPLE = 1024  # bytes


def cached_file(cache: Path, source: Path, precision: str, dtype: torch.dtype, variant: str | None = None) -> Path:
    """Where `cache` keeps this model in this form, there or not.

    The name carries a hash of the weights' safetensors headers and of three samples of every tensor, and of the
    versions that decide what the file holds: a second's work for any model, and no two models differ in less than that.

    Args:
        source: a diffusers folder or a .safetensors file.
        variant: which weights of a folder are loaded.

    Raises:
        UserError: if the folder cannot be written or is the hub's own, or the weights are no safetensors.
    """
    _check_folder(cache)
    files = [source]
    if source.is_dir():
        files = [path for name in _quantised(read_index(source)) for path in weight_files(source / name, variant)]
    if not files:
        raise UserError(f"--quantised_cache: {str(source)!r} holds no .safetensors weights")
    import diffusers
    import transformers

    digest = hashlib.sha256(f"{__version__} {diffusers.__version__} {transformers.__version__}".encode())
    for path in files:
        _hash_weights(path, digest)
    kind = str(dtype).removeprefix("torch.")
    return cache / f"{source.stem}-{precision}-{kind}-{digest.hexdigest()[:16]}.safetensors"


def write_quantised(path: Path, pipeline) -> None:
    """Write the denoiser and the text encoders of a pipeline as they are now."""
    tensors = {
        f"{name}.{key}": tensor
        for name in _quantised(pipeline.components)
        if getattr(pipeline, name, None) is not None
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, path, {"format": "pt"})
    except OSError as error:
        raise UserError(f"--quantised_cache: {str(path)!r} cannot be written: {error}") from None


def read_quantised(path: Path, configs: Path, precision: str) -> dict[str, nn.Module]:
    """The models of a file that `write_quantised` wrote, by the pipeline's names for them, on the CPU.

    Args:
        configs: a diffusers folder; of its files only the models' config.json are read.
    """
    from accelerate import init_empty_weights

    tensors, _ = read_tensors(path)
    index, models = read_index(configs), {}
    for name in _quantised(index):
        state = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        if not state:
            continue
        with init_empty_weights(include_buffers=False):
            model = build_model(configs, name, index[name])
        model.requires_grad_(False).eval()
        quantise_frozen(model, precision)
        model.load_state_dict(state, assign=True)
        models[name] = model
    return models


def _quantised(components: Mapping) -> list[str]:
    """The components that are quantised."""
    names = component_names(components)
    return [names.denoiser, *names.text_encoders]


def _check_folder(cache: Path) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    existing = cache = cache.absolute()
    if cache.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve()):
        raise UserError(f"--quantised_cache: {str(cache)!r} is the hub's own cache; choose another folder")
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--quantised_cache: the folder {str(cache)!r} cannot be written; choose another")


def _hash_weights(path: Path, digest) -> None:
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(header)
        base = 8 + len(header)
        for name, entry in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            for position in (start, (start + end) // 2, max(start, end - _SAMPLE)):
                file.seek(base + position)
                digest.update(file.read(min(_SAMPLE, end - position)))
