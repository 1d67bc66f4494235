"""Pictures of prompts, laid out and saved."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter
from PIL import Image, ImageDraw, ImageFont

from dti_fast.backbones import Backbone
from dti_fast.backbones.load import check_model, load_backbone, model_at_hand
from dti_fast.devices import pick_device, pick_precision
from dti_fast.errors import UserError
from dti_fast.files import replacing
from dti_fast.limits import check_limits
from dti_fast.progress import phase, track


def draw(backbone: Backbone, prompt: str, count: int, seed: int, **settings) -> list[Image.Image]:
    """`count` pictures of `prompt`; picture i depends on seed + i alone, not on the device.

    `settings` are those of `Backbone.draw`.
    """
    return [picture for i in range(count) for picture in backbone.draw([prompt], [seed + i], **settings)]


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name, then rename it."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def grid(rows: list[tuple[str, list[Image.Image]]], largest: int | None = None, gap: int = 6) -> Image.Image:
    """Labelled rows of square pictures, all as wide as the first, or `largest` pixels if that is less.

    Below 128 pixels they are enlarged, without smoothing.
    """
    label_height = 20
    width = rows[0][1][0].width
    cell = max(128, width if largest is None else min(largest, width))
    columns = max(len(pictures) for _, pictures in rows)
    width, height = columns * (cell + gap) + gap, len(rows) * (cell + label_height + gap) + gap
    sheet = Image.new("RGB", (max(width, 480), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for r, (label, pictures) in enumerate(rows):
        top = gap + r * (cell + label_height + gap)
        draw.text((gap, top), label, fill="black", font=font)
        for c, picture in enumerate(pictures):
            resample = Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
            sheet.paste(
                picture.convert("RGB").resize((cell, cell), resample), (gap + c * (cell + gap), top + label_height)
            )
    return sheet


@Parameter(name="*")
@dataclass(kw_only=True, frozen=True)
class DrawSettings:
    """How concepts are drawn."""

    pretrained_model_name_or_path: str | None = None
    """Diffusers folder, hub id or .safetensors file. Default: the model the concept was learned on."""
    variant: str | None = None
    """Which weights of a diffusers folder to load, such as fp16. Default: the plain ones, or what there is."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the model was trained to predict, where its files do not say. Default: as when the concept was learned."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps or xpu; auto is the first GPU there is."""
    num_images: int | None = None
    """Pictures for each prompt. Default: 4, or 1 for a blend."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Default: the pipeline's own."""
    seed: int = 0
    """Picture i is drawn with seed + i."""

    def check(self) -> None:
        """Raise a UserError for a setting out of range."""
        check_limits(vars(self))

    def load(self, metadata: list[dict]) -> Backbone:
        """The model to draw with, for concepts with the `metadata` of their files."""
        model, prediction_type = pick_model(self.pretrained_model_name_or_path, self.prediction_type, metadata)
        device = pick_device(self.device)
        with phase("loading the model"):
            return load_backbone(
                model,
                pick_precision("auto", device),
                device,
                prediction_type=prediction_type,
                variant=self.variant,
            )

    def draw(self, backbone: Backbone, prompts: Sequence[str], count: int) -> list[list[Image.Image]]:
        """`count` pictures for each prompt, with word on the progress."""
        steps, guidance = self.num_inference_steps, self.guidance_scale
        tasks = [(prompt, self.seed + i) for prompt in prompts for i in range(count)]
        drawn = [
            draw(backbone, prompt, 1, seed, steps=steps, guidance_scale=guidance)[0]
            for prompt, seed in track(tasks, "drawing")
        ]
        return [drawn[start : start + count] for start in range(0, len(drawn), count)]


def check_picture_path(path: Path) -> None:
    """Raise a UserError unless `path` can be written as a PNG."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--output must be a .png file, got {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} for --output {str(path)!r}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"the folder {str(path.parent)!r} of --output cannot be written; choose another")


def pick_model(model: str | None, prediction_type: str | None, metadata: list[dict]) -> tuple[str, str | None]:
    """The model to draw with, and what it predicts: by default those of the first concept that says its model."""
    if model is None:
        named = next((m for m in metadata if "base_model" in m), None)
        if named is None:
            raise UserError("the file does not say which model it is for: give --pretrained_model_name_or_path")
        model, prediction_type = model_at_hand(named["base_model"]), prediction_type or named.get("prediction_type")
    check_model(model)
    return model, prediction_type
