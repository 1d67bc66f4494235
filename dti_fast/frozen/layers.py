"""Frozen layers: same outputs and input gradients as the stock classes that they stand in for, fewer saved tensors.

A module becomes frozen by changing its class to one of these (`dti_fast.frozen.engine`), so that names, weights and
`isinstance` stay what they were.  Made by functions, because diffusers and transformers are imported late.
"""

import copy
from collections import Counter
from contextlib import suppress
from functools import cache, partial, wraps
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dti_fast.ops import geglu, group_norm_silu, layer_norm

# Smaller tensors, in elements, go the stock way: what they would save is not worth a call through Python.
SMALL = 1 << 18


# Names of the classes of repeated blocks end so, in diffusers' transformers and in transformers' encoders.
BLOCKS = ("Block", "DecoderLayer", "EncoderLayer")


class Frozen:
    """Marks a class that stands in for the stock class behind it."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _unless_restored(cls.forward)

    def __reduce_ex__(self, protocol):
        """Pickled as an instance of the frozen class of its stock class, since some classes are made at run time."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        for make in (_frozen_class, block_class):
            if make(self.stock()) is type(self):
                return (_new, (make, self.stock()), *reduced[2:])
        return reduced

    @classmethod
    def stock(cls) -> type:
        return next(base for base in cls.__mro__ if not issubclass(base, Frozen))

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        """Whether this instance of the stock class is one that the frozen class can stand in for."""
        return True


def _unless_restored(forward):
    """`forward` of a frozen class; of the module's own class once that is stock again.

    Hooks that were set on a frozen module, such as accelerate's and diffusers' for offloading, go on calling it.
    """

    @wraps(forward)
    def call(self, *args, **kwargs):
        if isinstance(self, Frozen):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    call.frozen = True
    return call


