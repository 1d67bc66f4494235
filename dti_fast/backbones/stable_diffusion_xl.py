"""SDXL: two CLIP text encoders, penultimate layers, pooled text and picture sizes as extra conditions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dti_fast.backbones.stable_diffusion import StableDiffusion
from dti_fast.errors import UserError


class StableDiffusionXL(StableDiffusion):
    load_arguments: Mapping = {}

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if len(self.text_encoders) != 2:
            raise UserError("this SDXL pipeline has one text encoder, as the refiner has; train on the base model")
        pooled = self.text_encoders[-1]
        self._pooled_model = getattr(pooled, "text_model", pooled)
        self._stock_end = self._pooled_model.eos_token_id

    def condition(self, tokens, sizes: Tensor) -> dict:
        outputs = [
            text_encoder(ids, output_hidden_states=True)
            for text_encoder, (ids, _) in zip(self.text_encoders, tokens, strict=True)
        ]
        return {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], -1),
            "added_cond_kwargs": {"text_embeds": outputs[-1].text_embeds, "time_ids": sizes},
        }

    def set_pooling(self, pooling: str) -> None:
        """`eos`: pool at the end of the text.  `reference`: as transformers does by default.

        SDXL's second encoder says `eos_token_id: 2`, which makes transformers pool at the largest id: the
        placeholder, whose words after it are then not seen by the pooled features.
        """
        self._pooled_model.eos_token_id = self.tokenizers[-1].eos_token_id if pooling == "eos" else self._stock_end
