"""The frozen engine changes what is kept, not what is computed."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from dti_fast import optimize_frozen, restore
from dti_fast.errors import UserError
from dti_fast.frozen import layers, left_stock
from dti_fast.frozen.attention import set_attention
from dti_fast.memory.live_bytes import LiveBytes

MODES = ["none", "geglu", "block", {"down_blocks.0": "geglu", "mid_block": "block"}]
mode = pytest.mark.parametrize("mode", MODES, ids=["none", "geglu", "block", "mixed"])
families = pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """The models here are small; every layer shall take the frozen way."""
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setenv("DTI_FAST_BACKEND", "reference")


def frozen_unet(tiny_pipelines, family, dtype=torch.float32) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(tiny_pipelines[family], subfolder="unet", torch_dtype=dtype)
    return unet.requires_grad_(False)


def gradient(unet, seed: int = 0):
    """The UNet's output and the gradient of a weighted sum of it with respect to the text, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(unet.dtype)

    text = random(2, 7, unet.config.cross_attention_dim).requires_grad_()
    extra = {}
    if unet.config.addition_embed_type:
        extra = {"text_embeds": random(2, 40), "time_ids": random(2, 6)}
    latents, timesteps = random(2, 4, 8, 8), torch.tensor([3, 500])
    out = unet(latents, timesteps, text, added_cond_kwargs=extra).sample
    (out * random(*out.shape)).sum().backward()
    return out.detach().double(), text.grad.double()


def relative(ours, exact) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


@mode
@families
def test_output_and_gradient_in_float32(tiny_pipelines, family, mode):
    unet = frozen_unet(tiny_pipelines, family)
    out, exact = gradient(unet)
    ours, ours_gradient = gradient(optimize_frozen(unet, recompute=mode))
    assert relative(ours, out) < 1e-6
    assert relative(ours_gradient, exact) < 1e-5


@mode
@families
def test_gradient_in_bfloat16_is_as_good_as_stock(tiny_pipelines, family, mode):
    """At most twice the error of stock bf16, both against float32 with the same bf16 weights; over 8 seeds."""
    unet = frozen_unet(tiny_pipelines, family, torch.bfloat16)
    wide = UNet2DConditionModel.from_config(unet.config).requires_grad_(False)
    wide.load_state_dict({name: weight.float() for name, weight in unet.state_dict().items()})
    exact = [gradient(wide, seed)[1] for seed in range(8)]
    stock = [relative(gradient(unet, seed)[1], exact[seed]) for seed in range(8)]
    optimize_frozen(unet, recompute=mode)
    ours = [relative(gradient(unet, seed)[1], exact[seed]) for seed in range(8)]
    assert sum(ours) < 2 * sum(stock)


def test_autocast(tiny_pipelines):
    unet = frozen_unet(tiny_pipelines, "sdxl")
    _, exact = gradient(unet)
    with torch.autocast("cpu", torch.bfloat16):
        _, stock = gradient(unet)
        _, ours = gradient(optimize_frozen(unet))
    assert 1e-4 < relative(ours, exact) < 2 * relative(stock, exact)


@mode
def test_pocket_model_with_its_text_encoder(mode):
    """The gradient of the training loss with respect to a learned direction, through the full bundled model."""
    from dti_fast.backbones.load import load_backbone
    from dti_fast.backbones.pocket import Pocket
    from dti_fast.tokens import TokenEmbedding

    backbone = load_backbone(Pocket.name, torch.float32, torch.device("cpu"))
    encoder, tokenizer = backbone.text_encoders[0], backbone.tokenizers[0]
    embedding = TokenEmbedding.install(encoder, tokenizer, "<x>", init="creature")
    tokens = backbone.tokenize(["a photo of a <x> on the beach"] * 2)
    generator = torch.Generator().manual_seed(0)
    noisy, target = (torch.randn(2, 6, 8, 8, generator=generator) for _ in range(2))

    def direction_gradient():
        embedding.directions.grad = None
        prediction = backbone.denoise(noisy, torch.tensor([100, 700]), backbone.condition(tokens, None))
        (prediction - target).square().mean().backward()
        return embedding.directions.grad.double()

    exact = direction_gradient()
    optimize_frozen(backbone.denoiser, recompute=mode)
    optimize_frozen(encoder, recompute="block" if mode == "block" else "none")
    assert relative(direction_gradient(), exact) < 1e-5


