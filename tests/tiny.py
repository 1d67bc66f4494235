"""Random-weight pipelines in the layouts of Stable Diffusion 1.5, 2.1 and XL, small enough for a CPU.

They make 64 x 64 pixel images from 8 x 8 latents. Widths that could be mistaken for one another
differ: of the two text encoders, of the pooled projection, of the cross-attention.
"""

import re
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dti_fast.backbones.clip_vocabulary import write_clip_vocabulary
from dti_fast.backbones.configs import config_folder

WORDS = """a an the of in on at with and to photo picture painting drawing style close up good small large
dog cat bear toy cup shoe car tree grass beach snow city mountain garden street forest moon red blue green
person wearing hat book chair"""

_UNETS = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    },
    "sd21": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
    },
}


def save_tiny_pipeline(family: str, folder: Path, *, real_vocabulary: bool = False, seed: int = 0) -> Path:
    """Write a diffusers folder of `family` ("sd15", "sd21" or "sdxl") and return it.

    The small vocabulary makes one token of each word in `WORDS` and bytes of all other text; the
    real one has CLIP's 49,408 entries. Equal arguments give equal weights.
    """
    _tiny_pipeline(family, real_vocabulary, seed).save_pretrained(folder)
    return Path(folder)


def save_tiny_single_file(family: str, path: Path, *, real_vocabulary: bool = False, seed: int = 0) -> Path:
    """Write the weights of `save_tiny_pipeline` under the original names into one safetensors file.

    diffusers' `from_single_file` loads it with `config=` the folder `save_tiny_pipeline` wrote.
    """
    pipeline = _tiny_pipeline(family, real_vocabulary, seed)
    save_file({name: tensor.contiguous() for name, tensor in original_state_dict(family, pipeline).items()}, path)
    return Path(path)


