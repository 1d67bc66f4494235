"""The tokens that a stock pipeline makes of prompts, noted where it hands them to its text encoders.

Templates, instructions, lengths, lowering and the spelling of learned words all stay the pipeline's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = tuple[Tensor, Tensor]  # ids and mask of prompts, int64 [P, S]


class _Recorded(Exception):
    """The pipeline has come to its denoiser, so that its text encoders have been called."""


class _BlankOutput:
    """Zeros in place of everything that a text encoder returns."""

    def __init__(self, hidden: Tensor, pooled: Tensor | None):
        self.last_hidden_state, self.pooler_output = hidden, pooled
        self.text_embeds, self.hidden_states = pooled, _Repeated(hidden)

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state if self.text_embeds is None else self.text_embeds


class _Repeated:
    """A sequence of any length of one tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getitem__(self, index: int) -> Tensor:
        return self.tensor


def record_tokens(
    pipeline, text_encoders: Sequence[nn.Module], denoiser: nn.Module, prompts: Sequence[str], **call_arguments
) -> list[Tokens]:
    """Per text encoder the ids and mask of prompts, padded to the longest; no model computes anything.

    Args:
        pipeline: of diffusers, with these text encoders and this denoiser in it.
        call_arguments: with which the pipeline is called beside the prompt.
    """
    rows = [_record(pipeline, text_encoders, denoiser, prompt, call_arguments) for prompt in prompts]
    tokens = []
    for of_encoder in zip(*rows, strict=True):
        longest = max(len(ids) for ids, _ in of_encoder)
        ids, mask = ([F.pad(t, (0, longest - len(t))) for t in column] for column in zip(*of_encoder, strict=True))
        tokens.append((torch.stack(ids), torch.stack(mask)))
    return tokens


@torch.no_grad()
def _record(
    pipeline, text_encoders: Sequence[nn.Module], denoiser: nn.Module, prompt: str, call_arguments: Mapping
) -> list[Tokens]:
    """Per text encoder ids and mask `[S]` of its first call, which is that for the positive prompt."""
    calls: list[list[Tokens]] = [[] for _ in text_encoders]

    def stop(*args, **kwargs):
        raise _Recorded

    with ExitStack() as stack:
        for encoder, noted in zip(text_encoders, calls, strict=True):
            stack.enter_context(_forward(encoder, _blank_forward(encoder, noted)))
        stack.enter_context(_forward(denoiser, stop))
        with suppress(_Recorded):
            pipeline(prompt=prompt, num_inference_steps=2, **call_arguments)
    return [noted[0] for noted in calls]


def _blank_forward(encoder, noted: list[Tokens]) -> Callable:
    width = encoder.get_input_embeddings().weight.shape[1]
    projection = getattr(encoder, "text_projection", None)

    def forward(input_ids=None, attention_mask=None, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        noted.append((input_ids[0].cpu(), mask[0].cpu()))
        hidden = torch.zeros(*input_ids.shape, width, dtype=encoder.dtype, device=input_ids.device)
        pooled = None if projection is None else hidden.new_zeros(len(input_ids), projection.out_features)
        return _BlankOutput(hidden, pooled)

    return forward


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let `module` compute `forward` for a while."""
    own = vars(module).get("forward")  # an offloading library's
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
