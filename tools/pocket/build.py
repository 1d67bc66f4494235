"""Train the pocket model from nothing: `python -m tools.pocket.build --work DIR`.

Four stages, each resumable: pictures of the world, an AutoencoderKL, latents, then the text encoder
and UNet together (v-prediction, classifier-free guidance).  Every draw of step k comes from a
generator seeded by (seed, k).  The result is a Stable Diffusion folder in fp16 that a stock
`StableDiffusionPipeline.from_pretrained` loads.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
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
from dti_fast.pocket import world

SEED = 7
CONCEPT = 2  # the unseen creature of the bundled example
BATCH = 64
TEXT_LENGTH = 32
TEXT_WIDTH = 128
VOCABULARY_NORM = 0.4  # the scale of CLIP's own word embeddings
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word and name of the world is one token.

    Merges are appended word by word, each applied to what the merges so far leave of the word.  A
    later merge has a lower priority than all before it, so words that are whole stay whole.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in [*world.vocabulary(), *world.names()]:
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text encoder; names start near a random projection of what they name."""
    torch.manual_seed(SEED)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
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
        rows = tokenizer.convert_tokens_to_ids([name + "</w>" for name in world.names()])
        mixed = F.normalize(projected, dim=-1) + 0.5 * F.normalize(torch.randn_like(projected), dim=-1)
        table[rows] = F.normalize(mixed, dim=-1) * VOCABULARY_NORM
    return encoder


def build_autoencoder() -> AutoencoderKL:
    torch.manual_seed(SEED)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=16,
        sample_size=world.SIZE,
        scaling_factor=1.0,
    )
    # Start with little posterior noise: at unit noise the decoder learns to ignore the latents.
    torch.nn.init.constant_(model.quant_conv.bias[model.config.latent_channels :], -6.0)
    return model


def build_unet() -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=6,
        out_channels=6,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=32,
        cross_attention_dim=TEXT_WIDTH,
    )


def _render_chunk(arguments: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    first, last = arguments
    names, creatures = world.names(), world.named_creatures()
    pictures, captions = [], []
    for index in range(first, last):
        rng = random.Random(index * 1_000_003 + SEED)
        who = rng.randrange(world.NUM_NAMES)
        scene = world.draw_scene(creatures[who], rng)
        captions.append(world.caption(scene, rng, names[who]))
        pictures.append(world.render(scene, rng))
    return np.stack(pictures), captions


def make_pictures(work: Path, count: int) -> tuple[torch.Tensor, list[str]]:
    """`count` pictures uint8 [N, 3, 32, 32] and their captions, rendered once."""
    pictures_file, captions_file = work / "pictures.safetensors", work / "captions.json"
    if not pictures_file.exists():
        bounds = [*range(0, count, 1000), count]
        with ProcessPoolExecutor() as pool:
            chunks = list(pool.map(_render_chunk, pairwise(bounds)))
        captions_file.write_text(json.dumps([c for _, captions in chunks for c in captions]))
        pictures = torch.from_numpy(np.concatenate([p for p, _ in chunks])).permute(0, 3, 1, 2).contiguous()
        _write({"pictures": pictures}, pictures_file)
    return load_file(pictures_file)["pictures"], json.loads(captions_file.read_text())


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, path)


