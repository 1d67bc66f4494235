"""How good are the pocket model and its recogniser?  Figures, and a sheet of samples.

`python -m benchmarks.pocket_samples --out docs`.  First the recogniser's own errors, on renderings of scenes drawn at
random, as they are and through the model's autoencoder.  Then the model: creatures that it knows by name, drawn for the
prompts of pocket-bench.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket
from dti_fast.pocket import world
from dti_fast.pocket.bench import PROMPTS, PocketBench
from dti_fast.pocket.recognise import FEATURES, PARTS, Recognition
from tools.pocket.build_recogniser import draw_scene

GATES = {"place": 0.95, "style": 0.95, "accessory": 0.80, "similarity": 0.60}


@torch.no_grad()
def through_autoencoder(vae, pictures: np.ndarray) -> np.ndarray:
    """What the autoencoder makes of pictures uint8 `[N, 32, 32, 3]`."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(128)]
    return ((torch.cat(decoded) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def recogniser_accuracy(vae, count: int) -> dict[str, dict[str, float]]:
    """The share recognised of every part and feature, for renderings and for those through the autoencoder."""
    rng = random.Random(5)
    scenes = [draw_scene(rng) for _ in range(count)]
    renders = np.stack([world.render(scene, rng) for scene in scenes])
    result = {}
    decoded = through_autoencoder(vae, renders)
    errors = np.square(decoded / 255.0 - renders / 255.0).mean((1, 2, 3))
    print(f"autoencoder: {-10 * np.log10(errors).mean():.1f} dB\n")
    for label, pictures in (("renderings", renders), ("through the autoencoder", decoded)):
        seen = Recognition(pictures)
        truths = {f: [getattr(s, f) for s in scenes] for f in PARTS}
        truths |= {f: [getattr(s.creature, f) for s in scenes] for f in FEATURES}
        result[label] = {f: np.mean([seen.shows(f, v)[i] for i, v in enumerate(t)]) for f, t in truths.items()}
        styles = np.array(truths["style"])
        photos = styles == "photo"
        result[f"{label}, photos"] = {
            f: np.mean([seen.shows(f, v)[i] for i, v in enumerate(t) if photos[i]]) for f, t in truths.items()
        }
    return result


def print_table(corner: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"| {corner} | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for label, row in rows.items():
        print(f"| {label} | " + " | ".join(f"{row[c]:.0%}" for c in columns) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for pocket-samples.png")
    parser.add_argument("--names", type=int, default=10, help="creatures known by name")
    parser.add_argument("--renderings", type=int, default=2000)
    arguments = parser.parse_args()
    pipeline = load_backbone(Pocket.name, torch.float32, torch.device("cpu")).pipeline
    print_table("recognised in", recogniser_accuracy(pipeline.vae, arguments.renderings))

    names, creatures, rng = world.names(), world.named_creatures(), random.Random(4)
    clauses = [c for of_set in PROMPTS.values() for c in of_set]
    rows: dict[str, dict[str, list]] = {}
    samples = []
    for who in rng.sample(range(world.NUM_NAMES), arguments.names):
        bench = PocketBench(pipeline, creatures[who])
        scenes = [world.Scene(creatures[who], c.accessory, c.place, c.style or "photo") for c in clauses]
        renders = np.stack([world.render(scene, rng) for scene in scenes])
        split = [len(PROMPTS["simple"])]
        by_source = {
            "renderings, through the autoencoder": np.split(through_autoencoder(pipeline.vae, renders), split),
            "drawn by the model": list(bench.pictures(names[who]).values()),
            "drawn for the word creature": list(bench.pictures("creature").values()),
        }
        for label, sets in by_source.items():
            row = rows.setdefault(label, {})
            seen = Recognition(np.concatenate(sets))
            for part in ("place", "style", "accessory"):
                asked = [(i, getattr(c, part)) for i, c in enumerate(clauses) if getattr(c, part)]
                row.setdefault(part, []).append(np.mean([seen.shows(part, value)[i] for i, value in asked]))
            row.setdefault("features", []).append(seen.features(creatures[who]).mean())
            scores = bench.scores(dict(zip(PROMPTS, sets, strict=True)))
            row.setdefault("similarity", []).append(np.mean([s["similarity"] for s in scores.values()]))
        samples.append((renders, np.concatenate(by_source["drawn by the model"])))
    means = {label: {column: np.mean(values) for column, values in row.items()} for label, row in rows.items()}
    print_table("pictures", means)
    for column, least in GATES.items():
        value = means["drawn by the model"][column]
        print(f"{column}: {value:.0%}, at least {least:.0%} wanted: {'yes' if value >= least else 'NO'}")

    chosen = range(0, len(clauses), max(1, len(clauses) // 12))
    sheet = np.concatenate(
        [np.concatenate([np.concatenate((r[i], d[i])) for i in chosen], 1) for r, d in samples[:4]]
    )  # renderings above, drawn below
    arguments.out.mkdir(parents=True, exist_ok=True)
    enlarged = Image.fromarray(sheet).resize((sheet.shape[1] * 3, sheet.shape[0] * 3), Image.Resampling.NEAREST)
    enlarged.save(arguments.out / "pocket-samples.png")


if __name__ == "__main__":
    main()
