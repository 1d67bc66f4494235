"""LoRA in the UNet: float32 masters, switching, files that others load, the loss that holds it near the base model."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from steps import load_cpu

from dti_fast.backbones.configs import config_folder
from dti_fast.backbones.stable_diffusion_xl import StableDiffusionXL
from dti_fast.commands.generate import generate
from dti_fast.drawing import DrawSettings
from dti_fast.errors import UserError
from dti_fast.formats import write_embeddings
from dti_fast.frozen import layers, optimize_frozen
from dti_fast.frozen.quantise import quantise_frozen
from dti_fast.loss import dco_loss
from dti_fast.pipelines import load_lora, lora_of
from dti_fast.trainer.parts.adamw8bit import AdamW8bit, state_bytes
from dti_fast.trainer.parts.lora import Lora, write_lora


def unet_and_lora(folder, dtype=torch.float32, rank=4, alpha=8.0, seed=0):
    backbone = load_cpu(folder, dtype)
    return backbone, Lora(backbone, rank, alpha, seed)


def teach(lora, seed=1):
    """Give the B matrices values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in lora.parameters.items():
        if ".lora_B." in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


def predict(unet, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    config = unet.config
    latents = torch.randn(2, config.in_channels, 8, 8, generator=generator).to(dtype)
    hidden = torch.randn(2, 5, config.cross_attention_dim, generator=generator).to(dtype)
    added = {"text_embeds": torch.zeros(2, 40, dtype=dtype), "time_ids": torch.zeros(2, 6)}
    added = added if config.addition_embed_type else None
    return unet(latents, torch.tensor([10, 500]), hidden, added_cond_kwargs=added).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_are_float32_and_inert_at_first(tiny_pipelines, dtype):
    stock = load_cpu(tiny_pipelines["sd15"], dtype).denoiser
    backbone, lora = unet_and_lora(tiny_pipelines["sd15"], dtype)
    assert {p.dtype for p in lora.parameters.values()} == {torch.float32}
    assert backbone.denoiser.dtype == dtype
    out = predict(backbone.denoiser, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, predict(stock, dtype))
    out.float().square().sum().backward()
    grads = {name: p.grad for name, p in lora.parameters.items()}
    assert all(g.dtype == torch.float32 for g in grads.values())
    assert all((g.abs().sum() > 0) == (".lora_B." in name) for name, g in grads.items())  # A learns once B is not zero
    others = [p for n, p in backbone.denoiser.named_parameters() if ".lora_" not in n]
    assert not any(p.requires_grad for p in others)


def test_every_attention_projection_has_one(tiny_pipelines):
    backbone, lora = unet_and_lora(tiny_pipelines["sdxl"])
    projections = [
        n for n, _ in backbone.denoiser.named_modules() if n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    ]
    assert len(lora.parameters) == 2 * len(projections) > 0
    assert len(lora.layers) == len(projections)


def test_start_depends_on_the_seed_alone(tiny_pipelines):
    (_, a), (_, b), (_, c) = (unet_and_lora(tiny_pipelines["sd15"], seed=s) for s in (3, 3, 4))
    first = next(iter(a.parameters))
    assert ".lora_A." in first
    assert all(torch.equal(p, b.parameters[n]) for n, p in a.parameters.items())
    assert not torch.equal(a.parameters[first], c.parameters[first])
    everything = torch.cat([p.flatten() for n, p in a.parameters.items() if ".lora_A." in n])
    assert everything.std().item() == pytest.approx(1 / 4, rel=0.05)


def test_switched_off_it_is_the_base_model_and_frozen(tiny_pipelines):
    stock = load_cpu(tiny_pipelines["sd15"]).denoiser
    backbone, lora = unet_and_lora(tiny_pipelines["sd15"])
    teach(lora)
    taught, base = predict(backbone.denoiser), predict(stock)
    assert (taught - base).abs().max() > 1e-3
    with lora.base_model():
        reference = predict(backbone.denoiser)
    assert torch.equal(reference, base)
    assert not reference.requires_grad
    assert torch.equal(predict(backbone.denoiser), taught)
    assert all(p.requires_grad for p in lora.parameters.values())
    lora.enable(False)
    assert torch.equal(predict(backbone.denoiser), base)
    assert not any(p.requires_grad for p in lora.parameters.values())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_stock_pipeline_loads_what_was_written(tiny_pipelines, tmp_path, family, layout):
    """With alpha unlike the rank, so that a lost alpha shows."""
    backbone, lora = unet_and_lora(tiny_pipelines[family], rank=4, alpha=6.0)
    teach(lora)
    paths = write_lora(tmp_path, "<my-dog>", backbone.pipeline, lora, {"steps": 3})
    assert [p.name for p in paths] == ["pytorch_lora_weights.safetensors", "my-dog_lora.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)  # no temporary file left
    pipeline_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    stock = pipeline_class.from_pretrained(tiny_pipelines[family])
    stock.load_lora_weights(tmp_path, weight_name=paths[layout == "kohya"].name)
    torch.testing.assert_close(predict(stock.unet), predict(backbone.denoiser), rtol=1e-5, atol=1e-5)


def test_kohya_names(tiny_pipelines, tmp_path):
    backbone, lora = unet_and_lora(tiny_pipelines["sd15"], rank=4, alpha=6.0)
    _, kohya = write_lora(tmp_path, "<x>", backbone.pipeline, lora, {})
    tensors = load_file(kohya)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{stem}.lora_down.weight"].shape == (4, 32)
    assert tensors[f"{stem}.lora_up.weight"].shape == (32, 4)
    assert tensors[f"{stem}.alpha"].item() == 6
    assert len(tensors) == 3 * len(lora.layers)


def test_found_beside_an_embedding(tiny_pipelines, tmp_path):
    backbone, lora = unet_and_lora(tiny_pipelines["sd15"])
    teach(lora)
    write_lora(tmp_path, "<x>", backbone.pipeline, lora, {})
    write_embeddings(tmp_path, "<x>", [torch.randn(1, 32)], {"lora_rank": 4})
    for place in (tmp_path, tmp_path / "learned_embeds.safetensors"):
        stock = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
        assert load_lora(stock, place)
        torch.testing.assert_close(predict(stock.unet), predict(backbone.denoiser), rtol=1e-5, atol=1e-5)
    other = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines["sdxl"])
    with pytest.raises(UserError, match="does not fit this model"):
        load_lora(other, tmp_path)
    assert not load_lora(stock, tmp_path / "elsewhere" / "x.safetensors")


def test_nine_tenths_of_the_state_is_8_bit_on_the_pocket_model():
    _, lora = unet_and_lora("pocket", rank=4, alpha=4)
    magnitudes = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = AdamW8bit([*lora.parameters.values(), magnitudes])
    eight_bit, total, plain = state_bytes(optimizer)
    assert eight_bit / total > 0.9
    assert total < 0.3 * plain


def float64_dco(prediction, reference, target, beta):
    errors = [((x.double() - target.double()) ** 2).flatten(1).mean(1) for x in (prediction, reference)]
    return sum(-math.log(1 / (1 + math.exp(beta * (a - b).item()))) for a, b in zip(*errors, strict=True)) / len(target)


def test_dco_loss():
    generator = torch.Generator().manual_seed(0)
    prediction, target, noise = torch.randn(3, 5, 4, 8, 8, generator=generator)
    reference = prediction + 0.01 * noise
    prediction.requires_grad_()
    loss = dco_loss(prediction, reference, target, 100.0)
    assert loss.item() == pytest.approx(float64_dco(prediction.detach(), reference, target, 100.0), rel=1e-4)
    # Where both agree: log 2, and the gradient of beta / 2 times the squared error.
    (at_start,) = torch.autograd.grad(dco_loss(prediction, prediction.detach(), target, 100.0), prediction)
    (plain,) = torch.autograd.grad(50 * (prediction - target).square().mean(), prediction)
    torch.testing.assert_close(at_start, plain)
    assert dco_loss(prediction, prediction.detach(), target, 100.0).item() == pytest.approx(math.log(2))


def test_dco_lets_go_of_each_sample_for_itself():
    """A sample far better than the base model pulls no more, whatever the others do."""
    target = torch.zeros(2, 1, 2, 2)
    reference = torch.ones(2, 1, 2, 2)
    prediction = torch.stack([torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 2)]).requires_grad_()
    dco_loss(prediction, reference, target, 1000.0).backward()
    assert prediction.grad[0].abs().max() == 0
    assert prediction.grad[1].abs().max() == pytest.approx(1000 / 2 * 2 / 4 / 2)


