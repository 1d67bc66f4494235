"""pocket-bench: a frozen benchmark of learned concepts on the bundled pocket model.

Eight creatures that no model was trained on are each learned from five pictures, in five places (`varied`) or all in
one (`one-place`), and drawn for prompts of one clause (`simple`) and of several (`complex`).  Places and styles of the
prompts never occur in the training pictures.  Two numbers come out, both from `tools.pocket.second.recognise`:

- prompt fidelity: the share of what is asked for that the pictures show: place, style, what is worn and held, how many
  there are, and on which side of which thing;
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
from dti_fast.tokens import TokenEmbedding
from tools.pocket.second import captions, world
from tools.pocket.second.recognise import Recognition
from tools.pocket.second.world import Creature, Scene

VERSION = 2
CREATURES = tuple(range(200, 208))  # seeds of `world.unseen`
TRAINING_PLACES = world.PLACES[:4]
HELD_OUT_PLACES = world.PLACES[4:]
TRAINING_SETS = ("varied", "one-place")
STEPS = 25
GUIDANCE = 4.0
WORD = "<concept>"
SCORES = {
    "similarity": "0 as renderings of random creatures, 1 as renderings of this one",
    "fidelity": "share of what is asked for that is shown",
    "features": "share of the creature's seven features that are shown",
}
RENDERINGS = 16  # of every scene, for the two ends of the scale


@dataclass(frozen=True)
class Clauses:
    """What a prompt asks for; None leaves a part open.  `text` words it, with `{}` for the subject."""

    place: str | None = None
    accessory: str | None = None
    style: str | None = None
    held: str | None = None
    count: int | None = None
    beside: str | None = None  # a thing, with the side of it on which the creature stands
    side: str | None = None
    text: str | None = None

    def asked(self) -> dict[str, str | int]:
        return {field: value for field, value in vars(self).items() if value is not None and field != "text"}

    def prompt(self, subject: str) -> str:
        """The prompt in `text`'s words or, without, in the canonical ones."""
        if self.text is not None:
            return self.text.format(subject)
        template = captions.style_template(self.style or "photo")
        if self.count:
            template = template.replace("a {}", f"{ {2: 'two', 3: 'three'}[self.count] } {{}}")
        return " ".join(
            part
            for part in (
                captions.prompt(template, subject, self.accessory),
                f"holding {self.held}" if self.held else "",
                f"{self.side} of {self.beside}" if self.beside else "",
                self.place or "",
            )
            if part
        )

    def scene(self, creature: Creature, place: str | None = None) -> Scene:
        """What is asked for, of `creature`; in `place` if that is left open."""
        return Scene(
            creature, self.accessory, self.place or place, self.style or "photo", self.held, self.count or 1,
            self.beside, self.side,
        )  # fmt: skip


def _in_turn(options: Sequence, i: int):
    return options[i % len(options)]


_SIDES = ("left", "right")
PROMPTS: dict[str, tuple[Clauses, ...]] = {
    "simple": (
        *(Clauses(place=place) for place in HELD_OUT_PLACES),
        *(Clauses(accessory=accessory) for accessory in world.ACCESSORIES),
        *(Clauses(style=style) for style in world.STYLES[1:]),
        *(Clauses(held=held) for held in world.HELD),
        *(Clauses(count=count) for count in (2, 3)),
        *(Clauses(beside=thing, side=side) for thing, side in zip(world.THINGS[:2], _SIDES, strict=True)),
    ),
    "complex": (
        *(
            Clauses(place, _in_turn(world.ACCESSORIES, i + j), _in_turn(world.STYLES[1:], 3 * i + j))
            for i, place in enumerate(HELD_OUT_PLACES)
            for j in range(3)
        ),
        *(
            Clauses(place, _in_turn(world.ACCESSORIES, i + 1), held=world.HELD[i])
            for i, place in enumerate(HELD_OUT_PLACES)
        ),
        *(
            Clauses(place, _in_turn(world.ACCESSORIES, i + 3), count=2 + i % 2)
            for i, place in enumerate(HELD_OUT_PLACES)
        ),
        *(
            Clauses(place, _in_turn(world.ACCESSORIES, i + 5), beside=world.THINGS[i], side=_in_turn(_SIDES, i))
            for i, place in enumerate(HELD_OUT_PLACES)
        ),
    ),
}
# What a newcomer may write.  The first half is worded as captions may be, the second as none is.
NEWCOMERS = (
    Clauses(accessory="a crown", text="a {} wearing a crown"),
    Clauses(place="on the beach", text="{} on the beach"),
    Clauses(style="watercolor", place="in the snow", text="a watercolor of {} in the snow"),
    Clauses(style="painting", place="in a forest", text="a painting of {} in a forest"),
    Clauses(place="in the snow", accessory="a scarf", text="in the snow, a {} with a scarf"),
    Clauses(place="on the moon", held="a flag", text="{} holding a flag on the moon"),
    Clauses(style="neon sign", text="{}, neon sign"),
    Clauses(count=2, place="in the desert", text="two {} in the desert"),
    Clauses(beside="a house", side="right", text="the {} to the right of a house"),
    Clauses(style="pixel art", accessory="sunglasses", text="pixel art of {} with sunglasses"),
    Clauses(accessory="a crown", place="in the desert", text="wearing a crown, a {} stands in the desert"),
    Clauses(place="on the moon", text="can you draw {} on the moon?"),
    Clauses(held="a balloon", place="under the sea", text="please show {} with a balloon under the sea!"),
    Clauses(accessory="a wizard hat", place="near a volcano", text="portrait of {}, wizard hat, volcano behind it"),
    Clauses(style="pencil sketch", place="on the beach", text="i made a pencil sketch at the beach of {}"),
    Clauses(place="in the snow", text="winter has come for {}"),
    Clauses(place="in a city at night", accessory="a top hat", text="{} walks through the city at night in a top hat"),
    Clauses(count=3, text="look at these three {}"),
    Clauses(beside="a tree", side="left", text="to the left of a tree there is {}"),
    Clauses(style="painting", held="a flower", text="an old oil painting where {} is holding a flower"),
)


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
    """Pictures uint8 `[N, 64, 64, 3]` of all prompts in one batch, picture i from noise of seed `seeds[i]`.

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
    """The share of all that is asked for that the pictures show."""
    seen = Recognition(pictures)
    return float(np.mean([seen.shows(f, v)[i] for i, c in enumerate(clauses) for f, v in c.asked().items()]))


def _renderings(creatures: Sequence[Creature], clauses: Sequence[Clauses], seed: int) -> np.ndarray:
    """Every creature once in every scene; a place that is left open is drawn at random."""
    rng = random.Random(seed)
    return np.stack(
        [
            world.render(c.scene(creature, rng.choice((None, *world.PLACES))), rng)
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
