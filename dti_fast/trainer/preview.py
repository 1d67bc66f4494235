"""The preview of a run: the training pictures, and what the model draws for the new word."""

from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from dti_fast.backbones import Backbone
from dti_fast.backbones.base import decode_in_tiles
from dti_fast.data.folder import Picture, load_pictures
from dti_fast.drawing import grid, save_picture
from dti_fast.memory.budget import Budget
from dti_fast.trainer.config import Settings

STEPS = 25  # of denoising


def save_preview(config: Settings, backbone: Backbone, pictures: list[Picture], path: Path, budget: Budget) -> None:
    """The training pictures as the model sees them, then a generated row for every prompt, the init word's first.

    The pictures are drawn in batches, as many at once as the `budget` has room for.
    """
    prompts = config.validation_prompt or backbone.default_prompts(config.learnable_property)
    named = [prompt.replace("{}", config.placeholder_token) for prompt in prompts]
    labels = [named[0].replace(config.placeholder_token, config.initializer_token), *named]
    count, size = config.num_validation_images, config.resolution or backbone.default_resolution()
    wanted = [(prompt, config.seed + i) for prompt in labels for i in range(count)]
    backbone.vae.to(next(backbone.denoiser.parameters()).device)
    drawn: list[Image.Image] = []
    with decode_in_tiles(backbone.vae) if budget.tiled_decoding else nullcontext():
        at_once = budget.drawn_at_once(size)
        for first in range(0, len(wanted), at_once):
            batch = wanted[first : first + at_once]
            drawn += backbone.draw(*zip(*batch, strict=True), steps=STEPS, size=config.resolution)
    backbone.vae.to("cpu")
    rows = [(label, drawn[i * count : (i + 1) * count]) for i, label in enumerate(labels)]
    pixels, _ = load_pictures(pictures[:8], size)
    training = [Image.fromarray(p) for p in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    save_picture(grid([("training pictures", training), *rows], largest=512), path)
