"""The seam for model families: one class is enough to train and draw a family that the package does not know."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dti_fast import Session, TokenEmbedding, TrainConfig
from dti_fast.backbones import FAMILIES, Backbone
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.skeleton import skeleton
from dti_fast.errors import UserError
from dti_fast.memory.estimator import Estimator


class TwoClips(Backbone):
    """Stable Diffusion 3 without its T5: a flow, two CLIPs, a transformer."""

    def condition(self, tokens, sizes):
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder, (ids, _) in zip(self.text_encoders, tokens, strict=True)
        ]
        clips = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        width = self.denoiser.config.joint_attention_dim
        hidden = F.pad(clips, (0, width - clips.shape[-1], 0, 256))  # zeros in the place of T5's 256 tokens
        return {"encoder_hidden_states": hidden, "pooled_projections": torch.cat([o[0] for o in outputs], -1)}

    def denoise(self, noisy, time, condition):
        return self.denoiser(noisy.to(self.denoiser.dtype), timestep=time, **condition).sample.float()


def clip(tokenizer, width, projection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=projection, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizers = [tiny._tokenizer(False, pad) for pad in ("<|endoftext|>", "!")]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=clip(tokenizers[0], 16, 8), tokenizer=tokenizers[0],
        text_encoder_2=clip(tokenizers[1], 24, 12), tokenizer_2=tokenizers[1], text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("family") / "model"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "StableDiffusion3Pipeline", TwoClips)


def test_unknown_family_is_refused(folder):
    with pytest.raises(UserError, match=r"is a StableDiffusion3Pipeline; dti-fast trains StableDiffusionPipeline"):
        load_backbone(str(folder), torch.float32, torch.device("cpu"))


def test_one_class_trains_and_draws(folder, family, pictures, tmp_path):
    config = TrainConfig(
        train_data_dir=pictures, output_dir=tmp_path / "out", placeholder_token="<toy>", initializer_token="dog",
        num_vectors=2, max_train_steps=5, train_batch_size=2, resolution=32, num_validation_images=1,
        validation_prompt=["a photo of {}"], vram=4, recompute="block",
    )  # fmt: skip
    with Session(str(folder), device="cpu", vram=4) as session:
        result = session.learn(config)
        drawn = session.draw(["a photo of {}"], concept=result, steps=2, size=32)[0][0]
        word = session.draw(["a photo of dog"], steps=2, size=32)[0][0]
    assert all(angle > 1 for angle in result.angle_degrees)
    assert [p.name for p in result.embedding_paths] == [
        "learned_embeds.safetensors", "learned_embeds_2.safetensors", "toy.safetensors",
    ]  # fmt: skip
    assert result.preview_path.is_file()
    assert drawn.size == (32, 32)
    assert not np.array_equal(np.asarray(drawn), np.asarray(word))


def test_condition_is_the_stock_pipelines(folder, family):
    """Every argument of the stock pipeline's call of its denoiser, with two learned vectors in the prompt."""
    backbone = load_backbone(str(folder), torch.float32, torch.device("cpu"))
    for encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True):
        TokenEmbedding.install(encoder, tokenizer, "<toy>", init="dog", num_vectors=2)
    seen, forward = {}, backbone.denoiser.forward

    def look(**arguments):
        seen.update(arguments)
        return forward(**arguments)

    backbone.denoiser.forward = look
    try:
        backbone.pipeline(backbone.spell("a photo of <toy>"), num_inference_steps=1, guidance_scale=1.0,
                          height=32, width=32, output_type="latent")  # fmt: skip
    finally:
        del backbone.denoiser.forward
    with torch.no_grad():
        condition = backbone.condition(backbone.tokenize(["a photo of <toy>"]), torch.zeros(1, 6))
    assert condition.keys() <= seen.keys()
    for name, tensor in condition.items():
        assert torch.equal(tensor, seen[name]), name


def test_flow_path_is_the_schedulers(folder, family):
    backbone = load_backbone(str(folder), torch.float32, torch.device("cpu"))
    path, scheduler = backbone.path(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(path.b.flip(0), scheduler.sigmas[:1000], atol=1e-6, rtol=0)
    torch.testing.assert_close(path.time.flip(0), scheduler.timesteps, atol=1e-3, rtol=0)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    noisy, target = path.mix(latents, noise, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(noisy - path.b[[0, 500, 999]].view(-1, 1, 1, 1) * target, latents)


def test_it_is_counted(folder, family):
    estimator = Estimator(str(folder), torch.float32, batch=2, resolution=32)
    none, block = (estimator.count(mode, 2) for mode in ("none", "block"))
    parts = ["transformer_blocks.0", "transformer_blocks.1"]
    assert all(none.saved(part) > 0 for part in parts)
    assert block.flops(parts[0]) >= none.flops(parts[0])
    assert estimator.model.weights["fp32"] > 4 * 1000


def test_a_model_without_weights_draws_no_progress_bar(capfd):
    with FakeTensorMode():
        backbone = skeleton("pocket", torch.float32)
    backbone.tokenize(["a creature"])
    assert "it/s" not in capfd.readouterr().err
