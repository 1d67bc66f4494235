"""What may learn beside the directions: LoRA layers in the denoiser, and the embeddings' magnitudes."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from dti_fast.backbones import Backbone
from dti_fast.loss import Consistency
from dti_fast.tokens import TokenEmbedding
from dti_fast.trainer.config import Settings
from dti_fast.trainer.parts import Trainable
from dti_fast.trainer.parts.adamw8bit import AdamW8bit, state_bytes
from dti_fast.trainer.parts.lora import Lora, write_lora

LORA_WEIGHT_DECAY = 1e-2  # that of the method's own experiments


class Ancillary(Trainable):
    """LoRA and magnitudes under one AdamW with 8-bit states.

    Its update waits for the device once in a step (`AdamW8bit`); a run without ancillary parameters never does.

    Attributes:
        lora: the LoRA, or None.
    """

    def __init__(self, config: Settings, backbone: Backbone, embeddings: list[TokenEmbedding]):
        groups, parameters = [], {}
        self.lora, self.lora_learns, self.embeddings = None, False, []
        self.first_step, self.dco_beta, self.prior = config.lora_start_step, config.dco_beta, config.magnitude_prior
        if config.lora_rank:
            self.lora = Lora(backbone, config.lora_rank, config.lora_alpha, config.seed)
            self.lora.enable(False)
            parameters |= {f"lora.{name}": p for name, p in self.lora.parameters.items()}
            groups.append(
                {
                    "params": list(self.lora.parameters.values()),
                    "full_lr": config.lora_learning_rate,
                    "weight_decay": LORA_WEIGHT_DECAY,
                }
            )
        if config.train_magnitude:
            self.embeddings = embeddings
            scales = {f"log_scales.{i}": e.train_magnitude() for i, e in enumerate(embeddings)}
            parameters |= scales
            groups.append(
                {"params": list(scales.values()), "full_lr": config.magnitude_learning_rate, "weight_decay": 0.0}
            )
        super().__init__(parameters, AdamW8bit(groups))

    def begin(self, step: int, factor: float) -> None:
        """Before step `step`, the first is 0: `factor` is what the schedule makes of the learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]
        if self.lora is not None and not self.lora_learns and step + 1 >= self.first_step:
            self.lora.enable(True)
            self.lora_learns = True

    @property
    def consistency(self) -> Consistency | None:
        """DCO's part of the loss, if that is asked for and the LoRA learns."""
        if not (self.dco_beta and self.lora_learns):
            return None
        return Consistency(self.dco_beta, self.lora.base_model)

    def backward_prior(self, scale: Callable[[Tensor], Tensor]) -> None:
        """Add the gradient of the magnitudes' prior; `scale` is the scaler's."""
        for embedding in self.embeddings:
            scale(self.prior * embedding.magnitude_penalty()).backward()

    def write_lora(self, folder: Path, placeholder: str, pipeline, metadata: dict) -> list[Path]:
        """Write the LoRA beside the embedding, in diffusers' format and in kohya's."""
        return write_lora(folder, placeholder, pipeline, self.lora, metadata)

    def remove(self) -> None:
        """Take the LoRA out of the denoiser; magnitudes go with their embeddings."""
        if self.lora is not None:
            self.lora.remove()

    def state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        return self.optimizer.tensors(p)

    def load_state_of(self, p: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        self.optimizer.load_tensors(p, tensors)

    def describe(self) -> str:
        """What learns, and how many bytes its optimizer's state takes."""
        eight_bit, total, plain = state_bytes(self.optimizer)
        parts = []
        if self.lora is not None:
            count = sum(p.numel() for p in self.lora.parameters.values())
            parts.append(f"LoRA of {count:,} parameters in {len(self.lora.layers)} layers")
        if self.embeddings:
            parts.append(f"{sum(len(e.directions) for e in self.embeddings)} magnitudes, their states float32")
        return (
            f"also learning: {'; '.join(parts)}. Optimizer state {total:,} bytes, {eight_bit / total:.1%} of them "
            f"8-bit; with float32 AdamW {plain:,}"
        )
