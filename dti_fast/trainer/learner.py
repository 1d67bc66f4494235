"""What learns, and by which optimizer."""

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dti_fast.backbones import Backbone
from dti_fast.loss import Consistency
from dti_fast.optim import SphericalAdam, SphericalSGD
from dti_fast.tokens import TokenEmbedding, cross_init, initial_magnitudes
from dti_fast.trainer.config import Settings
from dti_fast.trainer.parts import JointOptimizer, Trainable


def install_embeddings(config: Settings, backbone: Backbone) -> list[TokenEmbedding]:
    """Put the placeholder into every text encoder, at the start of the method: a direction of fixed norm for `dti`, a
    free vector for the others, from the initializer's own rows or, for `crossinit`, from the encoder's output for it.
    """
    embeddings: list[TokenEmbedding] = []
    with ExitStack() as undo:  # of all encoders or of none
        for text_encoder, tokenizer in zip(backbone.text_encoders, backbone.tokenizers, strict=True):
            init = config.initializer_token
            if config.method == "crossinit":
                init = cross_init(text_encoder, tokenizer, init)
            magnitude = config.magnitude if config.method == "dti" else None
            embeddings.append(
                TokenEmbedding.install(
                    text_encoder, tokenizer, config.placeholder_token,
                    init=init, num_vectors=config.num_vectors, magnitude=magnitude,
                )
            )  # fmt: skip
            undo.callback(embeddings[-1].uninstall)
        undo.pop_all()
    return embeddings


def _optimizer(config: Settings, embeddings: list[TokenEmbedding], lr: Tensor) -> torch.optim.Optimizer:
    if config.method == "dti":
        per_sample = bool(config.per_sample_normalisation)
        groups = [{"params": [e.rows, e.per_sample()] if per_sample else [e.rows], "mu": e.mu} for e in embeddings]
        prior = {"kappa": config.kappa, "relative": config.kappa_mode == "relative"}
        if config.optimizer == "adamw":
            return SphericalAdam(groups, lr=lr, **prior)
        return SphericalSGD(groups, lr=lr, **prior, beta=config.beta, momentum=config.momentum, per_sample=per_sample)
    optimizer = torch.optim.AdamW(
        [e.rows for e in embeddings], lr=0.0, weight_decay=config.adam_weight_decay, fused=True, capturable=True
    )
    for group in optimizer.param_groups:
        group["lr"] = lr  # only here: the constructor would read it, and so wait for the device
    return optimizer


class Learner:
    """The parameters of a run with their optimizers and loss scaler.

    Attributes:
        embeddings: one for each text encoder.
        parts: everything that learns.
        ancillary: the part of them that is LoRA and magnitudes, or None.
        scaler: scales the loss of an fp16 model; disabled otherwise.
    """

    def __init__(self, config: Settings, backbone: Backbone, embeddings: list[TokenEmbedding], lr: Tensor, scaler):
        self.embeddings, self.scaler = embeddings, scaler
        name = "directions" if config.method == "dti" else "vectors"
        rows = {f"{name}.{i}": e.rows for i, e in enumerate(embeddings)}
        self.parts = [Trainable(rows, _optimizer(config, embeddings, lr))]
        self.reg_lambda = config.reg_lambda
        self.initial = [e.rows.detach().clone() for e in embeddings]
        self.final_norms = None
        if config.method == "ti-rescaled":
            self.final_norms = [
                initial_magnitudes(e.weight, config.initializer_token, e.rows.detach(), config.magnitude)
                for e in embeddings
            ]
        self.ancillary = None
        if config.lora_rank or config.train_magnitude:
            from dti_fast.trainer.parts.ancillary import Ancillary

            self.ancillary = Ancillary(config, backbone, embeddings)
            self.parts.append(self.ancillary)
        self.optimizer = JointOptimizer([part.optimizer for part in self.parts])

    def _parameters(self) -> list[tuple[str, nn.Parameter, Trainable]]:
        return [(name, p, part) for part in self.parts for name, p in part.parameters.items()]

    @property
    def consistency(self) -> Consistency | None:
        """What the loss is to do beside the squared error, at the present step."""
        return None if self.ancillary is None else self.ancillary.consistency

    def begin(self, step: int, factor: float) -> None:
        """Before step `step`, the first is 0; `factor` is what the schedule makes of learning rates on the host."""
        if self.ancillary is not None:
            self.ancillary.begin(step, factor)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def penalty(self) -> Tensor | float:
        """What is added to the loss: for `crossinit` lambda |e - e0|^2 / (K D), summed over the text encoders."""
        if self.reg_lambda is None:
            return 0.0
        pairs = zip(self.embeddings, self.initial, strict=True)
        return self.reg_lambda * sum(F.mse_loss(e.rows, initial) for e, initial in pairs)

    def step(self, loss: Tensor) -> Tensor:
        """Move every part; returns whether `loss` or its gradient was not finite, 0 or 1, on the device.

        Then nothing moves.  Gradients that overflow under an enabled scaler skip one update and are no failure.
        """
        if self.ancillary is not None:
            self.ancillary.backward_prior(self.scaler.scale)
        health = loss
        if not self.scaler.is_enabled():  # an enabled scaler finds overflows itself
            health = loss + get_total_norm([p.grad for _, p, _ in self._parameters() if p.grad is not None])
        failed = (~torch.isfinite(health)).float()
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = failed
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return failed

    def vectors(self) -> list[Tensor]:
        """What embedding files hold: for each text encoder float32 `[K, D]`, for `ti-rescaled` with the norm set."""
        vectors = [embedding.vectors().detach() for embedding in self.embeddings]
        if self.final_norms is None:
            return vectors
        return [norms * F.normalize(v, dim=-1) for norms, v in zip(self.final_norms, vectors, strict=True)]

    def finish(self) -> None:
        """After the last step, let the model see what the files hold."""
        if self.final_norms is not None:
            for embedding, vectors in zip(self.embeddings, self.vectors(), strict=True):
                embedding.rows.data.copy_(vectors)

    def remove(self) -> None:
        """Take everything but the embeddings out of the model."""
        if self.ancillary is not None:
            self.ancillary.remove()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes: parameters by their names, their optimizer's state as `name/key`."""
        tensors = {}
        for name, p, part in self._parameters():
            tensors[name] = p.data
            tensors |= {f"{name}/{key}": value for key, value in part.state_of(p).items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors that `state` gave."""
        for name, p, part in self._parameters():
            p.data.copy_(tensors[name])
            state = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
            part.load_state_of(p, state)
