"""The preview of a run: the training pictures, and what the model draws for the new word."""

from contextlib import nullcontext
from pathlib import Path

from PIL import Image, ImageOps

from dti_fast.backbones import Backbone
from dti_fast.backbones.base import decode_in_tiles
from dti_fast.data.folder import Picture
from dti_fast.drawing import draw, grid, save_picture
from dti_fast.trainer.config import Settings

STEPS = 25  # of denoising


def save_preview(
    config: Settings, backbone: Backbone, pictures: list[Picture], path: Path, tiled_decoding: bool = False
) -> None:
    """The training pictures, then a row of generated ones for every prompt, the init word's first.

    `tiled_decoding` needs less memory.
    """
    prompts = config.validation_prompt or backbone.default_prompts(config.learnable_property)
    backbone.vae.to(next(backbone.denoiser.parameters()).device)
    rows = [("training pictures", [_centre_square(p.path) for p in pictures[:8]])]
    named = [prompt.replace("{}", config.placeholder_token) for prompt in prompts]
    first = named[0].replace(config.placeholder_token, config.initializer_token)
    with decode_in_tiles(backbone.vae) if tiled_decoding else nullcontext():
        for prompt in (first, *named):
            images = draw(
                backbone, prompt, config.num_validation_images, config.seed, steps=STEPS, size=config.resolution
            )
            rows.append((prompt, images))
    save_picture(grid(rows), path)
    backbone.vae.to("cpu")


def _centre_square(path: Path) -> Image.Image:
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    return ImageOps.fit(turned, (min(turned.size),) * 2)
