"""Attention backends of a frozen model."""

import torch
from torch import nn

from dti_fast.errors import UserError

BACKENDS = ("auto", "sdpa", "xformers", "math")
UNET_PROCESSORS = {"sdpa": "AttnProcessor2_0", "xformers": "XFormersAttnProcessor", "math": "AttnProcessor"}


def set_attention(module: nn.Module, backend: str) -> None:
    """Choose how a diffusers denoiser or a transformers text encoder computes attention.

    Args:
        module: on its device and in its dtype.
        backend: "sdpa", PyTorch's fused attention; "xformers", xFormers' memory-efficient attention in a UNet, SDPA in
            a text encoder, which has 77 tokens; "math", plain matrix products and a softmax, which keeps the whole
            attention matrix and is there to compare with; "auto" is what the model came with, which is "sdpa" for all
            families here.

    Raises:
        UserError: if the backend does not run here, found out by running it forward and backward, or if the model has
            attention of its own kind.
    """
    stock = vars(module).pop("_stock_attention", None)
    if stock is not None:
        _set(module, stock)
    if backend == "auto":
        return
    from diffusers.models import attention_processor as processors

    if hasattr(module, "set_attn_processor"):
        present = module.attn_processors
        if any(type(p).__name__ not in UNET_PROCESSORS.values() for p in present.values()):
            raise UserError(f"--attention {backend} is not offered for a {type(module).__name__}; leave it out")
        if backend == "xformers":
            _try_xformers(module)
        choice = getattr(processors, UNET_PROCESSORS[backend])()
    else:
        present = module.config._attn_implementation
        choice = "eager" if backend == "math" else "sdpa"
    module._stock_attention = present
    _set(module, choice)


def _set(module: nn.Module, attention) -> None:
    if hasattr(module, "set_attn_processor"):
        module.set_attn_processor(attention)
    else:
        module.set_attn_implementation(attention)


def _try_xformers(module: nn.Module) -> None:
    weight = next(module.parameters())
    try:
        from xformers.ops import memory_efficient_attention

        q = torch.ones(1, 16, 2, 64, device=weight.device, dtype=weight.dtype, requires_grad=True)
        memory_efficient_attention(q, q, q).sum().backward()
    except Exception as error:  # whatever a missing or mismatched build raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        device = weight.device.type
        raise UserError(f"xformers does not run on this {device} device ({reason}); use --attention sdpa") from None
