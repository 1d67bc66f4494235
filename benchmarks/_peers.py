"""A training step as others do it, restated, and our own, on one model.

Each is a context manager that prepares the model, yields a `Contender` and puts the model back.  What peers do is taken
from the public scripts: diffusers' textual_inversion.py and textual_inversion_sdxl.py, and the train_sdxl.py of the
official code of Directional Textual Inversion.  Where they differ from us in what they compute rather than in how, we
are kept equal: dtype, prompts, draws, pooling, and the start, so that the losses can be compared.  Left out, in their
favour: decoding the pictures anew in every step, and text encoders in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._models import Task
from dti_fast.data.draws import Draws, draw
from dti_fast.loss import diffusion_loss
from dti_fast.reference.sphere_step import sphere_step
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.graph import CapturedStep
from dti_fast.trainer.learner import Learner
from dti_fast.trainer.monitor import Monitor
from dti_fast.trainer.step import train_step

SEED, KAPPA, LR = 42, 1e-4, 0.04


class Contender(NamedTuple):
    """A way to train, ready to go.

    loss: forward pass for the draws, to be differentiated.
    step: a whole optimizer step, by its number; returns the loss, on the device or read.
    """

    loss: Callable[[Draws], Tensor]
    step: Callable[[int], Tensor | float]


@contextmanager
def diffusers_ti(task: Task, *, encode=True, host_reads=True, restore=True, checkpointing=False) -> Iterator[Contender]:
    """Textual inversion as diffusers' scripts do it.

    The embedding matrix is resized by the new tokens and trained as a whole by AdamW with its weight decay; then the
    frozen rows are put back from a copy, with a mask made on the CPU.

    Args:
        encode: run the VAE in every step.
        host_reads: read the loss, and SDXL's sizes sample by sample.
        restore: put the frozen rows back.
        checkpointing: of the UNet.
    """
    backbone = task.backbone
    originals = [text_encoder.get_input_embeddings() for text_encoder in backbone.text_encoders]
    matrices = []
    for text_encoder, original, vectors in zip(backbone.text_encoders, originals, task.vectors, strict=True):
        rows = torch.cat([original.weight.detach(), vectors.to(original.weight.dtype)])
        matrices.append(nn.Embedding.from_pretrained(rows, freeze=False))
        text_encoder.set_input_embeddings(matrices[-1])
    copies = [matrix.weight.detach().clone() for matrix in matrices]
    optimizer = torch.optim.AdamW([m.weight for m in matrices], lr=5e-3, weight_decay=1e-2)
    loss = _loss(task, encode, host_reads)

    def step(position: int) -> Tensor | float:
        value = loss(_draw(task, position))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if restore:
            for matrix, copy, first, vectors in zip(matrices, copies, task.first_ids, task.vectors, strict=True):
                frozen = torch.ones(len(copy), dtype=torch.bool)
                frozen[first : first + len(vectors)] = False
                with torch.no_grad():
                    matrix.weight[frozen] = copy[frozen]
        return value.detach().item() if host_reads else value.detach()

    with _checkpointing(backbone, checkpointing):
        yield Contender(loss, step)
    for text_encoder, original in zip(backbone.text_encoders, originals, strict=True):
        text_encoder.set_input_embeddings(original)


class AddedTokens(nn.Module):
    """The official code's embedding: frozen vocabulary, learned rows beside it, looked for by the host."""

    def __init__(self, vocabulary: nn.Embedding, vectors: Tensor, first_id: int, host_reads: bool):
        super().__init__()
        self.vocabulary, self.first_id, self.host_reads = vocabulary, first_id, host_reads
        self.rows = nn.Parameter(F.normalize(vectors, dim=-1))
        self.scales = nn.Parameter(vectors.norm(dim=-1, keepdim=True), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.vocabulary.weight

    def forward(self, ids: Tensor) -> Tensor:
        added = ids >= self.first_id
        out = self.vocabulary(ids.masked_fill(added, 0))
        if not self.host_reads:
            own = (self.scales * self.rows)[(ids - self.first_id).clamp(min=0)]
            return torch.where(added.unsqueeze(-1), own.to(out.dtype), out)
        if added.any():
            rows = ids[added] - self.first_id
            out = out.clone()
            out[added] = (self.scales[rows] * self.rows[rows]).to(out.dtype)
        return out


@contextmanager
def official_dti(task: Task, *, encode=True, host_reads=True, checkpointing=False) -> Iterator[Contender]:
    """Directional Textual Inversion as its official code does it: learned rows apart, the sphere step op by op."""
    backbone = task.backbone
    originals = [text_encoder.get_input_embeddings() for text_encoder in backbone.text_encoders]
    embeddings = [
        AddedTokens(original, vectors, first_id, host_reads)
        for original, vectors, first_id in zip(originals, task.vectors, task.first_ids, strict=True)
    ]
    for text_encoder, embedding in zip(backbone.text_encoders, embeddings, strict=True):
        text_encoder.set_input_embeddings(embedding)
    means = [e.rows.detach().clone() for e in embeddings]
    loss = _loss(task, encode, host_reads)

    @torch.no_grad()
    def update() -> None:
        for embedding, mu in zip(embeddings, means, strict=True):
            rows, one = embedding.rows, torch.ones((), device=mu.device)
            moved, *_ = sphere_step(rows, rows.grad, mu, None, one, LR * one, kappa=KAPPA, beta=0.0, eps=1e-8)
            rows.copy_(moved)
            rows.grad = None

    def step(position: int) -> Tensor | float:
        value = loss(_draw(task, position))
        value.backward()
        update()
        return value.detach().item() if host_reads else value.detach()

    with _checkpointing(backbone, checkpointing):
        yield Contender(loss, step)
    for text_encoder, original in zip(backbone.text_encoders, originals, strict=True):
        text_encoder.set_input_embeddings(original)


@contextmanager
def ours(task: Task, *, recompute: str | None = None, capture: Callable | None = None) -> Iterator[Contender]:
    """The trainer's own step with its monitor; the VAE is off the device.

    Args:
        recompute: as in `optimize_frozen`; None leaves the layers stock.
        capture: as for `CapturedStep`; None runs the operations one by one.
    """
    backbone, device = task.backbone, task.device
    if recompute is not None:
        backbone.optimize_frozen(recompute, "auto")
    if device.type != "cpu":
        backbone.vae.to("cpu")
    embeddings = task.install()
    lr, scaler = torch.full((), LR, device=device), torch.amp.GradScaler(device.type, enabled=False)
    learner = Learner(TrainConfig(kappa=KAPPA).resolved(), backbone, embeddings, lr, scaler)
    failed, last_loss = torch.zeros((), device=device), torch.zeros((), device=device)

    def loss(draws: Draws) -> Tensor:
        return diffusion_loss(backbone, task.data, task.path, draws)

    def optimise(passes: list[Draws]) -> None:
        value, failed_now = train_step(backbone, task.data, task.path, passes, learner, failed)
        failed.copy_(failed_now)
        last_loss.copy_(value)
        monitor.record(value, failed)

    monitor = Monitor(embeddings, 0, 1000)
    run = optimise if capture is None else CapturedStep(optimise, capture)

    def step(position: int) -> Tensor:
        run([_draw(task, position)])
        return last_loss.clone()

    yield Contender(loss, step)
    for embedding in reversed(embeddings):
        embedding.uninstall()
    backbone.restore()
    backbone.set_pooling("eos")  # of the task, for all


def _draw(task: Task, position: int) -> Draws:
    return draw(task.data, task.batch, len(task.path), SEED, position)


def _loss(task: Task, encode: bool, host_reads: bool) -> Callable[[Draws], Tensor]:
    """The peers' forward pass, with the scheduler of diffusers."""
    from diffusers import DDPMScheduler

    backbone, data, device = task.backbone, task.data, task.device
    vae, scale = backbone.vae, backbone.vae.config.scaling_factor
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scheduler = DDPMScheduler.from_config(backbone.pipeline.scheduler.config)

    def loss(draws: Draws) -> Tensor:
        if encode:
            posterior = vae.encode(task.pixels[draws.picture].to(vae.dtype)).latent_dist
            sample = posterior.mean.float() + posterior.std.float() * draws.posterior_noise
            latents = ((sample - shift) * scale).detach()
        else:
            latents = data.mean[draws.picture] + data.std[draws.picture] * draws.posterior_noise
        noisy = scheduler.add_noise(latents, draws.noise, draws.timestep)
        sizes = data.sizes[draws.picture]
        if host_reads and len(backbone.text_encoders) > 1:
            target_size = task.pixels.shape[-2:]
            sizes = torch.tensor([[*(value.item() for value in row[:4]), *target_size] for row in sizes]).to(device)
        tokens = [(ids[draws.prompt], mask[draws.prompt]) for ids, mask in data.tokens]
        condition = backbone.condition(tokens, sizes)
        prediction = backbone.denoise(noisy, draws.timestep, condition)
        if scheduler.config.prediction_type == "epsilon":
            target = draws.noise
        else:
            target = scheduler.get_velocity(latents, draws.noise, draws.timestep)
        return F.mse_loss(prediction, target)

    return loss


@contextmanager
def _checkpointing(backbone, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing of the UNet; it obeys in training mode only, and has no dropout."""
    unet = backbone.denoiser
    if enabled:
        unet.enable_gradient_checkpointing()
        unet.train()
    yield
    if enabled:
        unet.disable_gradient_checkpointing()
        unet.eval()
