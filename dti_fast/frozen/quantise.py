"""Frozen Linears, and 1 x 1 convolutions if asked, with weights in 8 or 4 bits; everything else stays as it is.

The arithmetic is bitsandbytes' ops.  Its own layers are made for more than frozen weights: `Linear8bitLt` keeps every
layer's input for a weight gradient, and `Linear4bit` repacks its weights in a preview on some CPUs, after which they
have no backward.
"""

import warnings
from collections import Counter
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dti_fast.errors import UserError
from dti_fast.frozen.layers import FrozenConv2d, bare
from dti_fast.quiet import without_remarks

BLOCK = 64  # weights under one scale in nf4
SCALE_BLOCK = 256  # of these scales under one scale

# Small layers through which every block is conditioned: rounding them costs accuracy and saves nothing
# (docs/quantisation.md).
KEPT = {"time_embedding", "add_embedding", "text_projection"}


class _FrozenProduct(torch.autograd.Function):
    """A quantised layer's output; its input gradient is that of a Linear with the dequantised weight."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantisedLinear", bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*layer.matrix())  # offloading may take them from the layer before the backward pass
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.expand(grad.dtype, *ctx.saved_tensors), None, None


class QuantisedLinear(nn.Linear):
    """A frozen Linear that keeps neither its input nor its dequantised weight for the backward pass.

    All its state is in plain tensors: `weight` in the quantised format, float32 scales, `bias` in the dtype of the
    computation.
    """

    def __init__(self, in_features: int, out_features: int, weight: Tensor, bias: Tensor | None, **scales: Tensor):
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        for name, scale in scales.items():
            self.register_buffer(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None and self.bias.requires_grad:  # made trainable since
            return _FrozenProduct.apply(x, self, None) + self.bias
        return _FrozenProduct.apply(x, self, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x [..., in]` times the transposed weight, plus `bias [out]`."""
        return F.linear(x, self.dequantised(x.dtype), bias)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]` that the layer stands for."""
        return self.expand(dtype, *self.matrix())

    def matrix(self) -> tuple[Tensor, ...]:
        """The weight in the quantised format, and its scales."""
        return self.weight, *self.buffers(recurse=False)

    def expand(self, dtype: torch.dtype, weight: Tensor, *scales: Tensor) -> Tensor:
        """The weight `[out, in]` that `matrix` stands for."""
        raise NotImplementedError


class Int8Linear(QuantisedLinear):
    """int8 weights and activations, one scale for each row of either: LLM.int8 without its outliers.

    `weight` is int8 `[out, in]`, `scale` `[out]` the largest magnitude of each row.  The input gradient is taken as if
    the input had not been rounded.
    """

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, device) -> "Int8Linear":
        matrix = layer.weight.flatten(1)
        weight, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(matrix.to(device, torch.float16), 0.0)
        return cls(*reversed(matrix.shape), weight, _bias(layer, device), scale=scale)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, row_scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(
            x.reshape(-1, self.in_features).to(torch.float16), 0.0
        )
        out = torch.ops.bitsandbytes.int8_scaled_mm(rows, self.weight, row_scale, self.scale, bias=bias, dtype=x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def expand(self, dtype: torch.dtype, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.to(dtype) * (scale / 127).to(dtype).unsqueeze(1)


class NF4Linear(QuantisedLinear):
    """QLoRA's 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, section 3); activations stay.

    `weight` holds two weights a byte, row by row in blocks of 64.  Its dtype is int8, which stands for quantised
    weights: transformers' T5 casts activations to any other.  A block's scale is
    `table[scale] * scale_scale + scale_mean`: `scale` is uint8 `[blocks]`, `scale_scale` `[blocks / 256]`.
    """

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, device) -> "NF4Linear":
        # Flat: blocks that end inside a row of the matrix are misread on a CPU (bitsandbytes 0.50).
        matrix = layer.weight.flatten(1)
        flat = matrix.to(device).flatten()
        weight, largest = torch.ops.bitsandbytes.quantize_4bit(flat, BLOCK, "nf4", torch.uint8)
        mean = largest.mean()
        table = _scale_table(largest.device)
        scale, scale_scale = torch.ops.bitsandbytes.quantize_blockwise(largest - mean, table, SCALE_BLOCK)
        return cls(
            *reversed(matrix.shape), weight.view(torch.int8), _bias(layer, device),
            scale=scale, scale_scale=scale_scale, scale_mean=mean,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Reads files in which the bytes are uint8, too."""
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].dtype == torch.uint8:
            state_dict[name] = state_dict[name].view(torch.int8)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def expand(self, dtype, weight: Tensor, scale: Tensor, scale_scale: Tensor, scale_mean: Tensor) -> Tensor:
        table = _scale_table(scale.device)
        scale = torch.ops.bitsandbytes.dequantize_blockwise(scale, scale_scale, table, SCALE_BLOCK, torch.float32)
        shape = (self.out_features * self.in_features,)
        packed = weight.view(torch.uint8)
        flat = torch.ops.bitsandbytes.dequantize_4bit(packed, scale + scale_mean, BLOCK, "nf4", shape, dtype)
        return flat.view(self.out_features, self.in_features)


class _Pointwise:
    """A 1 x 1 convolution `[N, in, H, W]` to `[N, out, H, W]`, in channels last, as the Linear that it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Int8Pointwise(_Pointwise, Int8Linear):
    """A row that is rounded with one scale is a pixel."""


class NF4Pointwise(_Pointwise, NF4Linear):
    """See `NF4Linear`."""


PRECISIONS = {"int8": Int8Linear, "nf4": NF4Linear}
_POINTWISE = {"int8": Int8Pointwise, "nf4": NF4Pointwise}


def quantise_frozen(
    module: nn.Module, precision: str, device: torch.device | str | None = None, *, convolutions: bool = False
) -> list[str]:
    """Replace the frozen Linears inside a denoiser or text encoder by quantised ones, in place.

    Layer by layer: a weight goes to `device` alone, is quantised there and replaced before the next one follows, so
    that the device never holds more than the quantised layers and one matrix in full.

    Left as they are: everything that is no plain `nn.Linear` (convolutions, norms, embeddings), Linears with a
    trainable parameter (adapters too), and those of `KEPT`.  Also Linears whose hooks or own `forward` (offloading sets
    one) would be lost, or that the module holds twice; of these a warning gives the number.

    Args:
        module: weights in the dtype in which it computes: float32, bfloat16 or float16.
        precision: `int8` or `nf4`, see `Int8Linear` and `NF4Linear`.
        device: where the quantised layers go; by default each stays where it is.
        convolutions: frozen 1 x 1 convolutions (stride 1, no padding, one group) as well.  They are most of SANA's
            parameters.

    Returns:
        The names of the replaced layers.

    Raises:
        UserError: if bitsandbytes is missing.
        ValueError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_bitsandbytes(precision)
    names = replaceable(module, convolutions=convolutions)
    with torch.no_grad():
        for name in names:
            layer = module.get_submodule(name)
            kind = (_POINTWISE if isinstance(layer, nn.Conv2d) else PRECISIONS)[precision]
            module.set_submodule(name, kind.of(layer, device or layer.weight.device).train(layer.training))
    left = len(_replaceable(module, convolutions))
    if left:
        warnings.warn(
            f"quantise_frozen left {left} layers as they are: they have hooks or a forward of their own, as offloading "
            "sets it, or the module holds them twice",
            stacklevel=2,
        )
    return names


def replaceable(module: nn.Module, *, convolutions: bool = False) -> list[str]:
    """Names of the layers inside `module` that `quantise_frozen` replaces."""
    parents = Counter(child for parent in module.modules() for child in parent._modules.values())
    return [name for name, layer in _replaceable(module, convolutions).items() if bare(layer) and parents[layer] == 1]


def _replaceable(module: nn.Module, convolutions: bool) -> dict[str, nn.Module]:
    """Those, and those that are left alone for what has been made of them."""
    return {
        name: child
        for name, child in module.named_modules()
        if (type(child) is nn.Linear or (convolutions and _is_pointwise(child)))
        and name
        and not any(p.requires_grad for p in child.parameters())
        and not KEPT & set(name.split("."))
    }


def _is_pointwise(module: nn.Module) -> bool:
    if type(module) not in (nn.Conv2d, FrozenConv2d):
        return False
    one = module.kernel_size == module.stride == (1, 1) and module.groups == 1
    return one and module.padding in ((0, 0), 0, "valid", "same")


def weight_bytes(
    module: nn.Module, precision: str, dtype: torch.dtype = torch.bfloat16, *, convolutions: bool = False
) -> int:
    """Bytes of parameters and buffers once `module` is quantised; it may be on the meta device or fake.

    Args:
        precision: `int8`, `nf4`, or anything else for weights that are all in `dtype`.
        dtype: of what is not quantised.
        convolutions: as in `quantise_frozen`.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    total = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors.values())
    if precision in PRECISIONS:
        for name in replaceable(module, convolutions=convolutions):
            rows, columns = module.get_submodule(name).weight.shape[:2]
            total += _quantised_bytes(rows, columns, precision) - rows * columns * dtype.itemsize
    return total


def check_bitsandbytes(precision: str) -> None:
    """Raise a UserError if bitsandbytes cannot be imported."""
    try:
        with without_remarks():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"--base_precision {precision} needs bitsandbytes: install it with  pip install bitsandbytes"
        ) from None


def _bias(layer: nn.Linear | nn.Conv2d, device) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().to(device)


@cache
def _scale_table(device: torch.device) -> Tensor:
    """The 256 values that a scale of nf4 can have, before its own scale; bitsandbytes' dynamic 8-bit map."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def _quantised_bytes(rows: int, columns: int, precision: str) -> int:
    """Of one weight with its scales."""
    count = rows * columns
    if precision == "int8":
        return count + 4 * rows
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // SCALE_BLOCK) + 4
