"""Train the recogniser of the pocket world: `python -m tools.pocket.build_recogniser --work DIR`, some ten minutes.

Pictures are renderings; a part of them went through the model's autoencoder, with some noise on the latents, so that
softness and small flaws are no surprise to it.
"""

import argparse
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from dti_fast.backbones.pocket import Pocket
from dti_fast.pocket import world
from dti_fast.pocket.recognise import WEIGHTS, Recogniser, labels

SEED = 11
BATCH = 128
DECODED_SHARE = 0.12
MODEL = Pocket.folder


def draw_scene(rng: random.Random) -> world.Scene:
    """A scene of which all parts are drawn independently: what is asked for says nothing about the rest."""
    return world.Scene(
        world.Creature.draw(rng),
        rng.choice(world.ACCESSORIES) if rng.random() < 0.75 else None,
        rng.choice((None, *world.PLACES)),
        "photo" if rng.random() < 0.35 else rng.choice(world.STYLES[1:]),
    )


def _render_chunk(bounds: tuple[int, int]) -> tuple[np.ndarray, list[list[int]]]:
    pictures, classes = [], []
    for index in range(*bounds):
        rng = random.Random(index * 1_000_003 + SEED)
        scene = draw_scene(rng)
        pictures.append(world.render(scene, rng))
        classes.append(labels(scene))
    return np.stack(pictures), classes


@torch.no_grad()
def make_pictures(work: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 `[N, 3, 32, 32]`, the first `DECODED_SHARE` of them decoded, and classes int64 `[N, fields]`."""
    path = work / "recogniser-pictures.safetensors"
    if not path.exists():
        with ProcessPoolExecutor(2) as pool:
            chunks = list(pool.map(_render_chunk, pairwise([*range(0, count, 1000), count])))
        pictures = torch.from_numpy(np.concatenate([p for p, _ in chunks])).permute(0, 3, 1, 2).contiguous()
        classes = torch.tensor([c for _, chunk in chunks for c in chunk])
        vae = AutoencoderKL.from_pretrained(MODEL / "vae")
        generator = torch.Generator().manual_seed(SEED)
        for part in pictures[: int(DECODED_SHARE * count)].split(256):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents = vae.encode(part / 127.5 - 1).latent_dist.mean
                strength = 0.3 * torch.rand(len(part), 1, 1, 1, generator=generator)
                decoded = vae.decode(latents + strength * torch.randn(latents.shape, generator=generator)).sample
            part.copy_(((decoded.float().clamp(-1, 1) + 1) * 127.5).round())
        save_file({"pictures": pictures, "classes": classes}, path)
    stored = load_file(path)
    return stored["pictures"], stored["classes"]


def train_recogniser(pictures: torch.Tensor, classes: torch.Tensor, epochs: int) -> Recogniser:
    torch.manual_seed(SEED)
    network = Recogniser().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.02)
    steps = epochs * (len(pictures) // BATCH)
    averages = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    started = time.monotonic()
    for step in range(steps):
        if step % (len(pictures) // BATCH) == 0:
            order = torch.randperm(len(pictures))
        index = order[step * BATCH % (len(pictures) - BATCH) :][:BATCH]
        pixels = (pictures[index] / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        pixels = pixels + 0.1 * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(pixels)
        rate = 3e-3 * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        targets = classes[index].unbind(1)
        loss = sum(F.cross_entropy(o, t) for o, t in zip(network(pixels), targets, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                averages[name].lerp_(tensor, 1 - min(0.998, step / (step + 10)))
        if step % 100 == 99:
            rate = (step + 1) * BATCH / (time.monotonic() - started)
            print(f"recogniser {step + 1}/{steps} loss {loss.item():.3f} {rate:.0f} img/s", flush=True)
    network.load_state_dict(averages)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    network = train_recogniser(*make_pictures(arguments.work, arguments.pictures), arguments.epochs)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, arguments.out)


if __name__ == "__main__":
    main()
