"""Train the pocket model from nothing: `python -m tools.pocket.second.build --work DIR`.

Stages: pictures of the world, an AutoencoderKL, latents, then the text encoder and UNet together (v-prediction,
classifier-free guidance).  One process; it may be killed at any time and goes on where its last checkpoint stands.
Every draw of step k comes from a generator seeded by (seed, k).

The denoiser's rate is constant until its last `--decay_steps`, in which it falls to zero.  So a run ends early with a
smaller `--denoiser_steps` and goes on with a larger one; the state from which the decay began stays beside the
checkpoint as `denoiser-stable.safetensors`, to start another decay from.  Every half hour DIR/model gets the running
average of the weights, a Stable Diffusion folder in fp16 that a stock `StableDiffusionPipeline.from_pretrained` loads,
and DIR/samples what it draws.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dti_fast.backbones.clip_vocabulary import write_clip_vocabulary
from tools.pocket.second import captions, world

SEED = 7
CONCEPT = 2  # the unseen creature of the bundled example
SHARD = 2500  # pictures in a file
AUTOENCODER_BATCH = 16
AUTOENCODER_WIDTHS = (16, 32, 64, 96)
AUTOENCODER_RATE = 1e-3
DENOISER_RATE = 6e-4
MUON_RATE = 0.02
BATCH = 64
FACTOR = 8  # pixels per latent, each way
LATENT_CHANNELS = 16
TEXT_LENGTH = 32
TEXT_WIDTH = 128
TEXT_LAYERS = 10
VOCABULARY_NORM = 0.4  # the scale of CLIP's own word embeddings
SAVE_SECONDS = 180
EXPORT_SECONDS = 1800
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SAMPLE_PROMPTS = (
    "a photo of a {}",
    "{}",
    "a {} wearing a crown",
    "{} on the beach",
    "in the snow, a {} with a scarf",
    "a watercolor of {} in the snow",
    "a painting of {} in a forest",
    "a pencil sketch of a {} with sunglasses",
    "a neon sign of a {} in a city at night",
    "pixel art of a {} wearing a santa hat on the moon",
    "a {} holding a sword in the desert",
    "a {} holding a balloon near a volcano",
    "a {} left of a tree",
    "a {} right of a house on the beach",
    "a {} wearing a top hat next to a red spotted round creature",
    "two {} in a forest",
    "three {} under the sea",
)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word and name of the world is one token.

    Merges are appended word by word, each applied to what the merges so far leave of the word.  A
    later merge has a lower priority than all before it, so words that are whole stay whole.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in [*captions.vocabulary(), *captions.names()]:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while pairs := [p for p in pairwise(symbols) if p in merges]:
            first = min(pairs, key=merges.__getitem__)
            merged, i = [], 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == first:
                    merged.append("".join(first))
                    i += 2
                else:
                    merged.append(symbols[i])
                    i += 1
            symbols = merged
        while len(symbols) > 1:
            merges[symbols[0], symbols[1]] = len(merges)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]

    write_clip_vocabulary(folder, list(merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT_LENGTH, pad_token="<|endoftext|>"
    )


class CaptionEncoder:
    """Token ids of captions, as the tokenizer's own but a hundred times as fast: words are looked up."""

    def __init__(self, tokenizer: CLIPTokenizer):
        self.tokenizer, self.words = tokenizer, {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 `[N, TEXT_LENGTH]`: start, tokens, ends."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = []
        for text in texts:
            row = [first]
            for word in text.split():
                if word not in self.words:
                    self.words[word] = self.tokenizer(word, add_special_tokens=False).input_ids
                row += self.words[word]
            row = row[: TEXT_LENGTH - 1]
            rows.append(row + [last] * (TEXT_LENGTH - len(row)))
        return torch.tensor(rows)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A narrow, deep CLIP text encoder; names start near a random projection of what they name."""
    torch.manual_seed(SEED)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    table = encoder.get_input_embeddings().weight
    features = torch.tensor(np.stack([c.features() for c in world.named_creatures()]), dtype=torch.float32)
    projected = (features - features.mean(0)) @ torch.randn(features.shape[1], TEXT_WIDTH)
    with torch.no_grad():
        table.copy_(F.normalize(torch.randn_like(table), dim=-1) * VOCABULARY_NORM)
        rows = tokenizer.convert_tokens_to_ids([name + "</w>" for name in captions.names()])
        mixed = F.normalize(projected, dim=-1) + 0.5 * F.normalize(torch.randn_like(projected), dim=-1)
        table[rows] = F.normalize(mixed, dim=-1) * VOCABULARY_NORM
    return encoder


def build_autoencoder() -> AutoencoderKL:
    torch.manual_seed(SEED)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=AUTOENCODER_WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        scaling_factor=1.0,
    )
    # Start with little posterior noise: at unit noise the decoder learns to ignore the latents.
    torch.nn.init.constant_(model.quant_conv.bias[LATENT_CHANNELS:], -6.0)
    return model


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=world.SIZE // FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=32,
        cross_attention_dim=TEXT_WIDTH,
    )


class Pictures:
    """The training scenes by number: what they hold, how they are said, how they are drawn."""

    def __init__(self):
        self.names, self.creatures = captions.names(), world.named_creatures()

    def scene(self, number: int) -> tuple[world.Scene, str, str, random.Random]:
        """The scene, the names of its creature and of the one that may be beside it, and the generator to draw it."""
        rng = random.Random(number * 1_000_003 + SEED)
        who, other = rng.randrange(world.NUM_NAMES), rng.randrange(world.NUM_NAMES)
        scene = world.draw_scene(self.creatures[who], rng, [self.creatures[other]])
        return scene, self.names[who], self.names[other], rng

    def render(self, first: int, last: int) -> torch.Tensor:
        """uint8 `[last - first, 3, 64, 64]`."""
        pictures = []
        for number in range(first, last):
            scene, _, _, rng = self.scene(number)
            pictures.append(world.render(scene, rng))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def shards(folder: Path, count: int, make) -> dict[str, torch.Tensor]:
    """Tensors of `count` pictures from files of `SHARD` each; `make(first, last)` makes those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, count, SHARD):
        path = folder / f"{first:07d}.safetensors"
        if not path.exists():
            write_tensors(make(first, first + SHARD), path)
            print(f"{folder.name} {first + SHARD}/{count}", flush=True)
        parts.append(load_file(path))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write to a temporary name and rename."""
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, path)


def _age(path: Path) -> float:
    """Seconds since `path` was written; for ever if it is not there."""
    return time.time() - path.stat().st_mtime if path.exists() else math.inf


def _copy(path: Path, to: Path) -> None:
    temporary = to.with_suffix(".tmp")
    shutil.copy(path, temporary)
    os.replace(temporary, to)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal (K. Jordan, "Muon", 2024), for weights of two axes and more.

    A convolution's weight is the matrix `[out, in * height * width]`; `torch.optim.Muon` takes matrices alone.  On the
    autoencoder a given error took less than half the pictures that AdamW needs.
    """

    def __init__(self, parameters, momentum: float = 0.95):
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(average, group["momentum"]).flatten(1))
                stretch = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * stretch)

    @staticmethod
    def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        """About the nearest matrix whose singular values are one: five Newton-Schulz iterations.

        They go on in the Gram matrix of the short side, which for a convolution is small.
        """
        wide = matrix.shape[0] <= matrix.shape[1]
        x = matrix if wide else matrix.T
        x = x / (x.norm() + 1e-7)
        gram = x @ x.T
        product = identity = torch.eye(len(gram))
        for _ in range(5):
            step = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
            product, gram = step @ product, step @ gram @ step
        x = product @ x
        return x if wide else x.T


