"""Embedding files of diffusers, A1111, Forge, ComfyUI, InvokeAI, kohya and OneTrainer; loading into pipelines."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dti_fast.errors import UserError

# Keys of files that hold all text encoders.  The first of the pairs is what is written; the second is cog-sdxl's.
SDXL_KEYS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
ONE_ENCODER_KEYS = ("emb_params", "emp_params")  # the second is OneTrainer's spelling
OTHER_ENCODERS = ("t5", "t5xxl", "umt5xxl", "gemma", "gemma2_2b", "gemma3_4b", "llama")
PICKLES = (".pt", ".bin", ".pth", ".ckpt")


@dataclass(frozen=True)
class EmbeddingFile:
    """A concept as a file holds it.

    Attributes:
        layout: the kind of file, in words.
        vectors: `[K, D]` for each text encoder, in the model's order and the file's dtype.
        ignored: keys of tensors that are no embeddings of input tokens.
        metadata: the file's; `token` is always there, made from the file's name if the file has none.
    """

    layout: str
    vectors: dict[str, Tensor]
    ignored: list[str]
    metadata: dict[str, str]


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """A short hash of the tensors' values, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it; metadata values become JSON strings."""
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # that of any new file: safetensors would make it readable by its owner alone
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
    temporary.chmod(mode)
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; UserError if it is none."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is not a safetensors file ({error})") from None


def check_token(token: str, flag: str) -> None:
    """Raise a UserError that names `flag` unless `token` is one word."""
    if not token.strip() or any(c.isspace() for c in token):
        raise UserError(f"{flag} must be one word, such as <dog>")


def placeholder_stem(placeholder: str) -> str:
    """The placeholder as the stem of a file's name."""
    return "".join(c for c in placeholder if c.isalnum() or c in "-_") or "concept"


def write_embeddings(folder: Path, placeholder: str, vectors: list[Tensor], metadata: dict) -> list[Path]:
    """Write a learned concept in every layout that readers expect.

    That is `write_diffusers`, and for a concept with two encoders also `write_single_file`, named as the placeholder.
    """
    paths = write_diffusers(folder, placeholder, vectors, metadata)
    if len(vectors) == 2:
        paths.append(folder / f"{placeholder_stem(placeholder)}.safetensors")
        write_single_file(paths[-1], vectors, metadata)
    return paths


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


def read_embedding_file(path: Path, *, allow_pickle: bool = False) -> EmbeddingFile:
    """Read a concept from any of the field's layouts.

    `path` is a file, or a folder with `learned_embeds.safetensors`; beside a file of that name (or
    `learned_embeds-steps-500.safetensors`) the `learned_embeds_2` file is read with it.

    Args:
        allow_pickle: read `.pt` and `.bin` files too, with torch's unpickler for plain weights.

    Raises:
        UserError: if it is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "learned_embeds.safetensors"
    if path.suffix.lower() in PICKLES:
        tensors, metadata = _read_pickle(path, allow_pickle)
    else:
        tensors, metadata = read_tensors(path)
    ignored = [key for key in tensors if key.endswith("_out") and key.removesuffix("_out") in tensors]
    keys = [key for key in tensors if key not in ignored]
    pair = next((pair for pair in SDXL_KEYS if set(pair) == set(keys)), None)
    if pair:
        layout = f"SDXL in one file ({' and '.join(pair)})"
        vectors = {encoder: tensors[key] for encoder, key in zip(SDXL_KEYS[0], pair, strict=True)}
    elif len(keys) == 1 and keys[0] in (*ONE_ENCODER_KEYS, *OTHER_ENCODERS, *SDXL_KEYS[0]):
        layout = f"one text encoder ({keys[0]})"
        vectors = {"clip_l" if keys[0] in ONE_ENCODER_KEYS else keys[0]: tensors[keys[0]]}
    elif len(keys) == 1:
        layout = "diffusers, the key is the token"
        vectors = {"clip_l": tensors[keys[0]]}
        metadata = {"token": keys[0], **metadata} if keys[0] != "*" else metadata
        second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2", 1))
        if path.name.startswith("learned_embeds") and second != path and second.is_file():
            layout = "diffusers, a file for each of SDXL's text encoders"
            other = read_tensors(second)[0]
            if set(other) != set(keys):
                raise UserError(f"{str(second)!r} holds {', '.join(other)}, and {path.name} beside it {keys[0]}")
            vectors["clip_g"] = other[keys[0]]
    elif keys and set(keys) <= {*SDXL_KEYS[0], *OTHER_ENCODERS}:
        layout = "several text encoders in one file"
        vectors = {key: tensors[key] for key in (*SDXL_KEYS[0], *OTHER_ENCODERS) if key in keys}
    else:
        raise UserError(f"{str(path)!r} is no embedding file: its keys are {', '.join(sorted(tensors)[:5])}")
    metadata = {"token": f"<{'-'.join(path.stem.lower().split())}>", **metadata}
    return EmbeddingFile(layout, _check_vectors(vectors, path), ignored, metadata)


def _read_pickle(path: Path, allowed: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a pickled embedding: diffusers' and kohya's dictionary, or A1111's `string_to_param`."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    if not allowed:
        raise UserError(
            f"{str(path)!r} is a pickle, which is not read unasked: "
            f'convert it first with  dti-fast convert "{path}" "{path.stem}.safetensors" --allow_pickle'
        )
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"{str(path)!r} holds more than plain weights, or is damaged ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is no embedding file: it holds a {type(content).__name__}")
    metadata = {}
    if "string_to_param" in content:
        name = content.get("name")
        metadata = {"token": f"<{'-'.join(str(name).lower().split())}>"} if name else {}
        metadata |= {k: str(content[k]) for k in ("step", "sd_checkpoint_name") if content.get(k) is not None}
        content = dict(content["string_to_param"])
    tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    return tensors, metadata


def _check_vectors(vectors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Each as `[K, D]`; UserError unless all are finite numbers of one K."""
    for name, tensor in vectors.items():
        if tensor.dim() not in (1, 2) or tensor.numel() == 0 or not tensor.is_floating_point():
            raise UserError(
                f"{str(path)!r} is no embedding file: {name} is {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{str(path)!r} is damaged: {name} holds values that are not finite")
    vectors = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in vectors.items()}
    counts = {name: len(tensor) for name, tensor in vectors.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"{str(path)!r} has a different number of vectors for each text encoder: {counts}")
    return vectors