class Training:
    """A training run's state on disk: modules, their running averages, AdamW state, step count."""

    def __init__(self, path: Path, modules: dict[str, torch.nn.Module], optimizer, ema_decay: float):
        self.path, self.optimizer, self.ema_decay = path, optimizer, ema_decay
        self.parameters = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.averages = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.step = 0
        self.saved_at = time.monotonic()
        if path.exists():
            state = load_file(path)
            self.step = int(state["step"])
            for name, p in self.parameters.items():
                p.data.copy_(state[f"model.{name}"])
                self.averages[name].copy_(state[f"ema.{name}"])
                optimizer.state[p] = {k: state[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            print(f"resuming {path.stem} at step {self.step}", flush=True)

    def save(self) -> None:
        state = {"step": torch.tensor(self.step)}
        for name, p in self.parameters.items():
            state[f"model.{name}"], state[f"ema.{name}"] = p.detach(), self.averages[name]
            for key, value in self.optimizer.state[p].items():
                state[f"adam.{key}.{name}"] = value
        _write(state, self.path)
        self.saved_at = time.monotonic()

    @torch.no_grad()
    def after_step(self) -> None:
        self.step += 1
        decay = min(self.ema_decay, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)
        if time.monotonic() - self.saved_at > 240:
            self.save()

    @torch.no_grad()
    def use_averages(self) -> None:
        for name, p in self.parameters.items():
            p.copy_(self.averages[name])


def _learning_rate(step: int, steps: int, peak: float, constant_share: float = 0.4) -> float:
    """Linear warm-up over 100 steps, constant, then a cosine to 2 % of the peak."""
    progress = max(0.0, step / steps - constant_share) / (1 - constant_share)
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _batch(step: int, count: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    return torch.randint(count, (BATCH,), generator=generator), generator


def train_autoencoder(work: Path, pictures: torch.Tensor, steps: int) -> AutoencoderKL:
    """L1 + gradient-difference reconstruction with a faint KL, then latents scaled to unit variance."""
    model = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    run = Training(work / "autoencoder.safetensors", {"vae": model}, optimizer, 0.998)
    started, first = time.monotonic(), run.step
    while run.step < steps:
        index, generator = _batch(run.step, len(pictures))
        target = (pictures[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(run.step, steps, 1.2e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, log_variance = model.quant_conv(model.encoder(target)).float().chunk(2, 1)
            log_variance = log_variance.clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=generator)
            output = model.decode(mean + noise * (0.5 * log_variance).exp()).sample.float()
        error = output - target
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.25 * edges + 2e-5 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
        if run.step % 20 == 0 and (run.step <= 100 or run.step % 200 == 0):
            psnr = 10 * math.log10(4 / error.square().mean().item())
            rate = (run.step - first) * BATCH / (time.monotonic() - started)
            print(f"autoencoder {run.step}/{steps} {psnr:.2f} dB  kl {kl.item():.2f}  {rate:.0f} img/s", flush=True)
    run.save()
    run.use_averages()
    return model.eval()


@torch.no_grad()
def make_latents(work: Path, vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Normalise the latents per channel inside `vae`, then encode every picture to mean and std.

    The scaling goes into `quant_conv` and `post_quant_conv`, since a Stable Diffusion folder knows a
    single scalar only, which stays 1.  Returns fp16 [N, 12, 8, 8]: mean, standard deviation.
    """
    path = work / "latents.safetensors"
    channels = vae.config.latent_channels
    if not path.exists():
        moments = [vae.quant_conv(vae.encoder(chunk.float() / 127.5 - 1)) for chunk in pictures[:4096].split(256)]
        mean = torch.cat(moments)[:, :channels]
        _write({"shift": mean.mean((0, 2, 3)), "scale": 1 / mean.std((0, 2, 3))}, work / "normaliser.safetensors")
    normaliser = load_file(work / "normaliser.safetensors")
    shift, scale = normaliser["shift"], normaliser["scale"]
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] *= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) * scale
    quant.bias[channels:] += 2 * scale.log()
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight /= scale[None, :, None, None]
    if not path.exists():
        latents = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for chunk in pictures.split(256):
                posterior = vae.encode(chunk.float() / 127.5 - 1).latent_dist
                latents.append(torch.cat((posterior.mean, posterior.std), 1).half())
        _write({"latents": torch.cat(latents)}, path)
    return load_file(path)["latents"]


def train_denoiser(work: Path, latents: torch.Tensor, captions: list[str], tokenizer, steps: int):
    """Text encoder and UNet together, v-prediction, min-SNR-5 weights, 10 % empty captions, EMA."""
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    unet.to(memory_format=torch.channels_last)
    table = text_encoder.get_input_embeddings().weight
    layers = [p for p in text_encoder.parameters() if p is not table]
    peaks = (1.2e-3, 6e-4, 4e-4)
    groups = [{"params": list(unet.parameters())}, {"params": layers}, {"params": [table], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    run = Training(work / "denoiser.safetensors", {"unet": unet, "text": text_encoder}, optimizer, 0.999)
    ids = tokenizer(
        ["", *captions[: len(latents)]],
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
    channels = unet.config.in_channels
    started, first, losses = time.monotonic(), run.step, []
    while run.step < steps:
        index, generator = _batch(run.step, len(latents))
        mean, std = latents[index].float().split(channels, 1)
        clean = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        keep = (torch.rand(BATCH, generator=generator) >= 0.1).long()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = _learning_rate(run.step, steps, peak)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = text_encoder(ids[(index + 1) * keep]).last_hidden_state
            prediction = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, hidden).sample
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / (snr + 1)
        per_sample = (prediction.float() - target).square()
        loss = (weight * per_sample).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
        losses.append(per_sample.detach().mean())
        if run.step % 20 == 0 and (run.step <= 100 or run.step % 200 == 0):
            rate = (run.step - first) * BATCH / (time.monotonic() - started)
            print(
                f"denoiser {run.step}/{steps} loss {torch.stack(losses).mean().item():.4f} {rate:.0f} img/s", flush=True
            )
            losses.clear()
    run.save()
    run.use_averages()
    return text_encoder.eval(), unet.eval()


def export(out: Path, tokenizer, text_encoder, vae, unet) -> None:
    """Write an fp16 Stable Diffusion folder in the classic key layout (`text_model.` prefix)."""
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


def draw_concept(folder: Path, creature: world.Creature, seed: int = 0) -> None:
    """Five photos of a creature in five places: the pictures that a concept is learned from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for i, place in enumerate((None, *world.PLACES[:4])):
        Image.fromarray(world.render(world.Scene(creature, place=place), rng)).save(folder / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and checkpoints")
    parser.add_argument(
        "--out", type=Path, help="folder for the finished model and the example concept (default: WORK)"
    )
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--denoiser_pictures", type=int, default=60_000, help="how many of them the denoiser sees")
    parser.add_argument("--autoencoder_steps", type=int, default=2400)
    parser.add_argument("--denoiser_steps", type=int, default=3600)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    pictures, captions = make_pictures(work, arguments.pictures)
    tokenizer = build_tokenizer(work / "tokenizer")
    tokenizer.source_folder = work / "tokenizer"
    vae = train_autoencoder(work, pictures, arguments.autoencoder_steps)
    latents = make_latents(work, vae, pictures[: arguments.denoiser_pictures])
    text_encoder, unet = train_denoiser(work, latents, captions, tokenizer, arguments.denoiser_steps)
    out = arguments.out or work
    export(out / "model", tokenizer, text_encoder, vae, unet)
    draw_concept(out / "concept", world.unseen(CONCEPT))


if __name__ == "__main__":
    main()
