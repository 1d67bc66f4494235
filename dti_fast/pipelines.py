"""Concepts and LoRAs in diffusers pipelines."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from dti_fast.errors import UserError
from dti_fast.formats import lora_paths, read_embeddings, token_names


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
    if pooling == "eos" and len(pairs) == 2:
        text_encoder, tokenizer = pairs[1]
        getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


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
