"""`dti-fast inspect`: what an embedding file holds, and how it compares with a model's own words."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dti_fast import sphere
from dti_fast.backbones.load import is_at_hand, model_at_hand
from dti_fast.backbones.vocabulary import Vocabulary, load_vocabularies
from dti_fast.errors import UserError
from dti_fast.formats import EmbeddingFile, read_embedding_file
from dti_fast.tokens import initial_rows

NEAREST = 5  # words shown for each vector
WIDTH = 130  # columns of the table where there is no terminal


@dataclass(frozen=True)
class VectorReport:
    """One vector of one text encoder.

    Attributes:
        norm: its length.
        percentile: the share of the vocabulary's norms that lie below it, in percent.
        angle: degrees to the initial word, if that is known.
        nearest: words and their cosines, the closest first.
    """

    encoder: str
    index: int
    norm: float
    percentile: float | None = None
    angle: float | None = None
    nearest: tuple[tuple[str, float], ...] = ()


def measure(file: EmbeddingFile, vocabularies: list[Vocabulary] | None) -> list[VectorReport]:
    """A report on each vector; without vocabularies, its norm alone.

    Raises:
        UserError: if the vocabularies are another kind of model's.
    """
    widths = [tensor.shape[1] for tensor in file.vectors.values()]
    if vocabularies is not None and widths != [vocabulary.weight.shape[1] for vocabulary in vocabularies]:
        raise UserError(
            f"the embedding is {widths} wide, but this model's words are "
            f"{[vocabulary.weight.shape[1] for vocabulary in vocabularies]}"
        )
    initializer, reports = file.metadata.get("initializer_token"), []
    for encoder, vocabulary in zip(file.vectors, vocabularies or [None] * len(widths), strict=True):
        rows = file.vectors[encoder].float()
        norms = rows.norm(dim=-1)
        if vocabulary is None:
            reports += [VectorReport(encoder, i, norm) for i, norm in enumerate(norms.tolist())]
            continue
        angles = [None] * len(rows)
        if initializer:
            start = initial_rows(vocabulary.weight, vocabulary.tokenizer, initializer, len(rows))
            unit = [torch.nn.functional.normalize(tensor, dim=-1) for tensor in (rows, start)]
            angles = sphere.distance(*unit).rad2deg().tolist()
        for i, norm in enumerate(norms.tolist()):
            percentile = 100 * (vocabulary.norms < norm).float().mean().item()
            nearest = tuple(vocabulary.nearest(rows[i], NEAREST))
            reports.append(VectorReport(encoder, i, norm, percentile, angles[i], nearest))
    return reports


def inspect(file: Path, *, pretrained_model_name_or_path: str | None = None, allow_pickle: bool = False) -> None:
    """Print what an embedding file holds: layout, encoders, norms, and its nearest words.

    Parameters
    ----------
    file
        An embedding file of any tool, or the output folder of a run.
    pretrained_model_name_or_path
        The model whose words it is compared with. Default: the one the file names, if it is on this machine.
    allow_pickle
        Read a .pt or .bin file, as plain weights only.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    path, model = file, pretrained_model_name_or_path
    content = read_embedding_file(path, allow_pickle=allow_pickle)
    named = content.metadata.get("base_model")
    if model is None and named and is_at_hand(named):
        model = model_at_hand(named)
    vocabularies = None if model is None else load_vocabularies(model)
    reports = measure(content, vocabularies)

    console.print(f"{path}: {content.layout}")
    for name, tensor in content.vectors.items():
        count, width = tensor.shape
        dtype = str(tensor.dtype).removeprefix("torch.")
        console.print(f"  {name}: {count} vector{'s' if count > 1 else ''} of {width}, {dtype}")
    if content.ignored:
        console.print(f"  ignored, no input embeddings: {', '.join(content.ignored)}")
    for key, value in sorted(content.metadata.items()):
        if key != "format":
            console.print(f"  {key}: {value}")
    if vocabularies is None:
        console.print("Give --pretrained_model_name_or_path to compare it with a model's words.")
    else:
        quantiles = torch.tensor([0.01, 0.5, 0.99])
        for name, vocabulary in zip(content.vectors, vocabularies, strict=True):
            low, median, high = torch.quantile(vocabulary.norms, quantiles).tolist()
            mean = vocabulary.norms.mean().item()
            console.print(
                f"Words of {model} ({name}): norm {mean:.4f} on average, "
                f"median {median:.4f}, 98 % from {low:.4f} to {high:.4f}"
            )
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_table(reports, content.metadata.get("initializer_token")))
    if any(report.percentile == 100 for report in reports):
        console.print(
            "A norm above every word's drowns the rest of the prompt: "
            "dti-fast convert --renorm mean gives it that of an ordinary word."
        )


def _table(reports: list[VectorReport], initializer: str | None) -> Table:
    table = Table("encoder", "vector", "norm")
    compared = reports[0].percentile is not None
    if compared:
        table.add_column("percentile of words")
        if initializer:
            table.add_column(f"angle to {initializer!r}")
        table.add_column("nearest words (cosine)")
    for report in reports:
        cells = [report.encoder, str(report.index), f"{report.norm:.4f}"]
        if compared:
            cells.append(f"{report.percentile:.1f}")
            if initializer:
                cells.append(f"{report.angle:.1f}°")
            cells.append(", ".join(f"{word} {cosine:.2f}" for word, cosine in report.nearest))
        table.add_row(*cells)
    return table
