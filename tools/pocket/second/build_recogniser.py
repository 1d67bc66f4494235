"""Train the recogniser of the pocket world: `python -m tools.pocket.second.build_recogniser --work DIR --vae FOLDER`.

Pictures are renderings; a part of them went through the model's autoencoder, with some noise on the latents, so that
softness and small flaws are no surprise to it.  Half of all are mirrored.  Some twenty minutes of one core; the
pictures are kept.
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from tools.pocket.second import world
from tools.pocket.second.build import write_tensors
from tools.pocket.second.recognise import WEIGHTS, Recogniser, labels

SEED = 11
BATCH = 128
CHUNK = 2000
DECODED_SHARE = 0.15


def draw_scene(rng: random.Random) -> world.Scene:
    """A scene of which all parts are drawn independently: what is asked for says nothing about the rest."""
    layout, count, beside, side = rng.random(), 1, None, None
    if layout > 0.8:
        count = rng.choice((2, 3))
    elif layout > 0.5:
        beside = rng.choice((*world.THINGS, world.Creature.draw(rng)))
        side = rng.choice(("left", "right"))
    return world.Scene(
        world.Creature.draw(rng),
        rng.choice(world.ACCESSORIES) if rng.random() < 0.75 else None,
        rng.choice((None, *world.PLACES)),
        "photo" if rng.random() < 0.35 else rng.choice(world.STYLES[1:]),
        rng.choice(world.HELD) if rng.random() < 0.4 else None,
        count,
        beside,
        side,
    )


def mirrored(scene: world.Scene) -> world.Scene:
    """What the mirror image of `scene` shows."""
    sides = {None: None, "left": "right", "right": "left"}
    return world.Scene(**(vars(scene) | {"side": sides[scene.side]}))


@torch.no_grad()
def make_pictures(work: Path, vae: AutoencoderKL, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 `[N, 3, 64, 64]`, some of them decoded, and classes int64 `[N, fields]`, from files of `CHUNK`."""
    folder, parts = work / "recogniser-pictures", []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, CHUNK):
        path = folder / f"{first:07d}.safetensors"
        if not path.exists():
            pictures, classes = [], []
            for index in range(first, first + CHUNK):
                rng = random.Random(index * 1_000_003 + SEED)
                scene = draw_scene(rng)
                picture = world.render(scene, rng)
                if rng.random() < 0.5:
                    scene, picture = mirrored(scene), picture[:, ::-1]
                pictures.append(picture)
                classes.append(labels(scene))
            pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
            generator = torch.Generator().manual_seed(SEED + first)
            for part in pixels[: int(DECODED_SHARE * CHUNK)].split(100):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    latents = vae.encode(part / 127.5 - 1).latent_dist.mean
                    strength = 0.3 * torch.rand(len(part), 1, 1, 1, generator=generator)
                    decoded = vae.decode(latents + strength * torch.randn(latents.shape, generator=generator)).sample
                part.copy_(((decoded.float().clamp(-1, 1) + 1) * 127.5).round())
            write_tensors({"pictures": pixels, "classes": torch.tensor(classes)}, path)
            print(f"recogniser pictures {first + CHUNK}/{count}", flush=True)
        parts.append(load_file(path))
    return torch.cat([part["pictures"] for part in parts]), torch.cat([part["classes"] for part in parts])


def train_recogniser(pictures: torch.Tensor, classes: torch.Tensor, epochs: int) -> Recogniser:
    torch.manual_seed(SEED)
    network = Recogniser()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.02)
    steps = epochs * (len(pictures) // BATCH)
    averages = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    started = time.monotonic()
    for step in range(steps):
        if step % (len(pictures) // BATCH) == 0:
            order = torch.randperm(len(pictures))
        index = order[step * BATCH % (len(pictures) - BATCH) :][:BATCH]
        pixels = pictures[index] / 127.5 - 1
        pixels = pixels + 0.1 * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(pixels)
        rate = 3e-3 * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = network(pixels)
        targets = classes[index].unbind(1)
        loss = sum(F.cross_entropy(o.float(), t) for o, t in zip(outputs, targets, strict=True))
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
    parser.add_argument("--vae", type=Path, required=True, help="folder of the model's autoencoder")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    network = train_recogniser(*make_pictures(arguments.work, vae, arguments.pictures), arguments.epochs)
    write_tensors({name: tensor.half() for name, tensor in network.state_dict().items()}, arguments.out)


if __name__ == "__main__":
    main()
