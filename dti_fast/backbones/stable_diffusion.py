"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, its last hidden state conditions the UNet."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dti_fast.backbones.base import Backbone, Path, diffusion_path
from dti_fast.files import hash_tensors


class StableDiffusion(Backbone):
    load_arguments: Mapping = {"safety_checker": None, "requires_safety_checker": False}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def path(self) -> Path:
        return diffusion_path(self.pipeline.scheduler)

    def metadata(self) -> dict[str, str]:
        return {"prediction_type": self.pipeline.scheduler.config.prediction_type}

    def condition(self, tokens, sizes: Tensor) -> dict:
        return {"encoder_hidden_states": self.text_encoders[0](tokens[0][0]).last_hidden_state}

    def denoise(self, noisy: Tensor, time: Tensor, condition: dict) -> Tensor:
        return self.denoiser(noisy.to(self.denoiser.dtype), time, **condition).sample.float()

    def blocks(self) -> list[str]:
        down, up = self.denoiser.down_blocks, self.denoiser.up_blocks
        return [
            *(f"down_blocks.{i}" for i in range(len(down))), "mid_block", *(f"up_blocks.{i}" for i in range(len(up))),
        ]  # fmt: skip

    def fingerprint(self) -> str:
        unet = self.denoiser
        weights = [text_encoder.get_input_embeddings().weight[:64] for text_encoder in self.text_encoders]
        weights += [unet.conv_in.weight, next(unet.mid_block.parameters()), unet.conv_out.weight]
        return hash_tensors(weight.to(torch.bfloat16) for weight in weights)
