"""A model's word embeddings and tokenizers, without the rest of the model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dti_fast.backbones.components import component_names, load_part, reason
from dti_fast.backbones.configs import config_folder
from dti_fast.backbones.load import check_model, fetch, identify, index_of, locate
from dti_fast.errors import UserError
from dti_fast.quiet import quiet_libraries


@dataclass(frozen=True)
class Vocabulary:
    """A text encoder's words: `tokenizer`, and their embeddings float32 `[V, D]`."""

    tokenizer: object
    weight: Tensor

    @property
    def norms(self) -> Tensor:
        """The norms of all rows that are not zero."""
        norms = torch.linalg.vector_norm(self.weight, dim=-1)
        return norms[norms > 0]

    def ids(self, phrase: str) -> list[int]:
        return self.tokenizer(phrase, add_special_tokens=False).input_ids

    def nearest(self, vector: Tensor, count: int) -> list[tuple[str, float]]:
        """The `count` words closest to `vector` `[D]` by cosine, and the cosines; special tokens are left out."""
        rows = torch.nn.functional.normalize(self.weight, dim=-1)
        cosines = rows @ torch.nn.functional.normalize(vector.float(), dim=-1)
        cosines[self.tokenizer.all_special_ids] = -torch.inf
        best = cosines.topk(count)
        return list(zip([self.word(i) for i in best.indices.tolist()], best.values.tolist(), strict=True))

    def word(self, token_id: int) -> str:
        """A token as people write it; a piece that does not end its word ends in `…`."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        return piece.removesuffix("</w>") if piece.endswith("</w>") else f"{piece}…"


@quiet_libraries()
def load_vocabularies(name: str, *, variant: str | None = None) -> list[Vocabulary]:
    """The vocabulary of every text encoder of a diffusers folder, hub id or single file, in the model's order.

    Rows that no token has, which some vocabularies have at their end, are left out.

    Args:
        variant: as for `load_backbone`.

    Raises:
        UserError: if the model cannot be found or read.
    """
    check_model(name)
    from transformers import CLIPTokenizer

    source = locate(name)
    if Path(source).is_file():
        folder = config_folder(identify(Path(source)))
        tokenizers = [CLIPTokenizer.from_pretrained(path) for path in sorted(folder.glob("tokenizer*"))]
        try:
            with safe_open(source, framework="pt") as file:
                keys = sorted(key for key in file.keys() if key.endswith("token_embedding.weight"))  # noqa: SIM118
                weights = [file.get_tensor(key) for key in keys]
        except (OSError, SafetensorError) as error:
            raise UserError(f"the model {name!r} cannot be read: {reason(error)}") from None
        if len(weights) != len(tokenizers):
            raise UserError(
                f"the model {name!r} is incomplete: it has {len(weights)} vocabularies of {len(tokenizers)}"
            )
    else:
        index = index_of(source)
        names = component_names(index)
        if any(index.get(part) in (None, [None, None]) for part in names.tokenizers):
            raise UserError(f"the model {name!r} has a text encoder without a tokenizer")
        folder, variant = fetch(source, index, variant, (*names.text_encoders, *names.tokenizers))
        pairs = [
            [load_part(folder, part, index[part], torch.float32, variant) for part in pair]
            for pair in zip(names.text_encoders, names.tokenizers, strict=True)
        ]
        tokenizers = [tokenizer for _, tokenizer in pairs]
        weights = [text_encoder.get_input_embeddings().weight.detach() for text_encoder, _ in pairs]
    return [
        Vocabulary(tokenizer, weight[: len(tokenizer)].float())
        for tokenizer, weight in zip(tokenizers, weights, strict=True)
    ]
