"""Blocks of transformer denoisers and text encoders are computed again, whatever their class, and nothing changes."""

import copy
import pickle

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3Model,
    StaticCache,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dti_fast import optimize_frozen, restore
from dti_fast.frozen import left_stock
from dti_fast.memory.live_bytes import LiveBytes


def sana():
    return SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
        sample_size=8, qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def wan():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def sd3():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=24, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def pixart():
    return PixArtTransformer2DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=24,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip


DENOISERS = {  # how to make one, what else it takes, and the classes of its blocks
    sana: ({}, {"SanaTransformerBlock": 3}),
    wan: ({}, {"WanTransformerBlock": 3}),
    sd3: ({"pooled_projections": torch.ones(2, 20)}, {"JointTransformerBlock": 3}),
    flux: (
        {"pooled_projections": torch.ones(2, 20), "img_ids": torch.ones(16, 3), "txt_ids": torch.zeros(7, 3)},
        {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2},
    ),
    pixart: ({"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, {"BasicTransformerBlock": 3}),
}


def made(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().requires_grad_(False).eval()
    for parameter in model.parameters():  # some outputs start as zeros, which would hide gradients
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(0, 0.05)
    return model


def predict(make, model):
    """The output, and the text, which gets a gradient."""
    extra, _ = DENOISERS[make]
    generator = torch.Generator().manual_seed(1)
    shape = {wan: (2, 4, 1, 8, 8), flux: (2, 16, 4)}.get(make, (2, 4, 8, 8))
    noisy, text = (torch.randn(s, generator=generator) for s in (shape, (2, 7, 24)))
    text.requires_grad_()
    arguments = {"timestep": torch.tensor([3, 500]), "encoder_hidden_states": text, **extra}
    return model(noisy, **arguments, return_dict=False)[0], text


def denoise(make, model):
    """The output, and the gradient for the text."""
    out, text = predict(make, model)
    return out, *torch.autograd.grad(out.square().sum(), text)


def kept(make, model) -> int:
    """Bytes that autograd keeps for the backward pass."""
    with LiveBytes() as counter:
        out, text = predict(make, model)
        return counter.live - out.nbytes - text.nbytes


def recomputed(model) -> dict[str, int]:
    names = [type(m).__name__ for m in model.modules() if getattr(m, "recompute", "none") == "block"]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("make", DENOISERS, ids=lambda make: make.__name__)
def test_denoisers(make):
    model = made(make)
    classes = [type(m) for m in model.modules()]
    exact, stock = denoise(make, model), kept(make, model)
    optimize_frozen(model, recompute="block")
    assert recomputed(model) == DENOISERS[make][1]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert all(map(torch.equal, denoise(make, model), exact))
    assert kept(make, model) < 0.6 * stock
    optimize_frozen(model)
    assert not recomputed(model)
    restore(model)
    assert [type(m) for m in model.modules()] == classes


def test_parts_by_name_and_pickles():
    model = made(flux)
    exact = denoise(flux, model)
    optimize_frozen(model, recompute={"single_transformer_blocks": "block", "transformer_blocks.1": "block"})
    assert recomputed(model) == {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 2}
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert all(map(torch.equal, denoise(flux, other), exact))


def test_hooks_on_blocks():
    """Hooks that others add to a call stay; a forward that others have put there is left alone."""
    model = made(sana)
    calls = []
    model.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(0))
    own = model.transformer_blocks[1].forward
    model.transformer_blocks[1].forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    with pytest.warns(UserWarning, match="left 1 layers as they are"):
        optimize_frozen(model, recompute="block")
    assert left_stock(model) == {"transformer_blocks.1": "forward of its own"}
    ours = denoise(sana, model)
    assert calls == [0, 1]  # a hook on the block itself is outside of what is computed again
    assert all(map(torch.equal, ours, denoise(sana, made(sana))))


def test_compiled_block_by_block():
    model = made(flux)
    exact = denoise(flux, model)
    optimize_frozen(model, recompute="block")
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for recording in (torch.no_grad, torch.enable_grad):  # with gradients on, but none that anything needs
        with recording():
            block, x = model.transformer_blocks[0], torch.ones(1, 3, 32)
            block(hidden_states=x, encoder_hidden_states=x, temb=torch.ones(1, 32))
    for ours, stock in zip(denoise(flux, model), exact, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


class InnerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x).tanh()


class OuterBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([InnerBlock()])

    def forward(self, x):
        return self.blocks[0](x)


def test_a_block_within_a_block_is_computed_again_once():
    model = nn.ModuleList([OuterBlock()]).requires_grad_(False)
    optimize_frozen(model, recompute="block")
    assert recomputed(model) == {"OuterBlock": 1}
    model[0](torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert model[0].blocks[0].calls == 2


def t5(model=T5EncoderModel, config=T5Config):
    return model(config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=32, num_layers=4, num_heads=3, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    ))  # fmt: skip


def umt5():
    return t5(UMT5EncoderModel, UMT5Config)


def gemma2():
    return Gemma2Model(Gemma2Config(
        vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=4, query_pre_attn_scalar=8, sliding_window=6,
    ))  # fmt: skip


def qwen3():
    return Qwen3Model(Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    ))  # fmt: skip


ENCODERS = {  # how to make one, and the class of its blocks
    t5: "T5Block",
    umt5: "UMT5Block",
    gemma2: "Gemma2DecoderLayer",
    qwen3: "Qwen3DecoderLayer",
}
IDS = torch.arange(18).view(2, 9)


def encode(model, **arguments):
    """Outputs and the gradient for the embeddings, and the bytes kept between the two without the cache."""
    words = model.get_input_embeddings().weight.requires_grad_()
    with LiveBytes() as counter:
        out = model(IDS, **arguments, output_hidden_states=True)
        cache = getattr(out, "past_key_values", None)
        outputs = [t for layer in cache.layers for t in (layer.keys, layer.values)] if cache else []
        outputs = [t.detach().clone() for t in (*outputs, *out.hidden_states)]
        loss = torch.stack(out.hidden_states).square().sum() + out.last_hidden_state.sum()
        del out, cache
        arguments.clear()
        live = counter.live - sum(t.nbytes for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, words)], live


