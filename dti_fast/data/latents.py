"""Pictures as the moments of their latents, encoded once."""

import torch
from torch import Tensor


@torch.no_grad()
def encode_moments(vae, pixels: Tensor, batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, scaled as the denoiser expects them.

    `mean + std * noise` with fresh noise has the distribution of encoding the picture anew.

    Args:
        vae: an AutoencoderKL in float32 or bfloat16; float16 overflows in SDXL's.
        pixels: `[N, 3, H, W]` in [-1, 1].

    Returns:
        mean, std: float32 `[N, C, h, w]` on the VAE's device.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    means, stds = [], []
    for chunk in pixels.split(batch_size):
        posterior = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist
        means.append((posterior.mean.float() - shift) * scale)
        stds.append(posterior.std.float() * scale)
    return torch.cat(means), torch.cat(stds)
