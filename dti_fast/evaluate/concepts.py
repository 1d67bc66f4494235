"""What is evaluated: learned concepts, the pictures they were learned from, and the settings."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from dti_fast.backbones.pocket import Pocket
from dti_fast.data.folder import find_pictures
from dti_fast.drawing import pick_model
from dti_fast.errors import UserError
from dti_fast.evaluate.scorers import DINO, SIGLIP
from dti_fast.formats import read_embeddings


@Parameter(name="*")
@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    pretrained_model_name_or_path: str | None = None
    """Diffusers folder, hub id or .safetensors file. Default: the model the concepts were learned on."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the model was trained to predict, where its files do not say. Default: as when the concepts were learned."""
    train_data_dir: Path | None = None
    """Pictures of the concept; for several concepts, a folder with one of these by the name of each. Default: the
    pictures it was learned from."""
    mask_dir: Path | None = None
    """White-on-black masks of the subject, named as its pictures; with folders as --train_data_dir has. A picture is
    multiplied with its mask; generated ones are not."""
    class_word: str | None = None
    """What the concept is, in words that SigLIP knows. Default: the initializer token."""
    prompts: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None
    """Prompt sets: simple, complex, style, or text files with a {} in every line. Default: simple and complex, or style
    for a style."""
    subject: Literal["object", "live"] = "object"
    """Which wording of the sets: for things, or for animals and people, who can wear a hat."""
    seeds: Annotated[list[int], Parameter(consume_multiple=True)] = (0, 1, 2, 3)
    """One picture for each prompt and seed."""
    num_inference_steps: int | None = None
    """Denoising steps. Default: the pipeline's own."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Default: the pipeline's own."""
    batch_size: int = 4
    """Pictures drawn at a time."""
    dino: str = DINO
    """DINOv2 folder or hub id."""
    siglip: str = SIGLIP
    """SigLIP folder or hub id."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps or xpu; auto is the first GPU there is."""
    output_dir: Path = Path("evaluation")
    """Where pictures, results.json, results.md and sheet.png go. Pictures that are there are not drawn again."""


@dataclass(frozen=True)
class Concept:
    """A learned concept and what it is compared with.

    `folder` is where it lies, or its file; a LoRA that was learned with it lies there too.
    """

    name: str
    folder: Path
    vectors: list[torch.Tensor]
    metadata: dict[str, str]
    model: str
    prediction_type: str | None
    pictures: Path
    masks: Path | None
    class_word: str | None  # None only of the pocket model, whose benchmark needs none
    is_style: bool


def read_concepts(paths: Sequence[Path], config: EvaluateConfig) -> list[Concept]:
    """The concepts at `paths`, embedding files or output folders of runs.

    Raises:
        UserError: for a file that is no embedding, or a concept without pictures or class word.
    """
    concepts, names = [], _names(paths)
    for path, name in zip(paths, names, strict=True):
        vectors, metadata = read_embeddings(path)
        folder = path if path.is_dir() else path.parent
        settings = {}
        if (folder / "config.toml").is_file():
            settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        pictures, masks = config.train_data_dir, config.mask_dir
        if len(paths) > 1:
            pictures, masks = (root and root / name for root in (pictures, masks))
        pictures = pictures or settings.get("train_data_dir")
        if masks is not None and not masks.is_dir():
            raise UserError(f"there is no folder {str(masks)!r} of masks; --mask_dir takes one")
        if pictures is None:
            raise UserError(f"{str(path)!r} does not say which pictures it was learned from; give --train_data_dir")
        find_pictures(Path(pictures))
        model, prediction_type = pick_model(config.pretrained_model_name_or_path, config.prediction_type, [metadata])
        class_word = config.class_word or metadata.get("initializer_token")
        if class_word is None and model != Pocket.name:
            raise UserError(f"{str(path)!r} does not say what it is; give --class_word, such as dog")
        is_style = settings.get("learnable_property") == "style"
        concepts.append(
            Concept(name, path, vectors, metadata, model, prediction_type, Path(pictures), masks, class_word, is_style)
        )
    return concepts


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.stem if path.suffix == ".safetensors" else path.resolve().name for path in paths]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise UserError(f"two concepts are called {', '.join(sorted(doubled))}; rename the files or folders")
    return names
