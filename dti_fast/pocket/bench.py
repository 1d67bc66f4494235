"""pocket-bench: a frozen benchmark of learned concepts on the bundled pocket model.

Eight creatures that no model was trained on are each learned from five pictures, in five places (`varied`) or all in
one (`one-place`), and drawn for prompts of one clause (`simple`) and of three (`complex`).  Places and styles of the
prompts never occur in the training pictures.  Two numbers come out, both from `dti_fast.pocket.recognise`:

- prompt fidelity: the share of the clauses asked for, place, accessory and style, that the pictures show;
- subject similarity: how well the pictures agree with the creature, on a scale where renderings of random other
  creatures in the same scenes have 0 and renderings of the creature itself have 1.

What a number depends on is fixed by `VERSION`: creatures, pictures, prompts, seeds, sampler and the recogniser's
weights.  Change any of them only together with it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dti_fast.data.folder import find_pictures, load_pictures
from dti_fast.pipelines import lora_of
from dti_fast.pocket import world
from dti_fast.pocket.recognise import Recognition
from dti_fast.pocket.world import Creature, Scene
from dti_fast.tokens import TokenEmbedding

VERSION = 1
CREATURES = tuple(range(200, 208))  # seeds of `world.unseen`
TRAINING_PLACES = world.PLACES[:4]
HELD_OUT_PLACES = world.PLACES[4:]
TRAINING_SETS = ("varied", "one-place")
STEPS = 25
GUIDANCE = 4.0
WORD = "<concept>"
SCORES = {
    "similarity": "0 as renderings of random creatures, 1 as renderings of this one",
    "fidelity": "share of the clauses asked for that are shown",
    "features": "share of the creature's seven features that are shown",
}
RENDERINGS = 16  # of every scene, for the two ends of the scale


@dataclass(frozen=True)
class Clauses:
    """What a prompt asks for; None leaves a part open."""

    place: str | None = None
    accessory: str | None = None
    style: str | None = None

    def asked(self) -> dict[str, str]:
        return {field: value for field, value in vars(self).items() if value is not None}

    def prompt(self, subject: str) -> str:
        template = world.style_template(self.style, random.Random(0)) if self.style else "a photo of a {}"
        return world.prompt(template, subject, self.accessory, self.place)


PROMPTS: dict[str, tuple[Clauses, ...]] = {
    "simple": (
        *(Clauses(place=place) for place in HELD_OUT_PLACES),
        *(Clauses(accessory=accessory) for accessory in world.ACCESSORIES),
        *(Clauses(style=style) for style in world.STYLES[1:]),
    ),
    "complex": tuple(
        Clauses(place, world.ACCESSORIES[(4 * i + j) % len(world.ACCESSORIES)], style)
        for i, place in enumerate(HELD_OUT_PLACES)
        for j, style in enumerate(world.STYLES[1:])
    ),
}


def write_training_set(folder: Path, number: int, name: str) -> Path:
    """Five photos of creature `number`, in five places or, for `one-place`, all in one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{number} {name}")
    places = (None, *TRAINING_PLACES) if name == "varied" else (TRAINING_PLACES[number % len(TRAINING_PLACES)],) * 5
    for i, place in enumerate(places):
        Image.fromarray(world.render(Scene(world.unseen(number), place=place), rng)).save(folder / f"{i}.png")
    return folder