def optimizers(modules: dict[str, torch.nn.Module], apart: tuple[str, ...], adam_rate: float) -> list:
    """Muon for the matrices and convolutions of `modules`, AdamW for the rest and for those whose name has an `apart`.

    Every group holds its peak rate as `peak`.
    """
    matrices, others = [], []
    for module in modules.values():
        for name, p in module.named_parameters():
            (others if p.ndim < 2 or any(part in name for part in apart) else matrices).append(p)
    return [
        Muon([{"params": matrices, "peak": MUON_RATE}]),
        torch.optim.AdamW([{"params": others, "peak": adam_rate}], lr=0.0, betas=(0.9, 0.99), weight_decay=0.0),
    ]


class Training:
    """A training run's state on disk: modules, their running averages, the optimizers' state, step count."""

    def __init__(self, path: Path, modules: dict[str, torch.nn.Module], optimizers: list, ema_decay: float):
        self.path, self.modules, self.optimizers, self.ema_decay = path, modules, optimizers, ema_decay
        self.parameters = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.averages = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.step = 0
        self.saved_at = time.monotonic()
        if path.exists():
            state = load_file(path)
            self.step = int(state["step"])
            names = {p: name for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.data.copy_(state[f"model.{name}"])
                self.averages[name].copy_(state[f"ema.{name}"])
            for optimizer in optimizers:
                keys = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    optimizer.state[p] = {key: state[f"{key}.{names[p]}"] for key in keys}
            print(f"resuming {path.stem} at step {self.step}", flush=True)
        self.started, self.first = time.monotonic(), self.step

    def save(self) -> None:
        state = {"step": torch.tensor(self.step)}
        for name, p in self.parameters.items():
            state[f"model.{name}"], state[f"ema.{name}"] = p.detach(), self.averages[name]
            for optimizer in self.optimizers:
                state |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
        write_tensors(state, self.path)
        self.saved_at = time.monotonic()

    def copy(self, name: str) -> Path:
        """Where a copy of the checkpoint is kept."""
        return self.path.with_stem(f"{self.path.stem}-{name}")

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One step down `loss`, at the share `rate` of every group's peak."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
        self._after_step()

    @torch.no_grad()
    def _after_step(self) -> None:
        self.step += 1
        decay = min(self.ema_decay, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    @torch.no_grad()
    def averaged(self) -> dict[str, torch.nn.Module]:
        """Copies of the modules with the running averages as weights."""
        copies = {name: copy.deepcopy(module).eval() for name, module in self.modules.items()}
        for prefix, module in copies.items():
            for name, p in module.named_parameters():
                p.copy_(self.averages[f"{prefix}.{name}"]).requires_grad_(False)
        return copies

    def report(self, steps: int, batch: int, text: str) -> None:
        seconds = (time.monotonic() - self.started) / (self.step - self.first)
        print(
            f"{time.strftime('%H:%M:%S')} {self.path.stem} {self.step}/{steps} {text}  {batch / seconds:.1f} img/s  "
            f"{(steps - self.step) * seconds / 3600:.2f} h left",
            flush=True,
        )


def _learning_rate(step: int, steps: int, decay_steps: int) -> float:
    """Share of the peak: linear warm-up over 100 steps, constant, then linear to zero over the last `decay_steps`."""
    return min(1.0, (step + 1) / 100, (steps - step) / decay_steps)


def train_autoencoder(work: Path, pictures: Pictures, count: int, steps: int) -> AutoencoderKL:
    """L1, squared and gradient-difference reconstruction with a faint KL that grows over the first fifth."""
    model = build_autoencoder()  # channels_last is half as fast: group norm's backward pass
    by = optimizers({"vae": model}, ("encoder.conv_in", "decoder.conv_out", "quant_conv"), AUTOENCODER_RATE)
    run = Training(work / "autoencoder.safetensors", {"vae": model}, by, 0.999)
    images = None if run.step >= steps else shards(work / "pictures", count, lambda a, b: {"p": pictures.render(a, b)})
    run.started, errors = time.monotonic(), []
    while run.step < steps:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + run.step)
        index = torch.randint(count, (AUTOENCODER_BATCH,), generator=generator)
        target = images["p"][index].float() / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, log_variance = model.quant_conv(model.encoder(target)).float().chunk(2, 1)
            log_variance = log_variance.clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=generator)
            output = model.decode(mean + noise * (0.5 * log_variance).exp()).sample.float()
        error = output - target
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        faint = 3e-4 * min(1.0, 5 * run.step / steps)
        loss = error.abs().mean() + 2 * error.square().mean() + 0.25 * edges + faint * kl
        run.update(loss, _learning_rate(run.step, steps, steps // 3))
        errors.append(error.detach().square().mean())
        if run.step % 100 == 0:
            psnr = 10 * math.log10(4 / torch.stack(errors).mean().item())
            run.report(steps, AUTOENCODER_BATCH, f"{psnr:.2f} dB  kl {kl.item():.2f}")
            errors.clear()
        if run.step % 2000 == 0 or run.step == steps:
            held_out(work, run.averaged()["vae"], pictures, run.step)
    run.save()
    return run.averaged()["vae"]


@torch.no_grad()
def held_out(work: Path, vae: AutoencoderKL, pictures: Pictures, step: int) -> float:
    """Mean PSNR in dB of 128 pictures that training does not see; a sheet of some of them goes to WORK/samples."""
    pixels = pictures.render(10_000_000, 10_000_128).float() / 127.5 - 1
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(32)]
    decoded = torch.cat(parts).clamp(-1, 1)
    psnr = (10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))).mean().item()
    print(f"autoencoder, held-out pictures after {step} steps: {psnr:.2f} dB", flush=True)
    rows = torch.cat([torch.cat((a, b), 2) for a, b in zip(pixels[:64].split(16), decoded[:64].split(16), strict=True)])
    sheet = rows.reshape(4, 16, 3, -1, world.SIZE).permute(0, 3, 1, 4, 2).reshape(-1, 16 * world.SIZE, 3)
    (work / "samples").mkdir(exist_ok=True)
    Image.fromarray(((sheet + 1) * 127.5).byte().numpy()).save(work / "samples" / f"autoencoder-{step:06d}.png")
    return psnr