def read_embeddings(path: Path, *, allow_pickle: bool = False) -> tuple[list[Tensor], dict[str, str]]:
    """Per text encoder the vectors `[K, D]` of a Stable Diffusion concept, and the metadata with its `token`.

    Raises:
        UserError: if it is none (`read_embedding_file`).
    """
    file = read_embedding_file(path, allow_pickle=allow_pickle)
    others = [name for name in file.vectors if name in OTHER_ENCODERS]
    if others:
        raise UserError(
            f"{str(path)!r} is for a model with the text encoder {' and '.join(others)}; "
            "dti-fast knows those of Stable Diffusion and SDXL"
        )
    return list(file.vectors.values()), file.metadata


def load_embedding(pipeline, path: str | Path, *, token: str | None = None, pooling: str = "eos") -> str:
    """Load a concept into a stock diffusers pipeline; returns the token to write in prompts.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline.
        path: an embedding file, or the output folder of a training run.
        token: the word for it; by default the one in the file.
        pooling: `eos` makes SDXL pool its text features at the end of the text, as the training here does by
            default; `reference` leaves the pipeline as it is.

    Raises:
        UserError: if the file is no embedding, or one for another kind of model, or the token is a word already.
    """
    vectors, metadata = read_embeddings(path)
    token = token or metadata["token"]
    load_vectors(pipeline, vectors, token, pooling=pooling, source=str(path))
    return token


def load_vectors(
    pipeline, vectors: list[Tensor], token: str, *, pooling: str = "eos", source: str = "the concept"
) -> None:
    """`load_embedding` for vectors in memory, `[K, D]` per text encoder; `source` names them in errors."""
    pairs = [(pipeline.text_encoder, pipeline.tokenizer)]
    if getattr(pipeline, "text_encoder_2", None) is not None:
        pairs.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    if pipeline.text_encoder is None:  # SDXL's refiner has the second one alone
        pairs, vectors = pairs[1:], vectors[-1:]
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder, _ in pairs]
    if widths != [v.shape[1] for v in vectors]:
        raise UserError(
            f"{source!r} holds embeddings {[v.shape[1] for v in vectors]} wide, but this model's are {widths}: "
            "it was learned on another kind of model"
        )
    for taken in token_names(token, len(vectors[0])):
        if any(taken in tokenizer.get_vocab() for _, tokenizer in pairs):
            raise UserError(
                f"{taken!r} of {source!r} is a word of this model already; "
                "dti-fast convert --token writes the file under another"
            )
    for tensor, (text_encoder, tokenizer) in zip(vectors, pairs, strict=True):
        pipeline.load_textual_inversion(
            {token: tensor if len(tensor) > 1 else tensor[0]}, text_encoder=text_encoder, tokenizer=tokenizer
        )
    if pooling == "eos" and getattr(pipeline, "text_encoder_2", None) is not None:
        text_encoder, tokenizer = pairs[-1]
        getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


def token_names(token: str, count: int) -> list[str]:
    """The tokens that diffusers makes of a concept of `count` vectors: `<x>`, `<x>_1`, ..."""
    return [token] + [f"{token}_{i}" for i in range(1, count)]


def lora_paths(folder: Path, placeholder: str) -> tuple[Path, Path]:
    """Where a run with a LoRA writes it: diffusers' file, found by the folder alone, and kohya's."""
    return folder / "pytorch_lora_weights.safetensors", folder / f"{placeholder_stem(placeholder)}_lora.safetensors"


def load_lora(pipeline, path: str | Path) -> bool:
    """Load the LoRA beside an embedding file, or in the output folder of a run; returns whether there is one.

    Several, of several concepts, act together.

    Raises:
        UserError: if there is one but peft is missing, or if it is for another model.
    """
    path = Path(path)
    file, _ = lora_paths(path if path.is_dir() else path.parent, "")
    if not file.is_file():
        return False
    if find_spec("peft") is None:
        raise UserError(f"{str(file)!r} needs the package peft: pip install peft")
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        pipeline.set_adapters(list(pipeline.unet.peft_config))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{str(file)!r} does not fit this model: {str(error).strip().partition(chr(10))[0]}") from error
    return True


@contextmanager
def lora_of(pipeline, path: str | Path) -> Iterator[None]:
    """`load_lora`, and its removal afterwards."""
    loaded = load_lora(pipeline, path)
    try:
        yield
    finally:
        if loaded:
            pipeline.unload_lora_weights()