@torch.no_grad()
def draw(
    pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    vectors: Tensor | None = None,
    word: str = WORD,
    guidance: float = GUIDANCE,
) -> np.ndarray:
    """Pictures uint8 `[N, 32, 32, 3]` of all prompts in one batch, picture i from noise of seed `seeds[i]`.

    `vectors` `[K, D]` are what `word` stands for in the prompts; None for prompts in the model's own words.  The
    UNet's products are taken in bfloat16, which changes a picture by less than half a level of 255.
    """
    embedding = None
    if vectors is not None:
        embedding = TokenEmbedding.install(
            pipeline.text_encoder, pipeline.tokenizer, word, init=vectors, magnitude="class"
        )
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pictures = pipeline(
                [embedding.expand(p) if embedding else p for p in prompts],
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
    finally:
        if embedding:
            embedding.uninstall()
    return (pictures * 255).round().astype(np.uint8)


def prompt_fidelity(pictures: np.ndarray, clauses: Sequence[Clauses]) -> float:
    """The share of all clauses asked for that the pictures show."""
    seen = Recognition(pictures)
    return float(np.mean([seen.shows(f, v)[i] for i, c in enumerate(clauses) for f, v in c.asked().items()]))


def _renderings(creatures: Sequence[Creature], clauses: Sequence[Clauses], seed: int) -> np.ndarray:
    """Every creature once in every scene; a place that is left open is drawn at random."""
    rng = random.Random(seed)
    return np.stack(
        [
            world.render(
                Scene(creature, c.accessory, c.place or rng.choice((None, *world.PLACES)), c.style or "photo"), rng
            )
            for creature in creatures
            for c in clauses
        ]
    )


class Scale:
    """Subject similarity to one creature, in the scenes of one prompt set."""

    def __init__(self, creature: Creature, clauses: Sequence[Clauses]):
        self.creature = creature
        rng = random.Random(1)
        strangers = [Creature.draw(rng) for _ in range(RENDERINGS)]
        self.random = Recognition(_renderings(strangers, clauses, 2)).agreement(creature).mean()
        self.true = Recognition(_renderings([creature] * RENDERINGS, clauses, 3)).agreement(creature).mean()

    def similarity(self, pictures: np.ndarray) -> float:
        """Of one picture for each prompt of the set, in its order, or of several whole sets: 0 random, 1 true."""
        agreement = Recognition(pictures).agreement(self.creature).mean()
        return float((agreement - self.random) / (self.true - self.random))


class PocketBench:
    """The benchmark of one creature, for any number of words that are said to mean it."""

    def __init__(self, pipeline, creature: Creature):
        self.pipeline = pipeline
        self.scales = {name: Scale(creature, clauses) for name, clauses in PROMPTS.items()}

    def pictures(self, word: str, vectors: Tensor | None = None, guidance: float = GUIDANCE) -> dict[str, np.ndarray]:
        """By prompt set one picture for each prompt, all drawn in one batch, by default at the benchmark's guidance."""
        prompts = [c.prompt(word) for clauses in PROMPTS.values() for c in clauses]
        drawn = draw(self.pipeline, prompts, range(len(prompts)), vectors, word, guidance)
        ends = np.cumsum([len(clauses) for clauses in PROMPTS.values()])[:-1]
        return dict(zip(PROMPTS, np.split(drawn, ends), strict=True))

    def scores(self, pictures: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """By prompt set: subject similarity, prompt fidelity, and the share of the creature's features shown."""
        return {
            name: {
                "similarity": self.scales[name].similarity(drawn),
                "fidelity": prompt_fidelity(drawn, PROMPTS[name]),
                "features": float(Recognition(drawn).features(self.scales[name].creature).mean()),
            }
            for name, drawn in pictures.items()
        }


def measure(pipeline, pictures: Path, folder: Path, vectors: Tensor) -> tuple[dict, dict[str, list[Image.Image]]]:
    """Scores and pictures of a concept by prompt set.

    Which creature it means is recognised in its training pictures.

    Args:
        pictures: the folder of these.
        folder: where the concept lies, with its LoRA if it has one.
        vectors: `[K, D]`.
    """
    pixels, _ = load_pictures(find_pictures(pictures), world.SIZE)
    shown = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    bench = PocketBench(pipeline, Recognition(shown).creature())
    with lora_of(pipeline, folder):
        drawn = bench.pictures(WORD, vectors)
    return bench.scores(drawn), {name: [Image.fromarray(p) for p in of_set] for name, of_set in drawn.items()}
