"""The frozen engine among what others make of a model: hooks, offloading, parametrizations, pickles, compilers."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.utils import parametrize

from dti_fast import optimize_frozen, restore
from dti_fast.frozen import layers, left_stock


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """The models here are small; every layer shall take the frozen way."""
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setenv("DTI_FAST_BACKEND", "reference")


@pytest.fixture
def unet(tiny_pipelines):
    return UNet2DConditionModel.from_pretrained(tiny_pipelines["sd15"], subfolder="unet").requires_grad_(False)


def run(unet):
    """The output, and the gradient of a weighted sum of it with respect to the text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator).requires_grad_()
    out = unet(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 500]), text).sample
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return out.detach(), text.grad


def close(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return True


def frozen_count(module) -> int:
    return sum(isinstance(child, layers.Frozen) for child in module.modules())


def offload_accelerate(unet):
    cpu_offload(unet, execution_device="cpu")


def offload_leaves(unet):
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(unet):
    unet.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


offloads = pytest.mark.parametrize("offload", [offload_accelerate, offload_leaves, offload_blocks])


@pytest.mark.filterwarnings("ignore:optimize_frozen left")
@pytest.mark.parametrize("recompute", ["none", "block"])
@offloads
def test_offloading_before(unet, offload, recompute):
    exact = run(unet)
    offload(unet)
    optimize_frozen(unet, recompute=recompute)
    assert close(run(unet), exact)
    restore(unet)
    assert frozen_count(unet) == 0
    assert all(torch.equal(a, b) for a, b in zip(run(unet), exact, strict=True))


@pytest.mark.filterwarnings("ignore:optimize_frozen left")
@pytest.mark.parametrize("recompute", ["none", "block"])
@offloads
def test_offloading_afterwards(unet, offload, recompute):
    exact = run(unet)
    optimize_frozen(unet, recompute=recompute)
    offload(unet)
    assert close(run(unet), exact)
    restore(unet)
    assert frozen_count(unet) == 0
    assert all(torch.equal(a, b) for a, b in zip(run(unet), exact, strict=True))
    optimize_frozen(unet, recompute="block")
    assert close(run(unet), exact)


def test_what_offloading_leaves_alone_is_told(unet):
    optimize_frozen(unet)
    before = frozen_count(unet)
    restore(unet)
    cpu_offload(unet, execution_device="cpu")
    hooked = [child for child in unet.modules() if type(child) in layers.frozen_classes() and "_hf_hook" in vars(child)]
    with pytest.warns(UserWarning, match=f"optimize_frozen left {len(hooked)} layers as they are"):
        optimize_frozen(unet)
    assert len(hooked) > 50
    assert not any(isinstance(child, layers.Frozen) for child in hooked)
    reasons = left_stock(unet)
    assert set(reasons.values()) == {"forward of its own"}
    assert {unet.get_submodule(name) for name in reasons} == set(hooked)

    # Removed hooks leave their module's plain forward behind, which is no forward of its own.
    remove_hook_from_module(unet, recurse=True)
    for name, parameter in list(unet.named_parameters()):
        assert not parameter.is_meta, name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize_frozen(unet)
    assert frozen_count(unet) == before


def test_hooks_see_what_they_see_in_the_stock_model(unet):
    block = unet.mid_block.resnets[0]
    watched = [block, block.norm1, block.conv1, block.nonlinearity, unet.conv_norm_out, unet.conv_act, unet.conv_out]

    def seen():
        values = []
        handles = [m.register_forward_hook(lambda _, args, out: values.append((args[0], out))) for m in watched]
        run(unet)
        for handle in handles:
            handle.remove()
        return [tensor.detach() for pair in values for tensor in pair]

    exact = seen()
    handles = [module.register_forward_hook(lambda *_: None) for module in (unet.conv_norm_out, unet.conv_act)]
    optimize_frozen(unet)
    assert isinstance(block, layers.Frozen) and isinstance(block.norm1, layers.Frozen)
    assert close(seen(), exact)
    for handle in handles:
        handle.remove()


def test_a_hook_that_changes_a_norm_acts_as_in_the_stock_block():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4).requires_grad_(False)
    x, temb = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 8)
    block.norm2.register_forward_hook(lambda module, args, out: out * 2 - 1)

    def both():
        out = block(x, temb)
        return out.detach(), *torch.autograd.grad(out.square().sum(), x)

    exact = both()
    assert close((optimize_frozen(block) and both()), exact)
    block.nonlinearity.forward = torch.tanh
    ours = both()
    restore(block)
    assert close(ours, both())


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act"])
def test_a_shared_last_norm_or_activation_keeps_its_meaning(unet, name):
    """The SiLU moves into the norm only where nothing else calls either of them."""
    unet.elsewhere = unet.get_submodule(name)
    x = torch.randn(1, 32, 4, 4)
    exact = unet.elsewhere(x)
    whole = run(unet)
    optimize_frozen(unet)
    torch.testing.assert_close(unet.elsewhere(x), exact)
    assert close(run(unet), whole)


def test_a_subclass_with_a_forward_of_its_own(tiny_pipelines):
    class Features(UNet2DConditionModel):
        def forward(self, x):
            return self.conv_out(self.conv_norm_out(self.conv_in(x)))

    model = Features.from_pretrained(tiny_pipelines["sd15"], subfolder="unet").requires_grad_(False)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    exact = model(x)
    torch.testing.assert_close(optimize_frozen(model)(x), exact)


def test_a_block_under_two_names_is_recomputed_where_either_asks():
    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4).requires_grad_(False)
    model = nn.ModuleDict({"first": block, "second": block})
    optimize_frozen(model, recompute={"second": "block"})
    assert block.recompute == "block"


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_layer_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    parametrize.register_parametrization(model[0], "weight", Double())
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    exact = model(x)
    with pytest.warns(UserWarning, match="left 1 layers as they are"):
        optimize_frozen(model)
    assert left_stock(model) == {"0": "parametrization"}
    assert torch.equal(model(x), exact)
    assert parametrize.is_parametrized(restore(model)[0])