def gradients(backbone, lora):
    """Of every LoRA parameter and the prompt, for one squared error."""
    generator = torch.Generator().manual_seed(2)
    config = backbone.denoiser.config
    latents = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    hidden = torch.randn(2, 5, config.cross_attention_dim, generator=generator).requires_grad_()
    out = backbone.denoiser(latents, torch.tensor([10, 500]), hidden).sample
    return torch.autograd.grad(out.square().mean(), [*lora.parameters.values(), hidden])


@pytest.mark.parametrize("recompute", ["none", "geglu", "block"])
@pytest.mark.parametrize("lora_first", [True, False])
def test_learns_the_same_among_frozen_layers_that_save_less(tiny_pipelines, monkeypatch, recompute, lora_first):
    monkeypatch.setattr(layers, "SMALL", 0)
    stock, stock_lora = unet_and_lora(tiny_pipelines["sd15"])
    teach(stock_lora)
    if lora_first:
        backbone, lora = unet_and_lora(tiny_pipelines["sd15"])
        optimize_frozen(backbone.denoiser, recompute=recompute)
    else:
        backbone = load_cpu(tiny_pipelines["sd15"])
        optimize_frozen(backbone.denoiser, recompute=recompute)
        lora = Lora(backbone, 4, 8.0, 0)
    teach(lora)
    for ours, theirs in zip(gradients(backbone, lora), gradients(stock, stock_lora), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_learns_on_a_quantised_base(tiny_pipelines, precision):
    """Gradients point where those of the full weights do; what the base's rounding leaves is the same LoRA."""
    stock, stock_lora = unet_and_lora(tiny_pipelines["sd15"])
    backbone = load_cpu(tiny_pipelines["sd15"])
    quantise_frozen(backbone.denoiser, precision)
    lora = Lora(backbone, 4, 8.0, 0)
    assert list(lora.parameters) == list(stock_lora.parameters)
    teach(lora)
    teach(stock_lora)
    flat = [torch.cat([g.flatten() for g in gradients(*pair)]) for pair in ((backbone, lora), (stock, stock_lora))]
    assert torch.cosine_similarity(*flat, dim=0) > {"int8": 0.995, "nf4": 0.9}[precision]


def test_two_concepts_with_a_lora_each_act_together(tiny_pipelines, tmp_path):
    weights = []
    for i in (1, 2):
        (tmp_path / str(i)).mkdir()
        backbone, lora = unet_and_lora(tiny_pipelines["sd15"])
        teach(lora, seed=i)
        write_lora(tmp_path / str(i), "<x>", backbone.pipeline, lora, {})
        weights.append(
            {n: m.get_delta_weight("default") for n, m in backbone.denoiser.named_modules() if hasattr(m, "lora_A")}
        )
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    base = {n: m.weight.detach().clone() for n, m in stock.unet.named_modules() if n in weights[0]}
    for i in (1, 2):
        assert load_lora(stock, tmp_path / str(i))
    stock.fuse_lora()
    for name, before in base.items():
        after = stock.unet.get_submodule(name).base_layer.weight
        torch.testing.assert_close(after, before + weights[0][name] + weights[1][name], rtol=1e-4, atol=1e-5)


def test_generate_draws_with_the_lora_beside_the_embedding(tiny_pipelines, tmp_path):
    embedding = tmp_path / "learned_embeds.safetensors"
    metadata = {"base_model": str(tiny_pipelines["sd15"]), "lora_rank": 4}
    write_embeddings(tmp_path, "<x>", [torch.randn(1, 32, generator=torch.Generator().manual_seed(0))], metadata)

    def drawn(name):
        path = tmp_path / name
        settings = DrawSettings(num_images=1, num_inference_steps=2)
        generate(prompt=["a <x>"], embedding=[embedding], output=path, settings=settings)
        return path.read_bytes()

    with pytest.warns(UserWarning, match="LoRA that was learned with <x> does not lie beside it"):
        without = drawn("without.png")
    backbone, lora = unet_and_lora(tiny_pipelines["sd15"])
    teach(lora)
    write_lora(tmp_path, "<x>", backbone.pipeline, lora, {})
    assert drawn("with.png") != without


def test_the_state_of_a_lora_for_sdxl():
    """The figures of docs/ancillary.md, of the real UNet without its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_folder("sdxl") / "unet"))
    backbone = SimpleNamespace(denoiser=unet.requires_grad_(False), lora_targets=StableDiffusionXL.lora_targets)
    lora = Lora(backbone, rank=4, alpha=4, seed=0)
    assert (len(lora.layers), sum(p.numel() for p in lora.parameters.values())) == (560, 5_806_080)
    eight_bit, total, plain = state_bytes(AdamW8bit(list(lora.parameters.values())))
    assert (eight_bit, total, plain) == (11_612_160, 11_794_624, 46_453_120)


def test_a_concepts_lora_leaves_with_it(tiny_pipelines, tmp_path):
    backbone, lora = unet_and_lora(tiny_pipelines["sd15"])
    teach(lora)
    write_lora(tmp_path, "<x>", backbone.pipeline, lora, {})
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    base = predict(stock.unet)
    for _ in range(2):
        with lora_of(stock, tmp_path):
            torch.testing.assert_close(predict(stock.unet), predict(backbone.denoiser), rtol=1e-5, atol=1e-5)
        assert torch.equal(predict(stock.unet), base)
    (tmp_path / "empty").mkdir()
    with lora_of(stock, tmp_path / "empty"):
        assert torch.equal(predict(stock.unet), base)