def test_idempotent_and_undone(tiny_pipelines):
    unet = frozen_unet(tiny_pipelines, "sdxl")
    classes, weights = [type(m) for m in unet.modules()], unet.state_dict()
    out, exact = gradient(unet)
    optimize_frozen(unet, recompute="block")
    once = [type(m) for m in unet.modules()]
    assert sum(issubclass(c, layers.Frozen) for c in once) > 70
    assert all(isinstance(m, c) for m, c in zip(unet.modules(), classes, strict=True))
    optimize_frozen(unet)
    assert [type(m) for m in unet.modules()] == once
    assert not any(getattr(m, "recompute", "none") != "none" for m in unet.modules())
    assert unet.state_dict().keys() == weights.keys()
    restore(unet)
    assert [type(m) for m in unet.modules()] == classes
    again, again_gradient = gradient(unet)
    assert torch.equal(again, out) and torch.equal(again_gradient, exact)


def test_trainable_modules_stay_stock_and_get_their_gradients(tiny_pipelines):
    unet = frozen_unet(tiny_pipelines, "sd15")
    trainable = {
        "down_blocks.0.resnets.0.conv1": unet.down_blocks[0].resnets[0].conv1,
        "mid_block.resnets.0.norm1": unet.mid_block.resnets[0].norm1,
        "conv_norm_out": unet.conv_norm_out,
    }
    for module in trainable.values():
        module.requires_grad_(True)

    def gradients():
        unet.zero_grad()
        _, text = gradient(unet)
        return [text, *(module.weight.grad.clone() for module in trainable.values())]

    stock = gradients()
    optimize_frozen(unet)
    assert sorted(left_stock(unet)) == sorted(trainable)
    assert not any(isinstance(module, layers.Frozen) for module in trainable.values())
    for ours, exact in zip(gradients(), stock, strict=True):
        assert relative(ours, exact) < 1e-5


def test_a_convolution_made_trainable_later_gets_its_gradient():
    conv = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)
    optimize_frozen(conv)
    conv.requires_grad_(True)
    conv(torch.randn(1, 3, 8, 8, requires_grad=True)).sum().backward()
    assert conv.weight.grad is not None


def test_small_tensors_go_the_stock_way(tiny_pipelines, monkeypatch):
    monkeypatch.setattr(layers, "SMALL", 1 << 30)
    unet = frozen_unet(tiny_pipelines, "sd15")
    out, exact = gradient(unet)
    ours, ours_gradient = gradient(optimize_frozen(unet))
    assert torch.equal(ours, out) and torch.equal(ours_gradient, exact)


@pytest.mark.parametrize("pad, stride, groups, dilation", [(1, 1, 1, 1), (0, 2, 1, 1), (2, 1, 3, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution(pad, stride, groups, dilation, memory_format):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 6, 3, stride, pad, dilation, groups).requires_grad_(False)
    x = torch.randn(2, 3, 9, 10).to(memory_format=memory_format).requires_grad_()
    (stock,) = torch.autograd.grad(conv(x).square().sum(), x)
    optimize_frozen(conv)
    (ours,) = torch.autograd.grad(conv(x).square().sum(), x)
    if memory_format == torch.contiguous_format:
        assert torch.equal(ours, stock)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_a_convolution_that_pads_otherwise_stays_stock():
    convs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 3, padding="same"), torch.nn.Conv2d(3, 3, 3, padding_mode="reflect")
    )
    optimize_frozen(convs.requires_grad_(False))
    assert not any(isinstance(conv, layers.Frozen) for conv in convs)


@pytest.mark.parametrize("wrong", ["all", {"mid_block": "geglus"}, {"middle": "block"}])
def test_wrong_recompute(tiny_pipelines, wrong):
    unet = frozen_unet(tiny_pipelines, "sd15")
    with pytest.raises(ValueError, match="recompute"):
        optimize_frozen(unet, recompute=wrong)
    assert not any(isinstance(module, layers.Frozen) for module in unet.modules())


