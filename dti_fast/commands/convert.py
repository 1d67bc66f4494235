"""`dti-fast convert`: embedding files from one layout to another."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dti_fast.errors import UserError
from dti_fast.formats import check_token, read_embeddings, write_diffusers, write_single_file
from dti_fast.limits import check_limits
from dti_fast.tokens import initial_magnitudes


def convert(
    source: Path,
    target: Path,
    *,
    token: str | None = None,
    renorm: float | Literal["mean", "min", "max"] | None = None,
    pretrained_model_name_or_path: str | None = None,
    allow_pickle: bool = False,
    name: str | None = None,
) -> None:
    """Write an embedding in another layout, and read it back to compare.

    Parameters
    ----------
    source
        An embedding file of any tool, or a folder with learned_embeds.safetensors.
    target
        NAME.safetensors for ComfyUI, A1111, Forge, InvokeAI and kohya; else a folder for diffusers.
    token
        A new word for the concept.
    renorm
        Give every vector another norm and keep its direction: a number, or the mean, min or max of the
        model's words.
    pretrained_model_name_or_path
        The model of --renorm mean, min and max. Default: the one the file names, if it is on this machine.
    allow_pickle
        Read a .pt or .bin file, as plain weights only.
    name
        Which embedding of a LoRA that bundles several.
    """
    vectors, metadata = read_embeddings(source, allow_pickle=allow_pickle, name=name)
    if token is not None:
        check_token(token, "--token")
        metadata["token"] = token
    single = target.suffix.lower() == ".safetensors"
    if target.suffix and not single:
        raise UserError(
            f"{target.name!r}: an embedding is written as a .safetensors file, or for diffusers as a folder"
        )
    if target.is_dir() if single else target.is_file():
        raise UserError(f"{str(target)!r} is a {'folder' if single else 'file'} already")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {str(target.parent)!r} to write into")
    check_limits({"renorm": renorm})
    if renorm is not None:
        vectors = set_norms(vectors, renorm, pretrained_model_name_or_path, metadata.get("base_model"))
        metadata["magnitude"] = str([tensor.float().norm(dim=-1).mean().item() for tensor in vectors])
    if single:
        write_single_file(target, vectors, metadata)
        paths = [target]
    else:
        target.mkdir(exist_ok=True)
        paths = write_diffusers(target, metadata["token"], vectors, metadata)
    written, _ = read_embeddings(target)
    if [v.dtype for v in written] != [v.dtype for v in vectors] or not all(map(torch.equal, written, vectors)):
        raise OSError(f"{target} does not read back as it was written")
    print(f"wrote {', '.join(map(str, paths))}")


def set_norms(vectors: list[Tensor], norm: float | str, model: str | None, named: str | None = None) -> list[Tensor]:
    """Vectors `[K, D]` per text encoder with their directions and the `norm` that `convert` describes; float32.

    `named` is the model that the file names, which is used if `model` is None and it is on this machine.
    """
    if any(tensor.norm(dim=-1).min() == 0 for tensor in vectors):
        raise UserError("a vector of norm 0 has no direction, so no other norm can be given to it")
    if isinstance(norm, str):
        if model is None and named is None:
            raise UserError(f"--renorm {norm} needs the model: give --pretrained_model_name_or_path")
        from dti_fast.backbones.load import model_at_hand
        from dti_fast.backbones.vocabulary import load_vocabularies

        weights = [vocabulary.weight for vocabulary in load_vocabularies(model or model_at_hand(named))]
        widths = [weight.shape[1] for weight in weights], [tensor.shape[1] for tensor in vectors]
        if widths[0] != widths[1]:
            raise UserError(f"the embedding is {widths[1]} wide, but this model's words are {widths[0]}")
    else:
        weights = vectors  # a number does not depend on the words
    rescaled = []
    for tensor, weight in zip(vectors, weights, strict=True):
        direction = torch.nn.functional.normalize(tensor.double(), dim=-1)
        rescaled.append((initial_magnitudes(weight, None, tensor, norm).double() * direction).float())
    return rescaled