def bare(module: nn.Module) -> bool:
    """Whether a call of `module` runs its class's forward and nothing else."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return "forward" not in module.__dict__ and not any(hooks)


def _stock_way(module: nn.Module, x: Tensor) -> bool:
    """Whether `x` is small or of a dtype that the ops do not take, or weight or bias have been made trainable since."""
    trainable = any(p is not None and p.requires_grad for p in (module.weight, module.bias))
    return trainable or _small(x)


def _small(x: Tensor) -> bool:
    return x.numel() < SMALL or x.dtype == torch.float64


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose backward knows its input's shape only."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.shape, ctx.settings = x.shape, (stride, padding, dilation, groups)
        ctx.save_for_backward(weight)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.settings
        weight = weight.to(grad.dtype)  # under autocast the weight may be wider
        shape_only = grad.new_empty(1).expand(ctx.shape)  # the formula of the input gradient never reads it
        dx, _, _ = torch.ops.aten.convolution_backward(
            grad, shape_only, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )
        return dx, None, None, None, None, None, None


class FrozenConv2d(Frozen, nn.Conv2d):
    """Keeps no input; the stock class keeps it for a weight gradient that is never asked for."""

    @classmethod
    def replaces(cls, module: nn.Conv2d) -> bool:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def forward(self, x: Tensor) -> Tensor:
        if _stock_way(self, x) or not x.requires_grad or x.dim() != 4:
            return super().forward(x)
        return _FrozenConvolution.apply(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class FrozenLayerNorm(Frozen, nn.LayerNorm):
    """Through `dti_fast.ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if _stock_way(self, x) or x.shape[-1:] != self.normalized_shape:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


class FrozenGroupNorm(Frozen, nn.GroupNorm):
    """Through `dti_fast.ops.group_norm_silu`."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.silu)

    def normalise(self, x: Tensor, silu: bool) -> Tensor:
        """The normalised input, and the SiLU of it if `silu`; one tensor is kept for both."""
        if _stock_way(self, x):
            out = super().forward(x)
            return F.silu(out) if silu else out
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu)


class FrozenGroupNormSiLU(FrozenGroupNorm):
    """GroupNorm and the SiLU behind it, whose own module is a `FusedSiLU` then."""

    silu = True


class FusedSiLU(Frozen, nn.SiLU):
    """A SiLU that the GroupNorm before it applies already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _checkpointed(module: nn.Module, function, *args, **kwargs):
    """`function(*args, **kwargs)`, a part of `module`, computed again in the backward pass if there is one."""
    inputs = chain(tree_leaves((args, kwargs)), module.parameters())
    if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return function(*args, **kwargs)
    # Random numbers are for dropout, which draws none in evaluation mode.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=module.training, **kwargs)


def _diffusers_layers() -> list[type]:
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    class FrozenGEGLU(Frozen, GEGLU):
        """Keeps the projection's output alone; the gelu is computed again in the backward pass."""

        def forward(self, hidden_states):
            projected = self.proj(hidden_states)
            if _small(projected):
                hidden, gate = projected.chunk(2, dim=-1)
                return hidden * F.gelu(gate)
            return geglu(projected)

    class FrozenResnetBlock2D(Frozen, ResnetBlock2D):
        """norm1, SiLU, conv1, time shift, norm2, SiLU, conv2; each norm keeps one tensor for itself and its SiLU."""

        recompute = "none"

        @classmethod
        def replaces(cls, block) -> bool:
            plain = block.time_embedding_norm == "default" and block.upsample is None and block.downsample is None
            norms = type(block.norm1) is type(block.norm2) is nn.GroupNorm
            return plain and norms and type(block.nonlinearity) is nn.SiLU

        def forward(self, input_tensor, temb, *args, **kwargs):
            if self.recompute == "block":
                return _checkpointed(self, self._compute, input_tensor, temb)
            return self._compute(input_tensor, temb)

        def _compute(self, x, temb):
            hidden = self.conv1(self._activate(self.norm1, x))
            if temb is not None and self.time_emb_proj is not None:
                temb = temb if self.skip_time_act else self.nonlinearity(temb)
                hidden = hidden + self.time_emb_proj(temb)[:, :, None, None]
            hidden = self.conv2(self.dropout(self._activate(self.norm2, hidden)))
            x = x if self.conv_shortcut is None else self.conv_shortcut(x)
            hidden = x + hidden
            return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor

        def _activate(self, norm, x):
            # Hooks on either module see what they would see in the stock block.
            if isinstance(norm, FrozenGroupNorm) and bare(norm) and bare(self.nonlinearity):
                return norm.normalise(x, silu=True)
            return self.nonlinearity(norm(x))

    class FrozenTransformerBlock(Frozen, BasicTransformerBlock):
        """Self-attention, cross-attention and feed-forward, each behind a LayerNorm.

        `recompute` "geglu" keeps the third LayerNorm's input, from which the backward computes the GEGLU's
        projection again; "block" keeps the block's input.
        """

        recompute = "none"

        @classmethod
        def replaces(cls, block) -> bool:
            plain = block.norm_type == "layer_norm" and block.pos_embed is None and block._chunk_size is None
            return plain and block.attn2 is not None and not hasattr(block, "fuser")

        def forward(
            self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
            timestep=None, cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
        ):  # fmt: skip
            arguments = hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask
            arguments = *arguments, cross_attention_kwargs or {}
            if self.recompute == "block":
                return _checkpointed(self, self._compute, *arguments)
            return self._compute(*arguments)

        def _compute(self, x, attention_mask, encoder_hidden_states, encoder_attention_mask, kwargs):
            text = encoder_hidden_states if self.only_cross_attention else None
            x = x + self.attn1(self.norm1(x), encoder_hidden_states=text, attention_mask=attention_mask, **kwargs)
            text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            x = x + self.attn2(self.norm2(x), **text, **kwargs)
            if self.recompute == "geglu":
                return x + _checkpointed(self, self._feed_forward, x)
            return x + self._feed_forward(x)

        def _feed_forward(self, x):
            return self.ff(self.norm3(x))

    return [FrozenGEGLU, FrozenResnetBlock2D, FrozenTransformerBlock]


@cache
def frozen_classes() -> dict[type, type[Frozen]]:
    """The frozen class for each stock class, of those libraries that are installed."""
    classes = [FrozenConv2d, FrozenLayerNorm, FrozenGroupNorm]
    with suppress(ImportError):
        classes += _diffusers_layers()
    for frozen in classes:
        frozen.__qualname__ = frozen.__qualname__.rpartition(".")[2]
        frozen.__name__ = frozen.stock().__name__  # by which libraries look for blocks to compile or to wrap
    return {frozen.stock(): frozen for frozen in classes}


@cache
def block_class(stock: type) -> type[Frozen]:
    """The frozen class of any other block: its own forward, computed again in the backward pass."""

    stock_forward = stock.forward  # torch.compile cannot take it from a class that diffusers allows in its graphs

    @wraps(stock_forward)
    def forward(self, *args, **kwargs):
        compute = partial(stock_forward, self)
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            return _checkpointed_with_cache(self, compute, *args, **kwargs)
        return _checkpointed(self, compute, *args, **kwargs)

    names = {"__module__": __name__, "__qualname__": f"Frozen{stock.__name__}", "recompute": "block"}
    return type(stock.__name__, (Frozen, stock), {**names, "forward": forward})


def _checkpointed_with_cache(module: nn.Module, function, *args, **kwargs):
    """`_checkpointed` for a block that puts keys and values into one of transformers' caches.

    They go into it once.  The second time they go into a copy of what the cache was, as far as it is the block's own.
    Caches that write to their tensors are left alone, and their block is not computed again.
    """
    name = next((name for name, value in kwargs.items() if hasattr(value, "get_seq_length")), None)
    index = {child.layer_idx for child in module.modules() if hasattr(child, "layer_idx")}
    present = [kwargs.pop(name, None)]
    kinds = {type(part).__name__ for part in (*present, *getattr(present[0], "layers", ()))}
    replaces_tensors = kinds <= {"DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"}
    if not replaces_tensors or present[0].offloading or len(index) != 1:
        return function(*args, **kwargs, **({} if name is None else {name: present[0]}))

    def own(cache):
        copied = copy.copy(cache)
        copied.layers = [copy.copy(layer) if i in index else None for i, layer in enumerate(cache.layers)]
        return copied

    before = own(present[0])

    def compute(*args, **kwargs):
        return function(*args, **kwargs, **{name: present.pop() if present else own(before)})

    return _checkpointed(module, compute, *args, **kwargs)


def _frozen_class(stock: type) -> type[Frozen] | None:
    return frozen_classes().get(stock)


def _new(make, stock: type) -> nn.Module:
    frozen = make(stock)
    return frozen.__new__(frozen)


def fusable_pairs(module: nn.Module):
    """Each last GroupNorm of a frozen diffusers model whose SiLU can move into it, with the module of that SiLU.

    Only where nothing else can see the difference: both are the model's alone, without hooks, and the model's forward
    is the one of its class.
    """
    parents = Counter(child for parent in module.modules() for child in parent._modules.values())  # of each module
    for child in module.modules():
        norm, activation = (child._modules.get(name) for name in ("conv_norm_out", "conv_act"))
        if type(norm) is not FrozenGroupNorm or type(activation) is not nn.SiLU:
            continue
        stock_model = type(child).__module__.startswith("diffusers.") and "forward" not in child.__dict__
        if stock_model and all(bare(part) and parents[part] == 1 for part in (norm, activation)):
            yield norm, activation
