"""Model families: a file for each, and the table of all."""

from dti_fast.backbones.base import Backbone
from dti_fast.backbones.stable_diffusion import StableDiffusion
from dti_fast.backbones.stable_diffusion_xl import StableDiffusionXL

# The diffusers pipeline that a model folder names -> the family.
FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}
