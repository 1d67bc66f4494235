"""Pictures as the moments of their latents, encoded once."""

import torch
from torch import Tensor

from dti_fast.backbones import Backbone


@torch.no_grad()
def encode_moments(backbone: Backbone, pixels: Tensor, batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pictures, as the denoiser expects them.

    `mean + std * noise` with fresh noise has the distribution of encoding the picture anew.

    Args:
        backbone: its VAE in float32 or bfloat16; float16 overflows in SDXL's.
        pixels: `[N, 3, H, W]` in [-1, 1].

    Returns:
        mean, std: float32 `[N, C, h, w]` on the VAE's device.
    """
    vae = backbone.vae
    chunks = (backbone.encode(chunk.to(vae.device, vae.dtype)) for chunk in pixels.split(batch_size))
    means, stds = zip(*chunks, strict=True)
    return torch.cat(means), torch.cat(stds)
