"""Quantised frozen Linears: which, how exact, what they keep, what they weigh."""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, SanaTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

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


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_offloading_takes_the_weights_away_before_the_backward_pass(precision, recomputed):
    model = nn.Sequential(frozen_linear(), nn.Tanh(), frozen_linear(80, 80, seed=1))
    quantise_frozen(model, precision)
    x = torch.randn(4, 96, requires_grad=True)

    def gradient():
        out = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
        return torch.autograd.grad(out.square().sum(), x)[0]

    exact = gradient()
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(gradient(), exact)


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


@pytest.mark.parametrize("precision, bounds", [("int8", (0.03, 0.1)), ("nf4", (0.2, 0.3))])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model, config", [(T5EncoderModel, T5Config), (UMT5EncoderModel, UMT5Config)])
def test_t5_keeps_its_activations(model, config, dtype, gated, precision, bounds):
    """T5 casts the feed-forward's activations to the dtype of the weight behind them, but for int8.

    Bounds are relative, of the output and of a gradient.
    """
    torch.manual_seed(0)
    encoder = model(config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False,
        feed_forward_proj="gated-gelu" if gated else "relu", tie_word_embeddings=False,
    )).requires_grad_(False).eval().to(dtype)  # fmt: skip
    ids, words = torch.arange(20)[None], encoder.get_input_embeddings().weight

    def run():
        words.requires_grad_()
        out = encoder(ids).last_hidden_state.float()
        gradient = torch.autograd.grad(out[..., :5].sum(), words)[0].float()
        words.requires_grad_(False)
        return out.detach(), gradient

    exact = run()
    quantise_frozen(encoder, precision)
    for ours, stock, bound in zip(run(), exact, bounds, strict=True):
        assert (ours - stock).norm() < bound * stock.norm()


def test_nf4_reads_files_whose_bytes_are_uint8():
    model, other = frozen_linear(seed=0), frozen_linear(seed=1)
    for each in (model, other):
        quantise_frozen(each, "nf4")
    state = {name: t.view(torch.uint8) if name == "0.weight" else t for name, t in model.state_dict().items()}
    assert (state["0.weight"] > 127).any()
    x = torch.randn(3, 96)
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert other[0].weight.dtype == torch.int8
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bias_made_trainable_later_gets_its_gradient(precision):
    model = frozen_linear()
    quantise_frozen(model, precision)
    x = torch.randn(2, 5, 96)
    frozen = model(x)
    model[0].bias.requires_grad_(True)
    out = model(x)
    torch.testing.assert_close(out, frozen)
    out.sum().backward()
    assert torch.equal(model[0].bias.grad, torch.full((80,), 10.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pointwise_convolutions(precision, optimised, bias, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 96, 1, bias=bias)).requires_grad_(False)
    x = torch.randn(2, 64, 5, 7).to(memory_format=memory_format).requires_grad_()
    stock = model(x)
    linear = nn.Sequential(nn.Linear(64, 96, bias=bias)).requires_grad_(False)
    linear.load_state_dict({name: t.flatten(1) if t.dim() > 1 else t for name, t in model.state_dict().items()})
    if optimised:
        optimize_frozen(model)
    assert quantise_frozen(model, precision) == []
    assert weight_bytes(model, precision, torch.float32, convolutions=True) < 0.5 * measured_bytes(model)
    predicted = weight_bytes(model, precision, torch.float32, convolutions=True)
    assert quantise_frozen(model, precision, convolutions=True) == ["0"]
    assert predicted == measured_bytes(model)
    out = model(x)
    assert out.shape == stock.shape
    assert (out - stock).norm() < {"int8": 0.02, "nf4": 0.15}[precision] * stock.norm()
    quantise_frozen(linear, precision)
    rows = x.detach().permute(0, 2, 3, 1).reshape(-1, 64).requires_grad_()
    torch.testing.assert_close(out.permute(0, 2, 3, 1).reshape(-1, 96), linear(rows))
    grad = torch.randn(out.shape)
    out.backward(grad)
    linear(rows).backward(grad.permute(0, 2, 3, 1).reshape(-1, 96))
    torch.testing.assert_close(x.grad.permute(0, 2, 3, 1).reshape(-1, 64), rows.grad)


def test_other_convolutions_stay():
    convolutions = nn.ModuleList([
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, (1, 3)), nn.Conv1d(4, 4, 1),
    ]).requires_grad_(False)  # fmt: skip
    trainable = nn.Conv2d(4, 4, 1)
    assert quantise_frozen(nn.ModuleList([*convolutions, trainable]), "int8", convolutions=True) == []


def test_most_of_sana_is_in_its_pointwise_convolutions():
    with torch.device("meta"):
        sana = SanaTransformer2DModel(num_layers=2).requires_grad_(False)
    without, with_them = (weight_bytes(sana, "nf4", convolutions=c) for c in (False, True))
    assert with_them < 0.6 * without
    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=32, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=24,
        patch_size=1,
    ).requires_grad_(False)  # fmt: skip
    arguments = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), torch.tensor([3.0, 500.0])
    exact = sana(*arguments).sample
    names = quantise_frozen(sana, "int8", convolutions=True)
    assert {name.rpartition(".")[2] for name in names} >= {"conv_inverted", "conv_point", "to_q"}
    assert (sana(*arguments).sample - exact).norm() < 0.05 * exact.norm()


def test_what_others_have_made_of_a_linear_is_left_alone():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("hooked", "own", "shared", "plain")})
    model["again"] = model["shared"]
    model.requires_grad_(False)
    model["hooked"].register_forward_hook(lambda module, args, out: out + 1)
    model["own"].forward = lambda x: x
    with pytest.warns(UserWarning, match="quantise_frozen left 3 layers as they are"):
        assert quantise_frozen(model, "int8") == ["plain"]
    assert model["again"] is model["shared"]
    x = torch.ones(1, 8)
    assert torch.equal(model["hooked"](x), F.linear(x, model["hooked"].weight, model["hooked"].bias) + 1)
    assert model["own"](x) is x


def measured_bytes(model) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="int4"):
        quantise_frozen(frozen_linear(), "int4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantise_frozen(frozen_linear(), "nf4")