def test_a_layer_that_is_parametrized_afterwards_is_not_torn_down():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).requires_grad_(False)
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    optimize_frozen(model)
    exact = model(x)
    parametrize.register_parametrization(model[0], "weight", Double())
    doubled = model(x)
    for call in (restore, optimize_frozen):
        with pytest.raises(RuntimeError, match=r"0 is a Parametrized\w*Conv2d on top of a frozen layer"):
            call(model)
        assert torch.equal(model(x), doubled)
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert type(restore(model)[0]) is nn.Conv2d
    assert torch.equal(model(x), exact)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
        (nn.LayerNorm(16), (2, 5, 16)),
        (nn.GroupNorm(2, 6), (2, 6, 4, 4)),
    ],
)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_made_trainable_later_gets_its_gradient(layer, shape, name):
    layer = copy.deepcopy(layer).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)

    def gradients():
        return torch.autograd.grad(layer(x).square().sum(), [getattr(layer, name), x])

    getattr(layer, name).requires_grad_(True)
    exact = gradients()
    layer.requires_grad_(False)
    optimize_frozen(layer)
    getattr(layer, name).requires_grad_(True)
    assert isinstance(layer, layers.Frozen)
    assert close(gradients(), exact)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_bias_made_trainable_later_gets_its_gradient(unet, recompute):
    def gradients():
        biases = {name: p for name, p in unet.named_parameters() if name.endswith("bias")}
        for p in biases.values():
            p.requires_grad_(True)
        run(unet)
        found = {name: p.grad for name, p in biases.items()}
        unet.requires_grad_(False)
        unet.zero_grad()
        return found

    stock = gradients()
    optimize_frozen(unet, recompute=recompute)
    ours = gradients()
    assert len(ours) > 60
    for name, exact in stock.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.LayerNorm((4, 5)), (2, 4, 5)),
        (nn.LayerNorm((4, 5), elementwise_affine=False), (2, 4, 5)),
        (nn.LayerNorm(5).double(), (2, 4, 5)),
        (nn.GroupNorm(2, 6).double(), (2, 6, 4)),
        (nn.Conv2d(3, 4, 3), (3, 8, 9)),
        (nn.Conv2d(3, 4, 3).double(), (2, 3, 8, 9)),
        (GEGLU(6, 8).double(), (2, 5, 6)),
    ],
)
def test_what_the_ops_do_not_take_goes_the_stock_way(layer, shape):
    """Several dimensions under one LayerNorm, a picture without a batch, float64."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)

    def both():
        out = layer(x)
        return out.detach(), *torch.autograd.grad(out.square().sum(), x)

    exact = both()
    optimize_frozen(layer)
    assert isinstance(layer, layers.Frozen)
    assert close(both(), exact)


def test_recomputation_draws_the_same_dropout():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4, dropout=0.5).requires_grad_(False).train()
    x, temb = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 8)

    def gradient():
        torch.manual_seed(1)
        out = block(x, temb)
        torch.manual_seed(2)
        return torch.autograd.grad(out.square().sum(), x)

    exact = gradient()
    optimize_frozen(block, recompute="block")
    assert close(gradient(), exact)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_pickled_saved_and_copied(unet, recompute):
    optimize_frozen(unet, recompute=recompute)
    exact = run(unet)
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(unet)), torch.load(file, weights_only=False), copy.deepcopy(unet),
    ]  # fmt: skip
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in unet.modules()]
        assert all(torch.equal(a, b) for a, b in zip(run(other), exact, strict=True))
        restore(other)
        assert frozen_count(other) == 0
    assert frozen_count(unet) > 70


def test_unpickled_in_a_process_that_knows_nothing_of_it(tmp_path):
    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4).requires_grad_(False)
    path = tmp_path / "block.pickle"
    path.write_bytes(pickle.dumps(optimize_frozen(block, recompute="block")))
    code = "import pickle, sys; block = pickle.load(open(sys.argv[1], 'rb')); print(type(block), block.recompute)"
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "<class 'dti_fast.frozen.layers.FrozenResnetBlock2D'> block"


class OneBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24, activation_fn="geglu")

    def forward(self, x, text):
        return self.block(x, encoder_hidden_states=text)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("recompute", ["none", "geglu", "block"])
def test_compiled_with_and_without_gradients(recompute, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = OneBlock().requires_grad_(False).eval()
    x, text = torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    exact = model(x, text)
    optimize_frozen(model, recompute=recompute)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, text), exact)
    text.requires_grad_()
    (stock,) = torch.autograd.grad(restore(copy.deepcopy(model))(x, text).square().sum(), text)
    (ours,) = torch.autograd.grad(compiled(x, text).square().sum(), text)
    torch.testing.assert_close(ours, stock)


def test_a_compiled_resnet_block():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4).requires_grad_(False).eval()
    x, temb = torch.randn(2, 16, 8, 8), torch.randn(2, 8)
    exact = block(x, temb)
    compiled = torch.compile(optimize_frozen(block, recompute="block"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, temb), exact)
    (ours,) = torch.autograd.grad(compiled(x.requires_grad_(), temb).square().sum(), x)
    (stock,) = torch.autograd.grad(restore(copy.deepcopy(block))(x, temb).square().sum(), x)
    torch.testing.assert_close(ours, stock)


def test_diffusers_finds_the_blocks_that_it_compiles(unet):
    exact = run(unet)
    optimize_frozen(unet, recompute="block")
    unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert close(run(unet), exact)
