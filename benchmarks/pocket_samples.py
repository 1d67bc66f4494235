"""How good is the pocket model?  Figures and a sheet of samples: `python -m benchmarks.pocket_samples --out docs`.

Prompts name creatures that the model was trained on, in scenes drawn at random; every part of a picture is
then recognised (`dti_fast.pocket.recognise`).  The same is done with true renderings, passed through the
autoencoder, as the ceiling.
"""

import argparse
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from dti_fast.backbones.load import POCKET_FOLDER
from dti_fast.pocket import world
from dti_fast.pocket.recognise import recognise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=POCKET_FOLDER)
    parser.add_argument("--out", type=Path, required=True, help="folder for pocket-samples.png")
    parser.add_argument("--count", type=int, default=96)
    arguments = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    rng = random.Random(4)
    names, creatures = world.names(), world.named_creatures()
    scenes, prompts = [], []
    for i in range(arguments.count):
        who = rng.randrange(world.NUM_NAMES)
        style = "photo" if i % 2 == 0 else rng.choice(world.STYLES[1:])
        scene = world.Scene(creatures[who], rng.choice((None, *world.ACCESSORIES)), rng.choice(world.PLACES), style)
        scenes.append(scene)
        template = "a photo of a {}" if style == "photo" else world.style_template(style, rng)
        prompts.append(world.prompt(template, names[who], scene.accessory, scene.place))
    renders = np.stack([world.render(scene, rng) for scene in scenes])

    generator = torch.Generator().manual_seed(0)
    drawn = []
    for start in range(0, arguments.count, 32):
        output = pipeline(
            prompts[start : start + 32],
            num_inference_steps=25,
            guidance_scale=4.0,
            generator=generator,
            output_type="np",
        )
        drawn.append((output.images * 255).round().astype(np.uint8))
    drawn = np.concatenate(drawn)
    with torch.no_grad():
        pixels = torch.from_numpy(renders).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    print(f"autoencoder: {psnr.mean():.1f} dB on {arguments.count} unseen pictures\n")
    columns = ("place", "style", "accessory", "features", "identity")
    print("| pictures | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for label, pictures in (("renderings, through the autoencoder", decoded), ("drawn by the model", drawn)):
        results = [recognise(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        print(f"| {label} | " + " | ".join(f"{statistics.mean(r[c] for r in results):.0%}" for c in columns) + " |")

    rows = [np.concatenate((renders[i : i + 12], drawn[i : i + 12]), 1) for i in range(0, min(48, arguments.count), 12)]
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    enlarged = Image.fromarray(sheet).resize((sheet.shape[1] * 3, sheet.shape[0] * 3), Image.Resampling.NEAREST)
    enlarged.save(arguments.out / "pocket-samples.png")


if __name__ == "__main__":
    main()
