"""How good are the pocket model and its recogniser?  Figures, and a sheet of samples.

`python -m benchmarks.pocket_samples --out docs`.  First the recogniser's own errors, on renderings of scenes drawn at
random, as they are and through the model's autoencoder.  Then the model: creatures that it knows by name, drawn for the
prompts of pocket-bench; and what a newcomer may write, against the same asked for in the benchmark's words.
`--model FOLDER` measures another model than the bundled one.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dti_fast.backbones.load import load_backbone
from tools.pocket.second import captions, world
from tools.pocket.second.bench import NEWCOMERS, PROMPTS, Clauses, PocketBench, Scale, draw, prompt_fidelity
from tools.pocket.second.build_recogniser import draw_scene
from tools.pocket.second.recognise import FEATURES, PARTS, Recognition, shown

GATES = {"place": 0.95, "style": 0.95, "accessory": 0.80, "similarity": 0.60, "decibels": 26.0, "newcomers": 0.90}


@torch.no_grad()
def through_autoencoder(vae, pictures: np.ndarray) -> np.ndarray:
    """What the autoencoder makes of pictures uint8 `[N, 64, 64, 3]`."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(128)]
    return ((torch.cat(decoded) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def recogniser_accuracy(vae, count: int) -> tuple[float, dict[str, dict[str, float]]]:
    """The autoencoder's PSNR in dB, and the share recognised of every part and feature, for renderings and for those
    through the autoencoder.
    """
    rng = random.Random(5)
    scenes = [draw_scene(rng) for _ in range(count)]
    renders = np.stack([world.render(scene, rng) for scene in scenes])
    result = {}
    decoded = through_autoencoder(vae, renders)
    errors = np.square(decoded / 255.0 - renders / 255.0).mean((1, 2, 3))
    for label, pictures in (("renderings", renders), ("through the autoencoder", decoded)):
        seen = Recognition(pictures)
        truths = {f: [shown(s)[0][f] for s in scenes] for f in PARTS}
        truths |= {f: [getattr(shown(s)[1], f) for s in scenes] for f in FEATURES}
        result[label] = {f: np.mean([seen.shows(f, v)[i] for i, v in enumerate(t)]) for f, t in truths.items()}
        styles = np.array(truths["style"])
        photos = styles == "photo"
        result[f"{label}, photos"] = {
            f: np.mean([seen.shows(f, v)[i] for i, v in enumerate(t) if photos[i]]) for f, t in truths.items()
        }
    return float(-10 * np.log10(errors).mean()), result


def newcomers(pipeline, who: int, creature: world.Creature) -> dict[str, dict[str, float]]:
    """Similarity and fidelity of one named creature for newcomers' prompts, by half, and for the canonical ones."""
    name, half = captions.names()[who], len(NEWCOMERS) // 2
    result = {}
    for label, clauses in (("as in captions", NEWCOMERS[:half]), ("as in no caption", NEWCOMERS[half:])):
        plain = [Clauses(**(vars(c) | {"text": None})) for c in clauses]
        scale = Scale(creature, clauses)
        for words, asked in ((label, clauses), (f"{label}, canonical", plain)):
            pictures = draw(pipeline, [c.prompt(name) for c in asked], range(len(asked)))
            result[words] = {
                "similarity": scale.similarity(pictures), "fidelity": prompt_fidelity(pictures, asked),
            }  # fmt: skip
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
    parser.add_argument("--model", default="pocket", help="a model's folder (default: the bundled one)")
    parser.add_argument("--names", type=int, default=10, help="creatures known by name")
    parser.add_argument("--renderings", type=int, default=2000)
    arguments = parser.parse_args()
    pipeline = load_backbone(arguments.model, torch.float32, torch.device("cpu")).pipeline
    decibels, accuracy = recogniser_accuracy(pipeline.vae, arguments.renderings)
    print(f"autoencoder: {decibels:.1f} dB\n")
    print_table("recognised in", accuracy)

    names, creatures, rng = captions.names(), world.named_creatures(), random.Random(4)
    clauses = [c for of_set in PROMPTS.values() for c in of_set]
    rows: dict[str, dict[str, list]] = {}
    wordings: dict[str, dict[str, list]] = {}
    samples = []
    for who in rng.sample(range(world.NUM_NAMES), arguments.names):
        bench = PocketBench(pipeline, creatures[who])
        renders = np.stack([world.render(c.scene(creatures[who]), rng) for c in clauses])
        split = [len(PROMPTS["simple"])]
        by_source = {
            "renderings, through the autoencoder": np.split(through_autoencoder(pipeline.vae, renders), split),
            "drawn by the model": list(bench.pictures(names[who]).values()),
            "drawn for the word creature": list(bench.pictures("creature").values()),
        }
        for label, sets in by_source.items():
            row = rows.setdefault(label, {})
            seen = Recognition(np.concatenate(sets))
            for part in PARTS:
                asked = [(i, getattr(c, part)) for i, c in enumerate(clauses) if getattr(c, part)]
                row.setdefault(part, []).append(np.mean([seen.shows(part, value)[i] for i, value in asked]))
            row.setdefault("features", []).append(seen.features(creatures[who]).mean())
            scores = bench.scores(dict(zip(PROMPTS, sets, strict=True)))
            row.setdefault("similarity", []).append(np.mean([s["similarity"] for s in scores.values()]))
        for words, scores in newcomers(pipeline, who, creatures[who]).items():
            for column, value in scores.items():
                wordings.setdefault(words, {}).setdefault(column, []).append(value)
        samples.append((renders, np.concatenate(by_source["drawn by the model"])))
    means = {label: {column: np.mean(values) for column, values in row.items()} for label, row in rows.items()}
    print_table("pictures", means)
    said = {words: {column: np.mean(values) for column, values in row.items()} for words, row in wordings.items()}
    print_table("newcomers' prompts, worded", said)
    reached = means["drawn by the model"] | {"decibels": decibels}
    reached["newcomers"] = min(
        said[words][column] / said[f"{words}, canonical"][column]
        for words in ("as in captions", "as in no caption")
        for column in ("similarity", "fidelity")
    )
    for column, least in GATES.items():
        value = reached[column]
        print(f"{column}: {value:.3g}, at least {least:.3g} wanted: {'yes' if value >= least else 'NO'}")

    chosen = range(0, len(clauses), max(1, len(clauses) // 16))
    sheet = np.concatenate(
        [np.concatenate([np.concatenate((r[i], d[i])) for i in chosen], 1) for r, d in samples[:4]]
    )  # renderings above, drawn below
    arguments.out.mkdir(parents=True, exist_ok=True)
    enlarged = Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST)
    enlarged.save(arguments.out / "pocket-samples.png")


if __name__ == "__main__":
    main()