@pytest.mark.parametrize("make", ENCODERS, ids=lambda make: make.__name__)
def test_encoders(make):
    model = made(make)
    exact, stock_kept = encode(model)
    optimize_frozen(model, recompute="block")
    assert recomputed(model) == {ENCODERS[make]: 4}
    ours, ours_kept = encode(model)
    assert all(map(torch.equal, ours, exact))
    assert ours_kept < 0.5 * stock_kept


@pytest.mark.parametrize("make", [t5, umt5])
def test_dropout_in_training_mode(make):
    model = made(make).train()

    def seeded():
        torch.manual_seed(3)
        return encode(model)[0]

    exact = seeded()
    optimize_frozen(model, recompute="block")
    assert all(map(torch.equal, seeded(), exact))


@pytest.mark.parametrize("make", [gemma2, qwen3])
def test_keys_and_values_go_into_a_cache_once(make):
    """Also behind a prefix whose keys and values have been computed before."""
    model = made(make)

    def runs():
        with torch.no_grad():
            cache = model(IDS + 20, use_cache=True).past_key_values
        return encode(model, use_cache=False), encode(model, use_cache=True), encode(model, past_key_values=cache)

    stock = runs()
    optimize_frozen(model, recompute="block")
    ours = runs()
    assert [len(outputs) for outputs, _ in ours] == [5 + 1, 5 + 1 + 2 * 4, 5 + 1 + 2 * 4]
    for (exact, stock_kept), (outputs, ours_kept) in zip(stock, ours, strict=True):
        assert all(map(torch.equal, outputs, exact))
        assert ours_kept < 0.5 * stock_kept
    assert ours[1][1] < 1.1 * ours[0][1]  # an empty cache that nobody holds costs nothing


def test_a_cache_that_writes_to_its_tensors_is_filled_once():
    model = made(qwen3)

    def run():
        cache = StaticCache(config=model.config, max_cache_len=12)
        outputs, _ = encode(model, past_key_values=cache)
        return outputs, cache.get_seq_length()

    exact, length = run()
    optimize_frozen(model, recompute="block")
    ours, ours_length = run()
    assert int(length) == int(ours_length) == 9
    assert all(map(torch.equal, ours, exact))
