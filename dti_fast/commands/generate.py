"""`dti-fast generate`: pictures with learned concepts."""

import warnings
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dti_fast.backbones import Backbone
from dti_fast.drawing import DrawSettings, check_picture_path, grid, save_picture
from dti_fast.errors import UserError
from dti_fast.formats import read_embeddings, token_names
from dti_fast.pipelines import find_lora, load_lora, load_vectors

Repeated = Parameter(consume_multiple=False)


def generate(
    *,
    prompt: Annotated[list[str], Repeated],
    embedding: Annotated[list[Path] | None, Repeated] = None,
    output: Path = Path("generated.png"),
    settings: DrawSettings | None = None,
) -> None:
    """Generate pictures with learned concepts; write their tokens, such as `<concept>`, into the prompt.

    Parameters
    ----------
    prompt
        What to draw, with the concept's token, or {} for it; may be given several times.
    embedding
        An embedding file, or the output folder of a run; may be given several times. Default: dti-output.
    output
        The picture to write: one row for each prompt.
    """
    settings, embeddings = settings or DrawSettings(), embedding or [Path("dti-output")]
    check_picture_path(output)
    settings.check()
    concepts = [read_embeddings(path) for path in embeddings]
    check_tokens(
        [(path, metadata["token"], len(v[0])) for path, (v, metadata) in zip(embeddings, concepts, strict=True)]
    )
    tokens = [metadata["token"] for _, metadata in concepts]
    if len(tokens) > 1 and any("{}" in text for text in prompt):
        raise UserError(
            f"with several concepts, write their tokens into the prompt instead of {{}}: {', '.join(tokens)}"
        )
    prompts = [text.replace("{}", tokens[0]) for text in prompt]
    for text in prompts:
        if not any(token in text for token in tokens):
            warnings.warn(f"the prompt {text!r} does not contain {' or '.join(tokens)}", stacklevel=2)
    poolings = {metadata.get("pooling", "eos") for _, metadata in concepts}
    if len(poolings) > 1:
        warnings.warn("the concepts were learned with different poolings; pooling at the end of the text", stacklevel=2)
    backbone = settings.load([metadata for _, metadata in concepts])
    for path, token, (vectors, _) in zip(embeddings, tokens, concepts, strict=True):
        pooling = "eos" if "eos" in poolings else "reference"
        load_vectors(backbone.pipeline, vectors, token, pooling=pooling, source=str(path))
    loras = {find_lora(path): path for path in embeddings}  # two files may share one
    for file, path in loras.items():
        if file is not None:
            load_lora(backbone.pipeline, path)
    for path, (_, metadata) in zip(embeddings, concepts, strict=True):
        if metadata.get("lora_rank", "0") != "0" and find_lora(path) is None:
            warnings.warn(f"the LoRA that was learned with {metadata['token']} does not lie beside it", stacklevel=2)
    warn_of_unseen(backbone, prompts, {token: len(v[0]) for token, (v, _) in zip(tokens, concepts, strict=True)})
    count = settings.num_images or 4
    rows = list(zip(prompts, settings.draw(backbone, prompts, count), strict=True))
    single = len(rows) == count == 1
    save_picture(rows[0][1][0] if single else grid(rows), output)
    print(f"wrote {output}")


def warn_of_unseen(backbone: Backbone, prompts: list[str], counts: dict[str, int]) -> None:
    """Warn of concepts, each a token with its number of vectors, that lie beyond what a text encoder sees."""
    last = {token: token_names(token, count)[-1] for token, count in counts.items()}
    unseen = {
        (prompt, token): len(row)
        for (ids, _), tokenizer in zip(backbone.tokenize(prompts), backbone.tokenizers, strict=True)
        for prompt, row in zip(prompts, ids.tolist(), strict=True)
        for token, name in last.items()
        if token in prompt and tokenizer.convert_tokens_to_ids(name) not in row
    }
    for (prompt, token), seen in unseen.items():
        warnings.warn(
            f"{token} lies beyond the {seen} tokens that the text encoder sees, so it is not drawn: {prompt[:40]!r}...",
            stacklevel=3,
        )


def check_tokens(concepts: list[tuple[Path, str, int]]) -> None:
    """Raise a UserError if two of the concepts, each a path, its token and its number of vectors, share a token."""
    owners: dict[str, Path] = {}
    for path, token, count in concepts:
        for name in token_names(token, count):
            if name in owners:
                raise UserError(
                    f"{str(owners[name])!r} and {str(path)!r} both call themselves {name}; give one another token: "
                    f'dti-fast convert "{path}" other.safetensors --token "<other>"'
                )
            owners[name] = path