@torch.no_grad()
def make_latents(work: Path, vae: AutoencoderKL, pictures: Pictures, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the latents per channel inside `vae`, then encode every picture.

    The scaling goes into `quant_conv` and `post_quant_conv`, since a Stable Diffusion folder knows a
    single scalar only, which stays 1.  Returns means fp16 `[N, C, 8, 8]` and the posterior's mean standard deviation
    `[C, 1, 1]`.
    """
    path = work / "normaliser.safetensors"
    if not path.exists():
        chunks = pictures.render(0, 4096).split(256)
        moments = torch.cat([vae.quant_conv(vae.encoder(chunk.float() / 127.5 - 1)) for chunk in chunks])
        mean, log_variance = moments.chunk(2, 1)
        scale = 1 / mean.std((0, 2, 3))
        deviation = (0.5 * log_variance).exp().mean((0, 2, 3)) * scale
        write_tensors({"shift": mean.mean((0, 2, 3)), "scale": scale, "deviation": deviation}, path)
    normaliser = load_file(path)
    shift, scale = normaliser["shift"], normaliser["scale"]
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:LATENT_CHANNELS] *= scale[:, None, None, None]
    quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - shift) * scale
    quant.bias[LATENT_CHANNELS:] += 2 * scale.log()
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= scale[None, :, None, None]

    def encode(first: int, last: int) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = pictures.render(first, last).split(125)
            means = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean.half() for part in parts]
        return {"mean": torch.cat(means)}

    return shards(work / "latents", count, encode)["mean"], normaliser["deviation"][:, None, None]


def train_denoiser(
    work: Path,
    vae: AutoencoderKL,
    latents: torch.Tensor,
    deviation: torch.Tensor,
    pictures: Pictures,
    tokenizer: CLIPTokenizer,
    steps: int,
    decay_steps: int,
) -> None:
    """Text encoder and UNet together, v-prediction, min-SNR-5 weights, 10 % empty captions, running average.

    A picture is said in other words every time.
    """
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    modules = {"unet": unet, "text": text_encoder}
    by = optimizers(modules, ("embedding.weight", "conv_in", "conv_out"), DENOISER_RATE)
    run = Training(work / "denoiser.safetensors", modules, by, 0.9993)
    encode, scenes = CaptionEncoder(tokenizer), [pictures.scene(number)[:3] for number in range(len(latents))]
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
    losses = []

    def publish() -> None:
        run.save()
        weights = run.averaged()
        export(work / "model", tokenizer, weights["text"], copy.deepcopy(vae), weights["unet"])
        draw_samples(work, run.step)

    while run.step < steps:
        if run.step == steps - decay_steps or (run.step > steps - decay_steps and not run.copy("stable").exists()):
            run.save()
            _copy(run.path, run.copy("stable"))
        generator, rng = torch.Generator().manual_seed(SEED * 1_000_003 + run.step), random.Random(run.step)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        mean = latents[index].float()
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        said = [scenes[i] for i in index.tolist()]
        texts = ["" if rng.random() < 0.1 else captions.caption(scene, rng, *who) for scene, *who in said]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = text_encoder(encode(texts)).last_hidden_state
            prediction = unet(noisy, timesteps, hidden).sample
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / (snr + 1)
        per_sample = (prediction.float() - target).square()
        loss = (weight * per_sample).mean()
        run.update(loss, _learning_rate(run.step, steps, decay_steps))
        losses.append(per_sample.detach().mean())
        if run.step % 100 == 0 or run.step in (20, 50):
            run.report(steps, BATCH, f"loss {torch.stack(losses).mean().item():.4f}")
            losses.clear()
        if run.step % 100 == 0 and _age(work / "model") > EXPORT_SECONDS:
            publish()
    publish()


def export(out: Path, tokenizer, text_encoder, vae, unet) -> None:
    """Write an fp16 Stable Diffusion folder in the classic key layout (`text_model.` prefix); takes the modules."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, DDIMScheduler(**SCHEDULER), None, None, requires_safety_checker=False
    )
    pipeline.to(torch.float16).save_pretrained(temporary)
    weights = temporary / "text_encoder" / "model.safetensors"
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    # transformers takes the dtype from here and diffusers does not: without this a plain load would mix two dtypes.
    settings = temporary / "text_encoder" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer.source_folder / name, temporary / "tokenizer" / name)
    (temporary / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # follows from those two
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


def draw_samples(work: Path, step: int, names: int = 4) -> None:
    """What the exported model draws: a row for each of some names, a column for each prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(work / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for name in captions.names()[:names]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = pipeline(
                [prompt.format(name) for prompt in SAMPLE_PROMPTS],
                num_inference_steps=25,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
        rows.append(np.concatenate(list(drawn), 1))
    (work / "samples").mkdir(exist_ok=True)
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(work / "samples" / f"{step:06d}.png")


def draw_concept(folder: Path, creature: world.Creature, seed: int = 0) -> None:
    """Five photos of a creature in five places: the pictures that a concept is learned from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for i, place in enumerate((None, *world.PLACES[:4])):
        Image.fromarray(world.render(world.Scene(creature, place=place), rng)).save(folder / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, checkpoints and the model")
    parser.add_argument("--autoencoder_pictures", type=int, default=40_000)
    parser.add_argument("--autoencoder_steps", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=90_000, help="how many the denoiser sees")
    parser.add_argument("--denoiser_steps", type=int, default=10_000)
    parser.add_argument("--decay_steps", type=int, default=2500, help="the last steps, in which the rate falls to zero")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pictures = Pictures()
    tokenizer = build_tokenizer(work / "tokenizer")
    tokenizer.source_folder = work / "tokenizer"
    vae = train_autoencoder(work, pictures, arguments.autoencoder_pictures, arguments.autoencoder_steps)
    latents, deviation = make_latents(work, vae, pictures, arguments.pictures)
    train_denoiser(work, vae, latents, deviation, pictures, tokenizer, arguments.denoiser_steps, arguments.decay_steps)
    draw_concept(work / "concept", world.unseen(CONCEPT))


if __name__ == "__main__":
    main()
