"""Concepts and LoRAs in diffusers pipelines."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from dti_fast.errors import UserError
from dti_fast.files import read_tensors
from dti_fast.formats import lora_paths, read_embeddings, token_names


def load_embedding(
    pipeline, path: str | Path, *, token: str | None = None, pooling: str = "eos", allow_pickle: bool = False
) -> str:
    """Load a concept into a stock diffusers pipeline; returns the token to write in prompts.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline.
        path: an embedding file, or the output folder of a training run.
        token: the word for it; by default the one in the file.
        pooling: `eos` makes SDXL pool its text features at the end of the text, as the training here does by
            default; `reference` leaves the pipeline as it is.
        allow_pickle: read `.pt` and `.bin` files too, as plain weights only.

    Raises:
        UserError: if the file is no embedding, or one for another kind of model, or the token is a word already.
    """
    vectors, metadata = read_embeddings(Path(path), allow_pickle=allow_pickle)
    token = token or metadata["token"]
    load_vectors(pipeline, vectors, token, pooling=pooling, source=str(path))
    return token


def load_vectors(
    pipeline, vectors: list[Tensor], token: str, *, pooling: str = "eos", source: str = "the concept"
) -> None:
    """`load_embedding` for vectors in memory, `[K, D]` per text encoder; `source` names them in errors."""
    pairs = _text_encoders(pipeline)
    present = [i for i, (text_encoder, _) in enumerate(pairs) if text_encoder is not None]
    if len(vectors) == len(pairs):  # SDXL's refiner has the second encoder alone
        vectors = [vectors[i] for i in present]
    pairs = [pairs[i] for i in present]
    if not hasattr(pipeline, "load_textual_inversion"):
        raise UserError(f"diffusers loads no embeddings into a {type(pipeline).__name__}")
    if not pairs:
        raise UserError("this pipeline has no text encoder, so there is nothing to load an embedding into")
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder, _ in pairs]
    if widths != [v.shape[1] for v in vectors]:
        raise UserError(
            f"{source!r} holds embeddings {[v.shape[1] for v in vectors]} wide, but this model's are {widths}: "
            "it was learned on another kind of model"
        )
    if any(tokenizer is None for _, tokenizer in pairs):
        raise UserError("this pipeline has a text encoder without its tokenizer, so no word can be added to it")
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
    text_encoder, tokenizer = pairs[-1]
    if pooling == "eos" and text_encoder is getattr(pipeline, "text_encoder_2", None):
        getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


def _text_encoders(pipeline) -> list[tuple]:
    """Text encoders and tokenizers of a Stable Diffusion or SDXL pipeline, None where it has none."""
    suffixes = [suffix for suffix in ("", "_2") if hasattr(pipeline, f"text_encoder{suffix}")]
    return [(getattr(pipeline, f"text_encoder{s}"), getattr(pipeline, f"tokenizer{s}")) for s in suffixes]


def find_lora(path: str | Path) -> Path | None:
    """The LoRA in a run's output folder, or beside an embedding file that says it was learned with one."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file, _ = lora_paths(folder, "")
    if not file.is_file():
        return None
    metadata = read_tensors(path)[1] if folder != path and path.suffix.lower() == ".safetensors" else {}
    return file if folder == path or metadata.get("lora_rank", "0") != "0" else None


def load_lora(pipeline, path: str | Path) -> bool:
    """Load the LoRA that was learned with an embedding (`find_lora`); returns whether there is one.

    Several, of several concepts, act together.

    Raises:
        UserError: if there is one but peft is missing, or if it is for another model.
    """
    file = find_lora(path)
    if file is None:
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
