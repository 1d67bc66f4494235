"""Embedding files of diffusers, A1111, Forge, ComfyUI, InvokeAI, kohya, OneTrainer and CrossInit."""

import base64
import json
import pickle
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dti_fast.errors import UserError
from dti_fast.files import read_tensors, write_tensors

# Keys of files that hold all text encoders.  The first of the pairs is what is written; the second is cog-sdxl's.
SDXL_KEYS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
ONE_ENCODER_KEYS = ("emb_params", "emp_params")  # the second is OneTrainer's spelling
# Text encoders beyond Stable Diffusion's: ComfyUI's key, and OneTrainer's if it has one.
OTHER_ENCODERS = {
    "T5-XXL": ("t5xxl", "t5"),
    "UMT5-XXL": ("umt5xxl", None),
    "Gemma 2 2B": ("gemma2_2b", "gemma"),
    "Gemma 3 4B": ("gemma3_4b", None),
    "Gemma 3 12B": ("gemma3_12b", None),
    "Qwen3 4B": ("qwen3_4b", None),
    "Qwen3 8B": ("qwen3_8b", None),
    "Qwen2.5-VL 7B": ("qwen25_7b", None),
    "Mistral 3 24B": ("mistral3_24b", None),
    "Llama": ("llama", "llama"),
}
_OTHER_KEYS = {key: comfy for comfy, trainer in OTHER_ENCODERS.values() for key in (comfy, trainer) if key}
_ENCODER_KEYS = {*ONE_ENCODER_KEYS, *SDXL_KEYS[0], *SDXL_KEYS[1], *_OTHER_KEYS}
PICKLES = (".pt", ".bin", ".pth", ".ckpt")
PICTURES = (".png", ".webp")
_BUNDLE = "bundle_emb."
_LONGEST_TOKEN = 100  # bytes as UTF-8; a file system allows 255 for a name, of which our endings take some
# Names of files in the output folder of a run, and those that Windows keeps for devices.
_RESERVED = r"learned_embeds.*|preview.*|pytorch_lora_weights|log|config|checkpoints|con|prn|aux|nul|com\d|lpt\d"


@dataclass(frozen=True)
class EmbeddingFile:
    """A concept as a file holds it.

    Attributes:
        layout: the kind of file, in words.
        vectors: `[K, D]` for each text encoder, in the model's order and the file's dtype, by ComfyUI's key.
        ignored: keys of tensors that are no embeddings of input tokens.
        metadata: the file's; `token` is always there, made from the file's name if the file has none.
    """

    layout: str
    vectors: dict[str, Tensor]
    ignored: list[str]
    metadata: dict[str, str]


def check_token(token: str, flag: str) -> None:
    """Raise a UserError that names `flag` unless `token` can stand in a prompt and in a file's name."""
    if not token.strip() or any(c.isspace() for c in token):
        raise UserError(f"{flag} must be one word, such as <dog>")
    if "{}" in token:
        raise UserError(f"{flag} must not hold {{}}, which stands for the token itself in prompts")
    try:
        length = len(token.encode())
    except UnicodeEncodeError:
        raise UserError(f"{flag} {token!r} is not UTF-8 text") from None
    if length > _LONGEST_TOKEN:
        raise UserError(f"{flag} is {length} bytes long; at most {_LONGEST_TOKEN} fit into the names of files")


def placeholder_stem(placeholder: str) -> str:
    """The placeholder as the stem of a file's name, never that of another file of a run."""
    stem = "".join(c for c in placeholder if c.isalnum() or c in "-_") or "concept"
    return f"{stem}-concept" if re.fullmatch(_RESERVED, stem, re.IGNORECASE) else stem


def write_embeddings(folder: Path, placeholder: str, vectors: list[Tensor], metadata: dict) -> list[Path]:
    """Write a learned concept in every layout that readers expect.

    That is `write_diffusers` and `write_single_file`, the latter named as the placeholder.
    """
    single = folder / f"{placeholder_stem(placeholder)}.safetensors"
    paths = write_diffusers(folder, placeholder, vectors, metadata)
    write_single_file(single, vectors, metadata)
    return [*paths, single]


def write_diffusers(folder: Path, token: str, vectors: list[Tensor], metadata: dict) -> list[Path]:
    """Write what diffusers loads: `learned_embeds.safetensors`, and `learned_embeds_2.safetensors` for SDXL.

    Each holds one key, the token.

    Args:
        vectors: per text encoder `[K, D]`, magnitude times direction.
    """
    if len(vectors) == 1:  # an earlier concept with two encoders may have left this one
        (folder / "learned_embeds_2.safetensors").unlink(missing_ok=True)
    paths = []
    for i, tensor in enumerate(vectors):
        paths.append(folder / f"learned_embeds{'' if i == 0 else f'_{i + 1}'}.safetensors")
        write_tensors({token: tensor}, paths[-1], {"format": "pt", **metadata})
    return paths