def test_text_encoders_recompute_in_evaluation_mode(tiny_pipelines):
    """transformers' own checkpointing keeps everything there."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(tiny_pipelines["sd15"], subfolder="text_encoder", num_hidden_layers=8)

    def kept(prepare) -> int:
        with FakeTensorMode():
            encoder = CLIPTextModel(config).requires_grad_(False).eval()
            prepare(encoder)
            words = torch.empty(2, 9, config.hidden_size, requires_grad=True)
            encoder.set_input_embeddings(Fixed(words))
            ids = torch.empty(2, 9, dtype=torch.int64)
            with LiveBytes() as counter:
                out = encoder(ids, output_hidden_states=True)
                del out
                out = encoder(ids).last_hidden_state  # noqa: F841  keeps the graph alive
                return counter.live

    stock = kept(lambda encoder: encoder.gradient_checkpointing_enable())
    ours = kept(lambda encoder: optimize_frozen(encoder, recompute="block"))
    assert ours < 0.3 * stock


class Fixed(torch.nn.Module):
    """An embedding that returns what it was given."""

    def __init__(self, words):
        super().__init__()
        self.words, self.weight = words, words

    def forward(self, ids):
        return self.words * 1


@pytest.mark.parametrize("encoder_name", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_text_encoder_outputs(tiny_pipelines, encoder_name, recompute):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if encoder_name.endswith("2") else CLIPTextModel
    encoder = kind.from_pretrained(tiny_pipelines["sdxl"], subfolder=encoder_name).requires_grad_(False).eval()
    words = torch.randn(1, 9, encoder.config.hidden_size, requires_grad=True)
    encoder.set_input_embeddings(Fixed(words))
    ids = torch.arange(9)[None]

    def run():
        out = encoder(ids, output_hidden_states=True)
        loss = out.hidden_states[-2].square().sum() + out[0].square().sum()
        return torch.stack(out.hidden_states).detach(), torch.autograd.grad(loss, words)[0]

    hidden, exact = run()
    optimize_frozen(encoder, recompute=recompute)
    ours, ours_gradient = run()
    torch.testing.assert_close(ours, hidden, rtol=1e-5, atol=1e-6)
    assert relative(ours_gradient, exact) < 1e-5


def test_attention_backends_agree(tiny_pipelines):
    unet = frozen_unet(tiny_pipelines, "sdxl")
    out, exact = gradient(unet)
    for backend in ("math", "sdpa", "auto"):
        set_attention(unet, backend)
        ours, ours_gradient = gradient(unet)
        assert relative(ours, out) < 1e-5 and relative(ours_gradient, exact) < 1e-5
    assert "AttnProcessor2_0" in {type(p).__name__ for p in unet.attn_processors.values()}


def test_math_attention_keeps_the_attention_matrix():
    config = {
        "cross_attention_dim": 32, "block_out_channels": (32, 64), "norm_num_groups": 16, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip

    def kept(backend):
        with FakeTensorMode():
            unet = UNet2DConditionModel(**config).requires_grad_(False)
            set_attention(unet, backend)
            text = torch.empty(1, 7, 32, requires_grad=True)
            with LiveBytes() as counter:
                out = unet(torch.empty(1, 4, 32, 32), torch.zeros(1), text).sample  # noqa: F841
                return counter.live

    heads = 8
    assert kept("math") - kept("sdpa") > heads * 1024**2 * 4


def test_xformers_that_does_not_run_is_one_clear_line(tiny_pipelines):
    with pytest.raises(UserError, match=r"xformers does not run on this cpu device .*--attention sdpa"):
        set_attention(frozen_unet(tiny_pipelines, "sd15"), "xformers")


@pytest.mark.gpu
def test_xformers(tiny_pipelines):
    pytest.importorskip("xformers")
    unet = frozen_unet(tiny_pipelines, "sd15").cuda()
    out, exact = gradient(unet)
    set_attention(unet, "xformers")
    ours, ours_gradient = gradient(unet)
    assert relative(ours, out) < 1e-3 and relative(ours_gradient, exact) < 1e-3
