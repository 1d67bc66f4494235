"""Quantised frozen Linears: which, how exact, what they keep, what they weigh."""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dti_fast.backbones.configs import config_folder
from dti_fast.errors import UserError
from dti_fast.frozen import layers
from dti_fast.frozen.engine import optimize_frozen, restore
from dti_fast.frozen.quantise import PRECISIONS, quantise_frozen, weight_bytes
from dti_fast.memory.live_bytes import LiveBytes


def frozen_linear(in_features=96, out_features=80, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).to(dtype).requires_grad_(False)


def components(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    models = [pipeline.unet, pipeline.text_encoder]
    if hasattr(pipeline, "text_encoder_2"):
        models.append(pipeline.text_encoder_2)
    return [model.requires_grad_(False).eval() for model in models]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replaced_layers(tiny_pipelines, precision):
    unet, text_encoder, text_encoder_2 = components(tiny_pipelines["sdxl"])
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    plain = {name for name, child in unet.named_modules() if type(child) is nn.Linear}
    replaced = set(quantise_frozen(unet, precision))
    assert {name for name, child in unet.named_modules() if type(child) is nn.Linear} == plain - replaced
    assert plain - replaced == {f"{name}_embedding.linear_{i}" for name in ("time", "add") for i in (1, 2)}
    assert {name for name in replaced if name.startswith("mid_block")} == {
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.proj_out",
        *(
            f"mid_block.attentions.0.transformer_blocks.{i}.{layer}"
            for i in (0, 1)
            for layer in (
                *(f"attn{j}.{part}" for j in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
                "ff.net.0.proj",
                "ff.net.2",
            )
        ),
        "mid_block.resnets.0.time_emb_proj",
        "mid_block.resnets.1.time_emb_proj",
    }
    for name, parameter in unet.named_parameters():  # all the rest is bit-equal
        if name.removesuffix(".weight") not in replaced:
            assert torch.equal(parameter, before[name])

    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    expected = {f"encoder.layers.{i}.{layer}" for i in (0, 1) for layer in layers}
    assert {name.removeprefix("text_model.") for name in quantise_frozen(text_encoder, precision)} == expected
    assert {name.removeprefix("text_model.") for name in quantise_frozen(text_encoder_2, precision)} == expected
    assert type(text_encoder_2.text_projection) is nn.Linear


def test_what_trains_stays(tiny_pipelines):
    from peft import LoraConfig

    unet = components(tiny_pipelines["sd15"])[0]
    unet.add_adapter(LoraConfig(r=4, target_modules=["attn2.to_k"]))
    unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].requires_grad_(True)
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    replaced = quantise_frozen(unet, "nf4")
    assert trainable == {name for name, p in unet.named_parameters() if p.requires_grad}
    assert any(name.endswith("attn2.to_k.base_layer") for name in replaced)
    assert not any("lora_" in name or name.startswith("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
                   for name in replaced)  # fmt: skip
    unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 32)).sample.sum().backward()
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_on_a_quantised_base(tiny_pipelines, precision):
    from peft import LoraConfig

    unet = components(tiny_pipelines["sdxl"])[0]
    quantise_frozen(unet, precision)
    stock = text_gradient(unet)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"]))  # its B is zero: no change yet
    torch.testing.assert_close(text_gradient(unet), stock)
    adapters = [p for name, p in unet.named_parameters() if "lora_B" in name]
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 80), (24, 40), (640, 128)])
def test_error_of_the_weights(shape, dtype):
    # Rows of very different size, as trained weights have: a scale taken from a wrong block shows.
    row_size = torch.randn(shape[1], 1, generator=torch.Generator().manual_seed(1)).exp()
    model = frozen_linear(*shape, dtype)
    model[0].weight.mul_(row_size)
    weight = model[0].weight.clone().float()
    quantise_frozen(model, "int8")
    half_step = weight.abs().amax(1, keepdim=True) / 127 / 2
    assert ((model[0].dequantised(torch.float32) - weight).abs() <= half_step * 1.01 + weight.abs() * 2**-10).all()

    model = frozen_linear(*shape, dtype)
    model[0].weight.mul_(row_size)
    quantise_frozen(model, "nf4")
    flat = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    error = (
        F.pad((model[0].dequantised(torch.float32) - weight).flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs()
    )
    # Half the widest gap between two of the 16 values is 0.152; the scales are rounded to 8 bits.
    assert (error <= largest * 0.152 + 0.01 * largest.max()).all()
    assert error.square().mean().sqrt() < 0.12 * flat.square().mean().sqrt()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layer_is_a_linear_with_the_dequantised_weight(precision, dtype, bias):
    model = frozen_linear(dtype=dtype, bias=bias)
    quantise_frozen(model, precision)
    weight = model[0].dequantised(torch.float32)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 80, dtype=dtype)
    out = model(x)
    out.backward(grad)
    assert out.dtype == x.grad.dtype == dtype
    seen = x.detach().float()
    if precision == "int8":  # rounds its input too
        scale = seen.abs().amax(-1, keepdim=True) / 127
        seen = (seen / scale).round() * scale
    exact = F.linear(seen, weight, model[0].bias.float() if bias else None)
    # A coordinate that lies half-way may be rounded to either side: one step of one input.
    atol = 2e-2 if dtype == torch.bfloat16 else 4e-3 if precision == "int8" else 1e-5
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=atol)
    torch.testing.assert_close(x.grad.float(), grad.float() @ weight, rtol=1e-2, atol=atol)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_runs_where_nothing_can_be_read(precision):
    """On the meta device reading a number raises; so nothing waits for the device."""
    model = frozen_linear().to("meta")
    quantise_frozen(model, precision)
    x = torch.randn(4, 96, device="meta", requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert (out.shape, x.grad.shape) == ((4, 80), (4, 96))


def test_state_dict_round_trip():
    for precision in PRECISIONS:
        model, other = frozen_linear(seed=0), frozen_linear(seed=1)
        quantise_frozen(model, precision)
        quantise_frozen(other, precision)
        other.load_state_dict(model.state_dict())
        x = torch.randn(3, 96)
        assert torch.equal(model(x), other(x))


def test_nf4_equals_bitsandbytes():
    from bitsandbytes.nn import Linear4bit

    model = frozen_linear(128)
    theirs = Linear4bit(128, 80, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict(model[0].state_dict())
    theirs = theirs.to("cpu")
    quantise_frozen(model, "nf4")
    x = torch.randn(7, 128)
    torch.testing.assert_close(model(x), theirs(x.requires_grad_()), rtol=0, atol=1e-6)


def test_int8_equals_bitsandbytes():
    from bitsandbytes.nn import Linear8bitLt

    model = frozen_linear()
    theirs = Linear8bitLt(96, 80, has_fp16_weights=False)
    theirs.load_state_dict(model[0].state_dict())
    theirs = theirs.to("cpu").eval()
    quantise_frozen(model, "int8")
    x = torch.randn(7, 96)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((model, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_keeps_no_input(precision):
    model = frozen_linear()
    quantise_frozen(model, precision)
    x = torch.randn(4, 96, requires_grad=True) * 1
    reference = weakref.ref(x)
    out = model(x)
    del x
    assert reference() is None
    assert out.requires_grad


def text_gradient(unet):
    """Output of a tiny SDXL's UNet and the gradient for its text, from fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    noisy, text, pooled, grad = (
        torch.randn(shape, generator=generator) for shape in [(2, 4, 8, 8), (2, 7, 80), (2, 40), (2, 4, 8, 8)]
    )
    extra = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
    text.requires_grad_()
    out = unet(noisy, torch.tensor([3, 500]), text, added_cond_kwargs=extra).sample
    out.backward(grad)
    return out.detach(), text.grad


@pytest.mark.parametrize("recompute", ["none", "geglu", "block"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_the_frozen_engine(tiny_pipelines, monkeypatch, precision, recompute):
    monkeypatch.setattr(layers, "SMALL", 0)  # let small layers take the frozen way too
    monkeypatch.setenv("DTI_FAST_BACKEND", "reference")
    unet = components(tiny_pipelines["sdxl"])[0]
    replaced = quantise_frozen(unet, precision)
    stock = text_gradient(unet)
    optimize_frozen(unet, recompute=recompute)
    assert all(type(unet.get_submodule(name)) is PRECISIONS[precision] for name in replaced)
    # int8 rounds activations: one that lies half-way may go the other way after another order of additions.
    tolerance = {"rtol": 0, "atol": 3e-2} if precision == "int8" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(text_gradient(unet), stock, **tolerance)
    restore(unet)
    assert all(type(unet.get_submodule(name)) is PRECISIONS[precision] for name in replaced)
    assert all(torch.equal(a, b) for a, b in zip(text_gradient(unet), stock, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_gradient_checkpointing(tiny_pipelines, precision):
    unet = components(tiny_pipelines["sdxl"])[0]
    quantise_frozen(unet, precision)
    stock = text_gradient(unet)
    unet.enable_gradient_checkpointing()
    unet.train()
    assert all(torch.equal(a, b) for a, b in zip(text_gradient(unet), stock, strict=True))


@pytest.mark.parametrize("recompute", ["none", "geglu"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_model_keeps_no_more(tiny_pipelines, monkeypatch, precision, recompute):
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setenv("DTI_FAST_BACKEND", "reference")
    kept = {}
    for form in ("full", precision):
        unet = optimize_frozen(components(tiny_pipelines["sdxl"])[0], recompute=recompute)
        if form != "full":
            quantise_frozen(unet, precision)
        text = torch.randn(2, 7, 80, requires_grad=True)
        extra = {"text_embeds": torch.randn(2, 40), "time_ids": torch.ones(2, 6)}
        with LiveBytes() as counter:
            out = unet(torch.randn(2, 4, 8, 8), 3, text, added_cond_kwargs=extra).sample
            kept[form] = counter.live
        assert out.requires_grad
    assert kept[precision] <= kept["full"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_weight_bytes_are_those_of_the_real_model(tiny_pipelines, family):
    for dtype in (torch.float32, torch.bfloat16):
        for precision in ("bf16", *PRECISIONS):
            for model in components(tiny_pipelines[family]):
                model.to(dtype)
                meta = type(model).from_config(model.config) if isinstance(model, UNet2DConditionModel) else None
                predicted = weight_bytes(model, precision, dtype)
                if meta is not None:
                    assert weight_bytes(meta.requires_grad_(False).to("meta"), precision, dtype) == predicted
                if precision in PRECISIONS:
                    quantise_frozen(model, precision)
                assert predicted == measured_bytes(model)


def test_weight_bytes_of_sdxl():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_folder("sdxl") / "unet"))
        texts = [
            model(CLIPTextConfig.from_pretrained(config_folder("sdxl") / name))
            for model, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]
    for model in (unet, *texts):
        model.requires_grad_(False)
    for precision, unet_gib, text_gib in [("bf16", 4.78, 1.52), ("int8", 2.72, 0.86), ("nf4", 1.71, 0.54)]:
        assert weight_bytes(unet, precision) / 2**30 == pytest.approx(unet_gib, abs=0.005)
        assert sum(weight_bytes(text, precision) for text in texts) / 2**30 == pytest.approx(text_gib, abs=0.005)


def measured_bytes(model) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="int4"):
        quantise_frozen(frozen_linear(), "int4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantise_frozen(frozen_linear(), "nf4")