def write_single_file(path: Path, vectors: list[Tensor], metadata: dict) -> None:
    """Write what A1111, Forge, ComfyUI, InvokeAI and kohya read: `clip_l` and `clip_g`, or `emb_params` alone."""
    keys = SDXL_KEYS[0] if len(vectors) == 2 else ONE_ENCODER_KEYS[:1]
    write_tensors(dict(zip(keys, vectors, strict=True)), path, {"format": "pt", **metadata})


def read_embedding_file(path: Path, *, allow_pickle: bool = False, name: str | None = None) -> EmbeddingFile:
    """Read a concept from any of the field's layouts.

    `path` is a file, or a folder with `learned_embeds.safetensors` or `.bin`; beside a file of that name (or
    `learned_embeds-steps-500.safetensors`) the `learned_embeds_2` file is read with it.

    Args:
        allow_pickle: read `.pt` and `.bin` files too, with torch's unpickler for plain weights.
        name: which embedding of a LoRA that bundles several.

    Raises:
        UserError: if it is no such file.
    """
    path = _find_file(Path(path))
    tensors, metadata = _read(path, allow_pickle)
    bundled = [key for key in tensors if key.startswith(_BUNDLE)]
    if bundled:
        name, tensors = _pick_bundled({key: tensors[key] for key in bundled}, name, path)
        metadata = {"token": _as_token(name)}
    elif name is not None:
        raise UserError(f"{str(path)!r} is no LoRA that bundles embeddings, so there is none called {name!r} in it")
    ignored = [key for key in tensors if key.endswith("_out") and key.removesuffix("_out") in _ENCODER_KEYS]
    keys = [key for key in tensors if key not in ignored]
    if ignored and not keys:
        raise UserError(
            f"{str(path)!r} holds output embeddings alone ({', '.join(ignored)}): OneTrainer puts them behind the text "
            "encoder, and no other tool can; train one without its output embedding"
        )
    pair = next((pair for pair in SDXL_KEYS if set(pair) == set(keys)), None)
    if pair:
        layout = f"SDXL in one file ({' and '.join(pair)})"
        vectors = {encoder: tensors[key] for encoder, key in zip(SDXL_KEYS[0], pair, strict=True)}
    elif len(keys) == 1 and keys[0] in _ENCODER_KEYS:
        layout = f"one text encoder ({keys[0]})"
        encoder = "clip_l" if keys[0] in ONE_ENCODER_KEYS else _OTHER_KEYS.get(keys[0], keys[0])
        vectors = {encoder: tensors[keys[0]]}
    elif len(keys) == 1:
        layout = "diffusers, the key is the token"
        vectors = {"clip_l": tensors[keys[0]]}
        metadata = {"token": keys[0], **metadata} if keys[0] != "*" else metadata
        second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2", 1))
        if path.name.startswith("learned_embeds") and second != path and second.is_file():
            layout = "diffusers, a file for each of SDXL's text encoders"
            other, _ = _read(second, allow_pickle)
            if set(other) != set(keys):
                raise UserError(f"{str(second)!r} holds {', '.join(other)}, and {path.name} beside it {keys[0]}")
            vectors["clip_g"] = other[keys[0]]
    elif keys and set(keys) <= {*SDXL_KEYS[0], *_OTHER_KEYS}:
        layout = "several text encoders in one file"
        vectors = {_OTHER_KEYS.get(key, key): tensors[key] for key in (*SDXL_KEYS[0], *_OTHER_KEYS) if key in keys}
    elif numbered := _numbered({key: tensors[key] for key in keys}):
        layout = "a key for each vector"
        token, vectors = numbered[0], {"clip_l": numbered[1]}
        metadata = {"token": token, **metadata}
    elif any(key.startswith("directions.") for key in keys):
        raise UserError(
            f"{str(path)!r} is a checkpoint, for a run to go on from: give the output folder of a finished run, or "
            "have embeddings written on the way with --save_steps"
        )
    else:
        raise UserError(f"{str(path)!r} is no embedding file: its keys are {', '.join(sorted(tensors)[:5])}")
    if bundled:
        layout = f"bundled in a LoRA, which is not read: {layout}"
    return EmbeddingFile(layout, _check_vectors(vectors, path), ignored, _with_token(metadata, path))


