"""The seam of model families: what a backbone does is what its stock pipeline and scheduler do."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from steps import load_cpu

from dti_fast import TokenEmbedding
from dti_fast.backbones.base import diffusion_path, flow_path
from dti_fast.errors import UserError

families = pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])


@families
def test_drawing_is_the_stock_pipelines(tiny_pipelines, family):
    prompts, seeds, settings = ["a photo of a dog", "a red cat on grass"], [3, 8], {"guidance_scale": 5.0}
    stock = DiffusionPipeline.from_pretrained(tiny_pipelines[family])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = stock(prompts, generator=generators, num_inference_steps=2, height=64, width=64, **settings).images
    backbone = load_cpu(tiny_pipelines[family])
    drawn = backbone.draw(prompts, seeds, steps=2, size=64, **settings)
    assert len(drawn) == 2
    for picture, stock_picture in zip(drawn, expected, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(stock_picture))
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[1]))
    (alone,) = backbone.draw(prompts[1:], seeds[1:], steps=2, **settings)  # and the size is the model's own
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(drawn[1])).max() <= 1
    assert "decode" not in vars(backbone.vae)


@families
@pytest.mark.parametrize("count", [1, 2])
def test_tokens_are_the_tokenizers(tiny_pipelines, family, count):
    """Padded and cut as CLIP's pipelines do, the placeholder written as all of its tokens."""
    backbone = load_cpu(tiny_pipelines[family])
    embeddings = [
        TokenEmbedding.install(encoder, tokenizer, "<x>", init="dog", num_vectors=count)
        for encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True)
    ]
    prompts = ["a photo of <x>", "<x>", "A Red <x>, on the BEACH with <x>!", "a <x>" + " in the snow" * 40, ""]
    found = backbone.tokenize(prompts)
    assert len(found) == len(backbone.tokenizers) == (2 if family == "sdxl" else 1)
    for (ids, mask), tokenizer, embedding in zip(found, backbone.tokenizers, embeddings, strict=True):
        spelled = [prompt.replace("<x>", " ".join(embedding.tokens)) for prompt in prompts]
        expected = tokenizer(spelled, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        assert torch.equal(ids, expected.input_ids)
        assert torch.equal(mask, torch.ones_like(ids))  # these pipelines give their encoders none
        assert (ids[0] >= embedding.first_id).sum() == count


def test_recording_tokens_leaves_the_models_alone(tiny_pipelines):
    backbone = load_cpu(tiny_pipelines["sdxl"])
    before = [vars(module).copy() for module in backbone.modules()]
    backbone.tokenize(["a dog", "a cat"])
    assert [vars(module).keys() for module in backbone.modules()] == [old.keys() for old in before]
    assert len(backbone.draw(["a dog"], [0], steps=1)) == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_diffusion_path_is_the_ddpms(kind):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    path = diffusion_path(DDIMScheduler(**betas, prediction_type=kind))
    ddpm, rows = DDPMScheduler(**betas, prediction_type=kind), torch.arange(1000)
    assert torch.equal(path.time, rows)
    assert len(path) == 1000
    latents, noise = torch.randn(2, 1000, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    noisy, target = path.mix(latents, noise, rows)
    assert torch.equal(noisy, ddpm.add_noise(latents, noise, rows))
    assert torch.equal(target, noise if kind == "epsilon" else ddpm.get_velocity(latents, noise, rows))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_path_is_the_flow_match_schedulers(shift):
    path, scheduler = flow_path(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(path.b.flip(0), scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(path.time.flip(0), scheduler.timesteps, rtol=0, atol=1e-3)
    latents, noise = torch.randn(2, 1000, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    noisy, target = path.mix(latents, noise, torch.arange(1000))
    expected = scheduler.scale_noise(latents, scheduler.timesteps.flip(0), noise)
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-5)
    assert torch.equal(target, noise - latents)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), "predicts 'sample'; only epsilon and v_prediction"),
        (EDMEulerScheduler(), r"\(EDMEulerScheduler\) is none that can be trained"),
        (FlowMatchEulerDiscreteScheduler(), r"\(FlowMatchEulerDiscreteScheduler\) is none that can be trained"),
    ],
    ids=["sample", "edm", "flow"],
)
def test_a_noise_process_that_cannot_be_trained(scheduler, message):
    with pytest.raises(UserError, match=message):
        diffusion_path(scheduler)


def decode_by(pipeline, latents, **embeddings):
    """What a pipeline makes of denoised latents, `[N, 3, H, W]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.step = lambda *_, **__: (latents,)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt", "height": 64, "width": 64}
    return pipeline(**embeddings, **settings).images


def sd3_around(vae):
    """A tiny Stable Diffusion 3 without text encoders, whose pipeline knows a `shift_factor`."""
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
    )  # fmt: skip
    absent = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, **absent)


@pytest.mark.parametrize("kind", ["plain", "shift_factor", "latents_mean"])
def test_encoding_undoes_what_the_pipeline_does_before_decoding(tiny_pipelines, kind):
    """A sample of `encode` is decoded by the stock pipeline to what the VAE makes of its own sample."""
    backbone = load_cpu(tiny_pipelines["sdxl"])
    vae = backbone.vae
    generator = torch.Generator().manual_seed(0)
    pixels, noise = 2 * torch.rand(1, 3, 64, 64, generator=generator) - 1, torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        expected = (vae.decode(posterior.mean + posterior.std * noise).sample / 2 + 0.5).clamp(0, 1)
        plain, _ = backbone.encode(pixels)
        if kind == "shift_factor":
            vae.register_to_config(shift_factor=0.7)
        elif kind == "latents_mean":
            vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.6], latents_std=[0.5, 2.0, 1.5, 0.8])
        mean, std = backbone.encode(pixels)
        assert ((mean - plain).abs().max() > 0.05) == (kind != "plain")
        if kind == "shift_factor":
            embeddings = {"prompt_embeds": torch.zeros(1, 3, 16), "pooled_prompt_embeds": torch.zeros(1, 16)}
            decoded = decode_by(sd3_around(vae), mean + std * noise, **embeddings)
        else:
            decoded = decode_by(backbone.pipeline, mean + std * noise, prompt="a dog")
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