def original_state_dict(family: str, components: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """The weights of `components` (any object with `unet`, `vae`, `text_encoder`...) under the original names."""
    unet = components.unet
    state = {
        f"model.diffusion_model.{_unet_name(name, unet.config)}": tensor for name, tensor in unet.state_dict().items()
    }
    for name, tensor in components.vae.state_dict().items():
        is_attention_matrix = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        original = f"first_stage_model.{_vae_name(name, len(components.vae.config.block_out_channels))}"
        state[original] = tensor[:, :, None, None] if is_attention_matrix else tensor
    if family == "sd21":
        state |= _open_clip_state_dict(components.text_encoder, "cond_stage_model.model.")
        return state
    prefix = "cond_stage_model.transformer." if family == "sd15" else "conditioner.embedders.0.transformer."
    for name, tensor in components.text_encoder.state_dict().items():
        state[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = tensor
    if family == "sdxl":
        state |= _open_clip_state_dict(components.text_encoder_2, "conditioner.embedders.1.model.")
    return state


def _tiny_pipeline(family: str, real_vocabulary: bool, seed: int) -> DiffusionPipeline:
    is_xl = family == "sdxl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, **_UNETS[family]
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=16,
            scaling_factor=0.13025 if is_xl else 0.18215,
            force_upcast=is_xl,
        )
        components = {"unet": unet, "vae": vae, "scheduler": _scheduler(family)}
        clip_tokenizer = _tokenizer(real_vocabulary, pad_token="<|endoftext|>")
        open_clip_tokenizer = _tokenizer(real_vocabulary, pad_token="!")
        if family == "sd21":
            components["tokenizer"] = open_clip_tokenizer
            components["text_encoder"] = CLIPTextModel(_open_clip_config(open_clip_tokenizer))
        else:
            components["tokenizer"] = clip_tokenizer
            components["text_encoder"] = CLIPTextModel(_clip_config(clip_tokenizer))
        if is_xl:
            # The published config says 2: pooling then takes the largest token id for the end of the text.
            config = _open_clip_config(open_clip_tokenizer, eos_token_id=2)
            components["tokenizer_2"] = open_clip_tokenizer
            components["text_encoder_2"] = CLIPTextModelWithProjection(config)
            return StableDiffusionXLPipeline(**components)
    return StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _scheduler(family: str) -> PNDMScheduler | DDIMScheduler | EulerDiscreteScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if family == "sd15":
        return PNDMScheduler(**betas, skip_prk_steps=True)
    if family == "sd21":
        return DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    return EulerDiscreteScheduler(**betas, timestep_spacing="leading")


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return _text_config(tokenizer, hidden_size=32, num_attention_heads=2, projection_dim=32, hidden_act="quick_gelu")


def _open_clip_config(tokenizer: CLIPTokenizer, **overrides) -> CLIPTextConfig:
    arguments = {"hidden_size": 48, "num_attention_heads": 3, "projection_dim": 40, "hidden_act": "gelu"}
    return _text_config(tokenizer, **arguments | overrides)


def _text_config(tokenizer: CLIPTokenizer, **arguments) -> CLIPTextConfig:
    defaults = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPTextConfig(**defaults | arguments)


def _tokenizer(real_vocabulary: bool, pad_token: str) -> CLIPTokenizer:
    if real_vocabulary:
        return CLIPTokenizer.from_pretrained(config_folder("sd15") / "tokenizer", pad_token=pad_token)
    with tempfile.TemporaryDirectory() as folder:
        write_clip_vocabulary(Path(folder), word_merges(WORDS.split()))
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=77)


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each of `words`, which hold ASCII letters only."""
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == pair:
                    symbols[i : i + 2] = ["".join(pair)]
                i += 1
        # Later merges have lower rank, so they leave the words before this one whole.
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = [symbols[0] + symbols[1]]
    return merges


_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE_BLOCKS = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
_VAE_NAMES = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
_OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "final_layer_norm.": "ln_final.",
}


def _unet_name(name: str, config) -> str:
    """`name` of a diffusers UNet as the original code calls it: blocks numbered in one run down and one up."""
    for new, old in _UNET_NAMES.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    if name.startswith("mid_block."):
        _, kind, index, rest = name.split(".", 3)
        return f"middle_block.{_MIDDLE_BLOCKS[f'{kind}.{index}']}.{_resnet_name(rest)}"
    direction, block, kind, layer, rest = name.split(".", 4)
    row = config.layers_per_block + 1
    first = int(block) * row
    if kind == "downsamplers":
        return f"input_blocks.{first + row}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        position = 2 if "CrossAttn" in config.up_block_types[int(block)] else 1
        return f"output_blocks.{first + row - 1}.{position}.{rest}"
    number = (
        f"input_blocks.{first + 1 + int(layer)}"
        if direction == "down_blocks"
        else f"output_blocks.{first + int(layer)}"
    )
    return f"{number}.{'0' if kind == 'resnets' else '1'}.{_resnet_name(rest)}"


def _resnet_name(rest: str) -> str:
    module, _, parameter = rest.partition(".")
    return f"{_RESNET_NAMES.get(module, module)}.{parameter}"


def _vae_name(name: str, block_count: int) -> str:
    """`name` of a diffusers VAE as the original code calls it: the decoder's blocks are numbered from the output."""
    for new, old in _VAE_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(new)}\.", rf"\g<1>{old}.", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name).replace("resnets.", "block.")
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{block_count - 1 - int(match[1])}", name)


def _open_clip_state_dict(model: CLIPTextModel, prefix: str) -> dict[str, torch.Tensor]:
    """Weights as OpenCLIP holds them: query, key and value in one matrix, the projection transposed."""
    state = {}
    weights = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        original = name
        for new, old in _OPEN_CLIP_NAMES.items():
            original = original.replace(new, old)
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            state[prefix + original.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif name == "text_projection.weight":
            state[f"{prefix}text_projection"] = tensor.T
        elif "k_proj" not in name and "v_proj" not in name:
            state[prefix + original] = tensor
    return state
