"""SDXL: two CLIP text encoders, penultimate layers, pooled text and picture sizes as extra conditions."""

import torch
from torch import Tensor

from dti_fast.backbones.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """As StableDiffusion, with `text_encoder_2` second in both lists."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        pipeline.text_encoder_2.requires_grad_(False).eval()
        self.text_encoders.append(pipeline.text_encoder_2)
        self.tokenizers.append(pipeline.tokenizer_2)

    def condition(self, ids: list[Tensor], sizes: Tensor) -> dict:
        outputs = [
            text_encoder(i, output_hidden_states=True) for text_encoder, i in zip(self.text_encoders, ids, strict=True)
        ]
        return {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], -1),
            "added_cond_kwargs": {"text_embeds": outputs[1].text_embeds, "time_ids": sizes},
        }

    def set_pooling(self, pooling: str) -> None:
        """`eos`: pool at the end of the text.  `reference`: as transformers does by default.

        SDXL's second encoder says `eos_token_id: 2`, which makes transformers pool at the largest id: the
        placeholder, whose words after it are then not seen by the pooled features.
        """
        if pooling == "eos":
            text_model = getattr(self.text_encoders[1], "text_model", self.text_encoders[1])
            text_model.eos_token_id = self.tokenizers[1].eos_token_id
