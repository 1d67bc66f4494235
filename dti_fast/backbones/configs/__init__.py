"""Configuration folders that let a single-file checkpoint be loaded without a network."""

import gzip
import hashlib
import json
import os
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path

from dti_fast.backbones import clip_vocabulary

CONFIGS = ("sd15", "sd21", "sdxl")

_PACKAGED = Path(__file__).parent
_MERGES = _PACKAGED / "clip_merges.txt.gz"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
# The SDXL refiner holds the second encoder alone, as embedder 0, so both embedders are asked for.
_TEXT_ENCODERS = {
    "sd15": ("cond_stage_model.transformer.",),
    "sd21": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}


def config_folder(family: str) -> Path:
    """A diffusers folder of `family` ("sd15", "sd21" or "sdxl") that holds everything but weights.

    It lies in the user's cache and is written once: a name made of the contents keeps versions
    apart, and a rename at the end keeps a half-written folder from ever being seen.
    Raises `ValueError` for an unknown family.
    """
    if family not in CONFIGS:
        raise ValueError(f"unknown model family {family!r}: expected one of {', '.join(CONFIGS)}")
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_root / "dti-fast" / f"configs-{_contents_hash()}" / family
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _materialise(family, folder)
    return folder


def identify_single_file(path: str | os.PathLike) -> str:
    """The family of a single-file checkpoint in the original layout, read from its header alone.

    Raises `ValueError` when the file is not safetensors or holds another kind of model,
    `OSError` when it cannot be read.
    """
    shapes = _tensor_shapes(Path(path))
    if any(key.startswith(("edm_mean", "edm_std", "edm_vpred.")) for key in shapes):
        raise ValueError(f"{path}: its noise process is EDM's; a DDPM's can be trained")
    for family, prefixes in _TEXT_ENCODERS.items():
        if _UNET_INPUT in shapes and all(any(key.startswith(p) for key in shapes) for p in prefixes):
            channels = shapes[_UNET_INPUT][1] if len(shapes[_UNET_INPUT]) == 4 else 0
            if channels != 4:
                raise ValueError(f"{path}: its UNet takes {channels} channels, text-to-image models take 4")
            return family
    raise ValueError(f"{path}: not a Stable Diffusion 1.x, 2.x or XL base checkpoint in the original layout")


def noise_settings(path: str | os.PathLike) -> dict:
    """What the marks in a single file say of its noise, as settings of a diffusers scheduler.

    An empty tensor `v_pred` says that the model predicts v, `ztsnr` that the last step of the noise has no signal left;
    pictures must then begin at that step.
    """
    keys, settings = _tensor_shapes(Path(path)), {}
    if "v_pred" in keys:
        settings["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


@cache
def _contents_hash() -> str:
    """Twelve hex digits over all that `config_folder` writes: packaged files and the vocabulary's writer."""
    digest = hashlib.sha256(Path(clip_vocabulary.__file__).read_bytes())
    for file in (*sorted(_PACKAGED.rglob("*.json")), _MERGES):
        digest.update(file.relative_to(_PACKAGED).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _materialise(family: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{family}-", dir=folder.parent) as temporary:
        work = Path(temporary) / family
        shutil.copytree(_PACKAGED / family, work)
        merges = [tuple(line.split()) for line in gzip.decompress(_MERGES.read_bytes()).decode().splitlines()]
        for tokenizer in work.glob("tokenizer*"):
            clip_vocabulary.write_clip_vocabulary(tokenizer, merges)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first with the same contents
                raise


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        shapes = {name: entry["shape"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        if any(not isinstance(n, int) for shape in shapes.values() for n in shape):
            raise ValueError("a shape is no list of numbers")
        return shapes
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: not a safetensors file") from None
