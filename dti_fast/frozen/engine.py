"""`optimize_frozen`: a frozen model that saves less, in place."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from dti_fast.frozen import layers

RECOMPUTE = ("none", "geglu", "block")


def optimize_frozen(module: nn.Module, *, recompute: str | Mapping[str, str] = "none") -> nn.Module:
    """Make a frozen diffusion model or text encoder save only what its input gradients need, in place.

    Outputs and input gradients stay the same, up to rounding.  Frozen convolutions keep no input, GroupNorm with
    SiLU keeps one tensor instead of two, GEGLU keeps its projection alone.

    What does not behave as its class says stays stock: modules with trainable parameters of their own, with a `forward`
    of their own, as hooks for offloading set it, or with a parametrization, and instances of subclasses.  `left_stock`
    names the first three; of the second and third a warning gives the number.  Hooks see what they see in the stock
    model.  Only those that are put on a UNet's `conv_norm_out` and `conv_act` afterwards see the SiLU in the norm.

    Calling it again changes `recompute`; modules that have got a `forward` of their own since become stock.

    Args:
        module: a diffusers UNet or transformer or a text encoder of transformers, on any device, in any dtype.  On CUDA
            16-bit convolution weights become channels last.
        recompute: "none" adds no matrix product.  "geglu" computes the GEGLU's projection again in the backward pass,
            from the input of the block's third LayerNorm: about 13 % more FLOPs for SDXL.  "block" is gradient
            checkpointing of every ResNet block, transformer block and text encoder layer, about 37 % more: of those
            members of a ModuleList whose class is called ...Block, ...EncoderLayer or ...DecoderLayer.  Or one
            of these for each of the model's parts by name, such as `{"down_blocks.2": "geglu", "mid_block": "block"}`;
            parts not named get "none".

    Returns:
        `module`.

    Raises:
        ValueError: for another mode, or a name that is not a submodule's.
        RuntimeError: if something has made a subclass of a frozen layer's class since, as parametrizations and
            sharding do: that has to be undone first.
    """
    modes = {"": recompute} if isinstance(recompute, str) else dict(recompute)
    for name, mode in modes.items():
        if mode not in RECOMPUTE:
            raise ValueError(f"recompute is {', '.join(RECOMPUTE)}, or a mapping to these, got {mode!r}")
        try:
            module.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no part {name!r} to recompute") from None
    _back_to_stock(module)
    wanted: dict[nn.Module, str] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        parts = [part for part in modes if not part or f"{name}.".startswith(f"{part}.")]
        mode = modes[max(parts, key=len)] if parts else "none"
        wanted[child] = max(mode, wanted.get(child, mode), key=RECOMPUTE.index)  # where it has several names
    frozen_classes, blocks = layers.frozen_classes(), _blocks(module)
    left = 0
    for child, mode in wanted.items():
        frozen = frozen_classes.get(parametrize.type_before_parametrizations(child))
        if frozen is not None and not frozen.replaces(child):
            frozen = None
        if frozen is None and child in blocks and mode == "block":
            frozen = layers.block_class(type(child))
        if frozen is None:
            continue
        reason = _reason(child)
        if reason is not None:
            left += reason != TRAINABLE
            continue
        child.__class__ = frozen
        if hasattr(frozen, "recompute"):
            child.recompute = mode
            if mode == "block":  # what lies in it is computed again with it
                wanted.update((inner, "none") for inner in child.modules() if inner is not child)
        if frozen is layers.FrozenConv2d and child.weight.is_cuda and child.weight.element_size() == 2:
            # The layout that tensor cores read.
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)
    for norm, activation in layers.fusable_pairs(module):
        norm.__class__ = layers.FrozenGroupNormSiLU
        activation.__class__ = layers.FusedSiLU
    if left:
        warnings.warn(
            f"optimize_frozen left {left} layers as they are, which saves less memory: they have a forward of their "
            "own, as hooks for offloading set it, or a parametrization (dti_fast.frozen.left_stock names them)",
            stacklevel=2,
        )
    return module


def restore(module: nn.Module) -> nn.Module:
    """Undo `optimize_frozen`: stock classes, contiguous convolution weights; returns `module`.

    Hooks that have been set since stay, and work.

    Raises:
        RuntimeError: as `optimize_frozen`.
    """
    for child in _back_to_stock(module):
        if isinstance(child, nn.Conv2d) and child.weight.is_cuda:
            child.weight.data = child.weight.data.contiguous()
    return module


def _back_to_stock(module: nn.Module) -> list[nn.Module]:
    """The frozen modules, of stock classes again; copies no weight, since memory may just have run out."""
    frozen = {name: child for name, child in module.named_modules() if isinstance(child, layers.Frozen)}
    for name, child in frozen.items():
        if type(child).__module__ != layers.__name__:
            raise RuntimeError(f"{name} is a {type(child).__qualname__} on top of a frozen layer: undo that first")
    for child in frozen.values():
        child.__dict__.pop("recompute", None)
        child.__class__ = type(child).stock()
    for child in module.modules():
        _forget_needless_forward(child)
    return list(frozen.values())


def _forget_needless_forward(module: nn.Module) -> None:
    """Hooks that have been removed leave the forward of the module's class, as it was then, in the module."""
    own = module.__dict__.get("forward")
    function = own.__func__ if getattr(own, "__self__", None) is module else None
    if function is not None and (function is type(module).forward or hasattr(function, "frozen")):
        del module.__dict__["forward"]


def left_stock(module: nn.Module) -> dict[str, str]:
    """Names of the modules that `optimize_frozen` leaves stock because they do not behave as their class says.

    Returns:
        The reason for each: "trainable", "forward of its own" or "parametrization".
    """
    frozen_classes, blocks = layers.frozen_classes(), _blocks(module)
    reasons = {
        name: _reason(child)
        for name, child in module.named_modules()
        if not isinstance(child, layers.Frozen)
        and (parametrize.type_before_parametrizations(child) in frozen_classes or child in blocks)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


TRAINABLE = "trainable"


def _reason(module: nn.Module) -> str | None:
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return TRAINABLE
    if "forward" in module.__dict__:
        return "forward of its own"
    return "parametrization" if parametrize.is_parametrized(module) else None


def _blocks(module: nn.Module) -> set[nn.Module]:
    """The members of lists of blocks."""
    lists = (child for child in module.modules() if isinstance(child, nn.ModuleList))
    return {block for blocks in lists for block in blocks if type(block).__name__.endswith(layers.BLOCKS)}
