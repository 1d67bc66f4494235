"""The bundled pocket model: Stable Diffusion's layout, with prompts and settings of its own."""

from pathlib import Path

from dti_fast.backbones.stable_diffusion import StableDiffusion

_FOLDER = Path(__file__).parent.parent / "pocket"


class Pocket(StableDiffusion):
    name = "pocket"
    folder = _FOLDER / "model"
    concept = _FOLDER / "concept"  # pictures of the creature that `dti-fast train` learns
    initializer = "creature"
    guidance_scale = 4.0  # the pipelines' default of 7.5 is too strong for so small a model

    def default_prompts(self, learnable_property: str) -> tuple[str, ...]:
        return (
            "a photo of a {}",
            "a photo of a {} on the beach",
            "a photo of a {} wearing a crown in the snow",
            "a photo of a {} wearing sunglasses in a city at night",
            "a pencil sketch of a {}",
            "a neon sign of a {} on the moon",
        )
