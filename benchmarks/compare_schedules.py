"""Constant or cosine learning rate?  DTI on unseen pocket creatures: `python -m benchmarks.compare_schedules`.

The measure is the denoising loss on pictures of the same creature in places that training did not show,
named in the prompt, with the same noise for everyone: lower means that the word stands for the creature
and still lets the prompt choose the place.
"""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image

from dti_fast import sphere
from dti_fast.backbones.load import POCKET, load_backbone
from dti_fast.data.draws import Dataset, Draws
from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.formats import load_embedding, read_embeddings
from dti_fast.pocket import world
from dti_fast.pocket.build import draw_concept
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.loop import diffusion_loss, train

HELD_OUT_PLACES = world.PLACES[4:]
NOISES = 64


def held_out_loss(creature: world.Creature, subject: str, embedding: Path | None, folder: Path) -> float:
    """Mean loss for `creature` in the held-out places, called `subject`."""
    backbone = load_backbone(POCKET, torch.float32, torch.device("cpu"))
    if embedding is not None:
        load_embedding(backbone.pipeline, embedding)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for place in HELD_OUT_PLACES:
        Image.fromarray(world.render(world.Scene(creature, place=place), rng)).save(folder / f"{place}.png")
    pictures = find_pictures(folder)
    pixels, sizes = load_pictures(pictures, world.SIZE)
    mean, std = encode_moments(backbone.vae, pixels)
    tokenizer = backbone.tokenizers[0]
    prompts = [world.prompt("a photo of a {}", subject, place=p.path.stem) for p in pictures]
    ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    data = Dataset(mean, std, sizes, [ids], True)
    alphas, kind = backbone.noise_schedule()
    losses = []
    with torch.no_grad():
        for i in range(len(pictures)):
            generator = torch.Generator().manual_seed(i)
            which = torch.full((NOISES,), i)
            noises = torch.randn(2, NOISES, *mean.shape[1:], generator=generator)
            timesteps = torch.linspace(0, 999, NOISES).long()
            draws = Draws(which, which, timesteps, *noises)
            losses.append(diffusion_loss(backbone, data, alphas, kind, draws).item())
    return statistics.mean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--creatures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/schedules.json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for number in range(100, 100 + arguments.creatures):
        creature = world.unseen(number)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw_concept(folder / "pictures", creature)
            row = {"creature": number, "creature (word)": held_out_loss(creature, "creature", None, folder / "held")}
            row["description"] = held_out_loss(creature, creature.description(), None, folder / "held")
            for schedule in ("constant", "cosine"):
                result = train(
                    TrainConfig(
                        pretrained_model_name_or_path=POCKET,
                        train_data_dir=folder / "pictures",
                        initializer_token="creature",
                        lr_scheduler=schedule,
                        max_train_steps=arguments.steps,
                        num_validation_images=0,
                        output_dir=folder / schedule,
                    )
                )
                row[schedule] = held_out_loss(creature, result.placeholder, folder / schedule, folder / "held")
            learned = [read_embeddings(folder / s)[0][0] for s in ("constant", "cosine")]
            unit = [v / v.norm(dim=-1, keepdim=True) for v in learned]
            row["degrees apart"] = sphere.distance(*unit).rad2deg().mean().item()
        rows.append(row)
        print(json.dumps(row), flush=True)
    columns = ["creature (word)", "description", "constant", "cosine"]
    print("| creature | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for row in rows:
        print(f"| {row['creature']} | " + " | ".join(f"{row[c]:.4f}" for c in columns) + " |")
    print("| median | " + " | ".join(f"{statistics.median(r[c] for r in rows):.4f}" for c in columns) + " |")
    better = sum(r["cosine"] < r["constant"] for r in rows)
    print(f"cosine is lower on {better} of {len(rows)}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"steps": arguments.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
