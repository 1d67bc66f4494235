"""LoRA layers in the denoiser, trained beside the embedding: adding, switching and writing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from dti_fast.backbones import Backbone
from dti_fast.errors import UserError
from dti_fast.files import replacing, write_tensors
from dti_fast.formats import lora_paths


class Lora:
    """peft's LoRA layers on the family's `lora_targets`, all attention projections, y = W x + alpha / rank B A x.

    A `[rank, in]` starts from N(0, 1/rank^2), drawn on the CPU from `seed`, and B `[out, rank]` from zero.  Both are
    float32 whatever the denoiser's dtype: peft casts the input up and the sum down.

    Attributes:
        parameters: name -> parameter, in the denoiser's order.
    """

    def __init__(self, backbone: Backbone, rank: int, alpha: float, seed: int):
        if not backbone.lora_targets:
            raise UserError(f"--lora_rank is not offered for a {type(backbone.pipeline).__name__}; leave it out")
        denoiser = backbone.denoiser
        denoiser.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(backbone.lora_targets)
            )
        )
        self.denoiser, self.alpha = denoiser, alpha
        self.layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        self.parameters = {
            name.replace(".default", ""): p for name, p in denoiser.named_parameters() if ".lora_" in name
        }
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.parameters.items():
            p.data = p.data.float()
            if ".lora_A." in name:
                p.data.copy_(torch.randn(p.shape, generator=generator) / rank)

    def enable(self, enabled: bool) -> None:
        """Let the layers act and learn, or be inert and frozen."""
        for layer in self.layers:
            layer.enable_adapters(enabled)

    def remove(self) -> None:
        """Put the projections back as they were before."""
        for name, module in list(self.denoiser.named_modules()):
            if isinstance(module, BaseTunerLayer):
                self.denoiser.set_submodule(name, module.get_base_layer())
        del self.denoiser.peft_config, self.denoiser._hf_peft_config_loaded

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """The denoiser without its LoRA, and without gradients."""
        self.enable(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.enable(True)


def write_lora(folder: Path, placeholder: str, pipeline: DiffusionPipeline, lora: Lora, metadata: dict) -> list[Path]:
    """Write the LoRA for `pipeline.load_lora_weights(folder)`, and for kohya, ComfyUI and A1111.

    `pytorch_lora_weights.safetensors` is diffusers' own file, rank and alpha in its header;
    `<placeholder>_lora.safetensors` has kohya's names (`lora_unet_..._to_q.lora_down.weight`, `.alpha`).
    """
    weights = get_peft_model_state_dict(lora.denoiser)
    path, kohya_path = lora_paths(folder, placeholder)
    with replacing(path) as temporary:
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(weights),
            unet_lora_adapter_metadata=lora.denoiser.peft_config["default"].to_dict(),
            weight_name=temporary.name,
        )
    kohya = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in weights.items()})
    # diffusers writes the rank for alpha.
    kohya = {n: torch.tensor(float(lora.alpha)) if n.endswith(".alpha") else t for n, t in kohya.items()}
    write_tensors(kohya, kohya_path, {"format": "pt", **metadata})
    return [path, kohya_path]