def _find_file(path: Path) -> Path:
    """The file to read, for a folder that of diffusers in it."""
    if not path.is_dir():
        return path
    found = [path / f"learned_embeds{suffix}" for suffix in (".safetensors", ".bin")]
    for file in found:
        if file.is_file():
            return file
    if any(path.glob("checkpoints/checkpoint-*.safetensors")):
        raise UserError(f"the run in {str(path)!r} is not finished: go on with --resume_from_checkpoint latest")
    raise UserError(f"there is no file {str(found[0])!r}")


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of any kind."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    if path.suffix.lower() in PICTURES:
        return _read_picture(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix.lower() in PICKLES and start[8:] != b"{":  # some tools write safetensors under these names
        return _read_pickle(path, allow_pickle)
    return read_tensors(path)


def _read_pickle(path: Path, allowed: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a pickled embedding: a dictionary, A1111's `string_to_param`, or a list of dictionaries.

    Such a list holds the vectors of each text encoder in turn, and their widths tell these apart.
    """
    if not allowed:
        raise UserError(
            f"{str(path)!r} is a pickle, which is not read unasked: "
            f'convert it first with  dti-fast convert "{path}" "{path.stem}.safetensors" --allow_pickle'
        )
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"{str(path)!r} holds more than plain weights, or is damaged ({reason})") from None
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        rows: dict[int, list[Tensor]] = {}
        for tensor in (value for part in content for value in part.values() if isinstance(value, Tensor)):
            if tensor.dim() in (1, 2):
                rows.setdefault(tensor.shape[-1], []).append(tensor.detach().reshape(-1, tensor.shape[-1]))
        keys = SDXL_KEYS[0] if len(rows) == 2 else ONE_ENCODER_KEYS[:1]
        if len(rows) == len(keys):
            return {key: torch.cat(rows[width]) for key, width in zip(keys, sorted(rows), strict=True)}, {}
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is no embedding file: it holds a {type(content).__name__}")
    return _plain(content, path)


def _read_picture(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an embedding that A1111 put into a picture: JSON, never a pickle.

    It lies in the text chunk `sd-ti-embedding` of a PNG, or in the lower four bits of the pixels.
    """
    from PIL import Image

    def tensor(entry: dict):
        return torch.tensor(entry["TORCHTENSOR"], dtype=torch.float32) if "TORCHTENSOR" in entry else entry

    try:
        with Image.open(path) as picture:
            text = picture.info.get("sd-ti-embedding")
            packed = base64.b64decode(text) if text else _unpack_pixels(picture.convert("RGB"))
        content = None if packed is None else json.loads(packed, object_hook=tensor)
    except Exception as error:  # Pillow, zlib, JSON and torch raise many kinds for a broken file
        raise UserError(f"{str(path)!r} cannot be read as a picture with an embedding: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"there is no embedding in the picture {str(path)!r}")
    return _plain(content, path)


def _unpack_pixels(picture) -> bytes | None:
    """What A1111 hides in an RGB picture, or None.

    To the left of the first column whose lower four bits are 0 lie the lower halves of the bytes, to the right of the
    last one the upper halves; both are mixed with the numbers of a linear congruential generator, and zlib packed them.
    """
    import numpy as np

    pixels = np.asarray(picture)
    bright = (pixels > 0).all(-1)
    rows, columns = bright.any(1).nonzero()[0], bright.any(0).nonzero()[0]
    if not len(rows):
        return None
    nibbles = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    gaps = (nibbles.sum((0, 2)) == 0).nonzero()[0]
    if len(gaps) < 2:
        return None
    lower, upper = nibbles[:, : gaps[0]].ravel(), nibbles[:, gaps[-1] + 1 :].ravel()
    if len(lower) != len(upper):
        return None
    state, mask = 0, np.empty(len(lower), np.uint8)
    for i in range(len(mask)):
        state = (1664525 * state + 1013904223) % 2**32
        mask[i] = state % 255 & 0x0F
    packed = ((upper ^ mask) << 4 | (lower ^ mask)).tobytes()
    return zlib.decompressobj().decompress(packed, 100_000_000)


def _plain(content: dict, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a dictionary of tensors, or A1111's around one."""
    metadata = {}
    if "string_to_param" in content:
        name = content.get("name")
        metadata = {"token": _as_token(str(name))} if name else {}
        metadata |= {k: str(content[k]) for k in ("step", "sd_checkpoint_name") if content.get(k) is not None}
        content = content["string_to_param"]
        if not isinstance(content, dict | torch.nn.ParameterDict):
            raise UserError(f"{str(path)!r} is damaged: its string_to_param is a {type(content).__name__}")
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}, metadata


def _pick_bundled(tensors: dict[str, Tensor], name: str | None, path: Path) -> tuple[str, dict[str, Tensor]]:
    """One of the embeddings that a LoRA bundles: its name, and its tensors by the keys of a file of its own.

    Keys are `bundle_emb.NAME.clip_l`, `bundle_emb.NAME.string_to_param.*` or `bundle_emb.NAME`.
    """
    concepts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        concept, _, encoder = key.removeprefix(_BUNDLE).removesuffix(".string_to_param.*").rpartition(".")
        if encoder.removesuffix("_out") not in _ENCODER_KEYS:
            concept, encoder = (concept or encoder), ONE_ENCODER_KEYS[0]
        concepts.setdefault(concept, {})[encoder] = tensor
    if name is None and len(concepts) > 1:
        raise UserError(
            f"the LoRA {str(path)!r} bundles several embeddings, {', '.join(sorted(concepts))}: "
            "write the one you mean to a file of its own with  dti-fast convert --name"
        )
    name = next(iter(concepts)) if name is None else name
    if name not in concepts:
        raise UserError(f"the LoRA {str(path)!r} bundles no embedding {name!r}, but {', '.join(sorted(concepts))}")
    return name, concepts[name]


def _numbered(tensors: dict[str, Tensor]) -> tuple[str, Tensor] | None:
    """The token and the vectors `[K, D]` of a file with a key for each vector, or None.

    CrossInit's keys are `<x_0>`, `<x_1>`, ...; others are diffusers' names of the tokens, `<x>`, `<x>_1`, ...
    """
    parts = [re.fullmatch(r"<?(.*?)>?(?:_?(\d+))?>?", key, re.DOTALL) for key in tensors]
    numbers = [int(part[2] or 0) for part in parts]
    first = min(numbers, default=0)
    shapes = {tuple(tensor.reshape(-1).shape) for tensor in tensors.values()}
    rows = all(tensor.dim() == 1 or (tensor.dim() == 2 and len(tensor) == 1) for tensor in tensors.values())
    complete = first < 2 and sorted(numbers) == list(range(first, first + len(numbers)))
    if len(numbers) < 2 or len({part[1] for part in parts}) > 1 or not complete or not rows or len(shapes) > 1:
        return None
    ordered = sorted(zip(numbers, tensors.values(), strict=True), key=lambda pair: pair[0])
    return _as_token(parts[0][1]), torch.stack([tensor.reshape(-1) for _, tensor in ordered])


def _as_token(name: str) -> str:
    """A name as a token: bracketed once, lower case, without spaces."""
    name = name.encode("utf-8", "replace").decode()  # a file's name may hold bytes that are no text
    return f"<{'-'.join(re.sub('[<>{}]', ' ', name).lower().split()) or 'concept'}>"


def _with_token(metadata: dict[str, str], path: Path) -> dict[str, str]:
    """The metadata, with a token made from the file's name if it has none that can stand in a prompt."""
    named = _as_token(path.stem)
    if len(named.encode()) > _LONGEST_TOKEN:
        named = "<concept>"
    if "token" in metadata:
        try:
            check_token(metadata["token"], "the token")
        except UserError as error:
            warnings.warn(f"{str(path)!r}: {error}; it is called {named} here", stacklevel=3)
            metadata = {**metadata, "token": named}
    return {"token": named, **metadata}


def _check_vectors(vectors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Each as `[K, D]`; UserError unless all are finite numbers of one K."""
    for name, tensor in vectors.items():
        if tensor.dim() not in (1, 2) or tensor.numel() == 0 or not tensor.is_floating_point():
            raise UserError(
                f"{str(path)!r} is no embedding file: {name} is {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if not tensor.float().isfinite().all():
            raise UserError(f"{str(path)!r} is damaged: {name} holds values that are not finite")
    vectors = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in vectors.items()}
    counts = {name: len(tensor) for name, tensor in vectors.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"{str(path)!r} has a different number of vectors for each text encoder: {counts}")
    return vectors


def read_embeddings(
    path: Path, *, allow_pickle: bool = False, name: str | None = None
) -> tuple[list[Tensor], dict[str, str]]:
    """Per text encoder the vectors `[K, D]` of a Stable Diffusion concept, and the metadata with its `token`.

    Raises:
        UserError: if it is none (`read_embedding_file`).
    """
    file = read_embedding_file(path, allow_pickle=allow_pickle, name=name)
    others = [encoder for encoder, (key, _) in OTHER_ENCODERS.items() if key in file.vectors]
    if others:
        raise UserError(
            f"{str(path)!r} is for a model with the text encoder {' and '.join(others)}; "
            "dti-fast knows those of Stable Diffusion and SDXL"
        )
    return list(file.vectors.values()), file.metadata


def token_names(token: str, count: int) -> list[str]:
    """The tokens that diffusers makes of a concept of `count` vectors: `<x>`, `<x>_1`, ..."""
    return [token] + [f"{token}_{i}" for i in range(1, count)]


def lora_paths(folder: Path, placeholder: str) -> tuple[Path, Path]:
    """Where a run with a LoRA writes it: diffusers' file, found by the folder alone, and kohya's."""
    return folder / "pytorch_lora_weights.safetensors", folder / f"{placeholder_stem(placeholder)}_lora.safetensors"
