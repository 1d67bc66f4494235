"""What LoRA and DCO add on unseen pocket creatures: `python -m benchmarks.compare_ancillary`.

Every creature is learned from photos in five places and then drawn in four others, named in the prompt.  Measured are
the denoising loss on true pictures in those places (the same noise for everyone), pocket-bench's similarity and
features of the drawn ones, whether they show the place, and the denoising loss on the pictures of another creature,
called by its description: what the LoRA spoils.
"""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks._harness import provenance
from dti_fast.backbones import Backbone
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.data.draws import Dataset, Draws
from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.data.latents import encode_moments
from dti_fast.loss import diffusion_loss
from dti_fast.pipelines import load_embedding, load_lora, lora_of
from dti_fast.pocket import world
from dti_fast.pocket.bench import HELD_OUT_PLACES, Clauses, Scale, prompt_fidelity
from dti_fast.pocket.recognise import Recognition
from dti_fast.session import Session
from dti_fast.trainer.config import TrainConfig
from tools.pocket.build import draw_concept

VARIANTS = {
    "DTI": {},
    "+ LoRA, 5e-5": {"lora_rank": 4},
    "+ LoRA, 5e-5, DCO 1000": {"lora_rank": 4, "dco_beta": 1000.0},
    "+ LoRA, 1e-3": {"lora_rank": 4, "lora_learning_rate": 1e-3},
    "+ LoRA, 1e-3, DCO 1000": {"lora_rank": 4, "lora_learning_rate": 1e-3, "dco_beta": 1000.0},
}
MEASURES = ("loss", "similarity", "features", "place", "others")
NOISES = 64
STRANGER = world.unseen(99)


def held_out_data(backbone: Backbone, scenes: list[world.Scene], prompts: list[str], folder: Path) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for i, scene in enumerate(scenes):
        Image.fromarray(world.render(scene, rng)).save(folder / f"{i}.png")
    pixels, sizes = load_pictures(find_pictures(folder), world.SIZE)
    return Dataset(*encode_moments(backbone, pixels), sizes, backbone.tokenize(prompts), True)


@torch.no_grad()
def measure(creature: world.Creature, learned: Path, folder: Path) -> dict[str, float]:
    """All `MEASURES` but the last for `creature` in the held-out places, by the concept in the folder `learned`."""
    backbone = load_backbone(Pocket.name, torch.float32, torch.device("cpu"))
    subject = load_embedding(backbone.pipeline, learned)
    load_lora(backbone.pipeline, learned)
    scenes = [world.Scene(creature, place=place) for place in HELD_OUT_PLACES]
    prompts = [world.prompt("a photo of a {}", subject, place=place) for place in HELD_OUT_PLACES]
    data = held_out_data(backbone, scenes, prompts, folder)
    path, losses = backbone.path(), []
    for i in range(len(scenes)):
        noises = torch.randn(2, NOISES, *data.mean.shape[1:], generator=torch.Generator().manual_seed(i))
        which = torch.full((NOISES,), i)
        draws = Draws(which, which, torch.linspace(0, 999, NOISES).long(), *noises)
        losses.append(diffusion_loss(backbone, data, path, draws).item())
    generator = torch.Generator().manual_seed(0)
    drawn = backbone.pipeline(
        prompts * 2, num_inference_steps=25, guidance_scale=4.0, generator=generator, output_type="np"
    ).images
    pictures = (drawn * 255).round().astype(np.uint8)
    clauses = [Clauses(place=place) for place in HELD_OUT_PLACES] * 2
    return {
        "loss": statistics.mean(losses),
        "similarity": Scale(creature, clauses).similarity(pictures),
        "features": float(Recognition(pictures).features(creature).mean()),
        "place": prompt_fidelity(pictures, clauses),
    }


@torch.no_grad()
def loss_of_others(backbone: Backbone, learned: Path, folder: Path) -> float:
    """The denoising loss on a creature that was not learned, under the LoRA that was."""
    scenes = [world.Scene(STRANGER, place=place) for place in HELD_OUT_PLACES]
    prompts = [world.prompt("a photo of a {}", STRANGER.description(), place=place) for place in HELD_OUT_PLACES]
    data = held_out_data(backbone, scenes, prompts, folder)
    which = torch.arange(len(scenes)).repeat_interleave(NOISES)
    noises = torch.randn(2, len(which), *data.mean.shape[1:], generator=torch.Generator().manual_seed(0))
    draws = Draws(which, which, torch.linspace(0, 999, NOISES).long().repeat(len(scenes)), *noises)
    with lora_of(backbone.pipeline, learned):
        return diffusion_loss(backbone, data, backbone.path(), draws).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--creatures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ancillary.json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    session = Session(Pocket.name, device="cpu")
    rows: dict[str, list[dict[str, float]]] = {label: [] for label in VARIANTS}
    for number in range(100, 100 + arguments.creatures):
        creature = world.unseen(number)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw_concept(folder / "pictures", creature)
            for i, (label, settings) in enumerate(VARIANTS.items()):
                out = folder / str(i)
                config = TrainConfig(
                    train_data_dir=folder / "pictures", initializer_token=Pocket.initializer,
                    max_train_steps=arguments.steps, num_validation_images=0, output_dir=out, **settings,
                )  # fmt: skip
                session.learn(config)
                row = measure(creature, out, folder / "held-out")
                row["others"] = loss_of_others(session.backbone, out, folder / "others")
                rows[label].append(row)
                print(number, label, {m: round(row[m], 4) for m in MEASURES}, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = {**provenance(torch.device("cpu")), "steps": arguments.steps, "rows": rows}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")

    print(f"\nMean over {arguments.creatures} creatures, {arguments.steps} steps\n")
    print("| | " + " | ".join(MEASURES) + " |\n|---" + "|---" * len(MEASURES) + "|")
    for label, results in rows.items():
        loss, similarity, *shares, others = (statistics.mean(r[m] for r in results) for m in MEASURES)
        cells = [f"{loss:.4f}", f"{similarity:.3f}", *(f"{s:.0%}" for s in shares), f"{others:.4f}"]
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
