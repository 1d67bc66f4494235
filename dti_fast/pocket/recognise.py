"""What does a picture of the pocket world show?  A small network that names every part of the scene.

It was trained on renderings alone (`python -m tools.pocket.build_recogniser`), never on what a text-to-image model
draws, and it is told nothing about what a picture should show.  Its own errors stand in docs/pocket.md.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dti_fast.pocket import world
from dti_fast.pocket.world import Creature, Scene

WEIGHTS = Path(__file__).parent / "recogniser.safetensors"
PARTS = {
    "place": (None, *world.PLACES),
    "accessory": (None, *world.ACCESSORIES),
    "style": world.STYLES,
}
FEATURES = {
    "shape": world.SHAPES,
    "pattern": world.PATTERNS,
    "marking": world.MARKINGS,
    "ears": world.EARS,
    "eyes": world.EYES,
    "hue": tuple((i + 0.5) / 12 for i in range(12)),
    "lightness": tuple((i + 0.5) / 4 for i in range(4)),
}


def label(field: str, value) -> int:
    """The class of a scene's part or a creature's feature; hue and lightness fall into 12 and 4 equal bins."""
    if field in ("hue", "lightness"):
        return min(int(value * len(FEATURES[field])), len(FEATURES[field]) - 1)
    return (PARTS | FEATURES)[field].index(value)


def labels(scene: Scene) -> list[int]:
    """The classes of all `PARTS`, then of all `FEATURES`."""
    parts = [label(field, getattr(scene, field)) for field in PARTS]
    return parts + [label(field, getattr(scene.creature, field)) for field in FEATURES]


def credit(field: str, value) -> np.ndarray:
    """How right each class of a part or feature is if `value` is the truth, float64 in [0, 1].

    Hue, which is a circle, and lightness are divided into bins.  A bin counts in full if the true value lies within
    half a bin of its centre, not at all from one and a half bins on, and in part between.  So a colour near the border
    of two bins is right in both.
    """
    if field not in ("hue", "lightness"):
        return np.eye(len((PARTS | FEATURES)[field]))[label(field, value)]
    away = np.abs(np.array(FEATURES[field]) - value)
    if field == "hue":
        away = np.minimum(away, 1 - away)
    return (1.5 - away * len(away)).clip(0, 1)


class Recogniser(nn.Module):
    """Logits of every part and feature for pictures `[N, 3, 32, 32]` in [-1, 1]."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 32, 48, 64, 64, 64)
        layers = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 1 + i % 2, 1), nn.GroupNorm(4, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.SiLU())
        self.heads = nn.Linear(128, sum(self.sizes()))

    @staticmethod
    def sizes() -> list[int]:
        return [len(options) for options in (PARTS | FEATURES).values()]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(self.heads(self.body(pixels)).split(self.sizes(), dim=1))


@cache
def _network() -> Recogniser:
    network = Recogniser()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return network.eval()


class Recognition:
    """What pictures show, uint8 `[N, 32, 32, 3]`: for every part and feature the probabilities of its values."""

    def __init__(self, pictures: np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            logits = _network()(pixels)
        self.probabilities = {
            field: F.softmax(chunk.double(), dim=1).numpy()
            for field, chunk in zip(PARTS | FEATURES, logits, strict=True)
        }

    def shows(self, field: str, value) -> np.ndarray:
        """Whether each picture shows this value of a part or feature, bool `[N]`."""
        return credit(field, value)[self.probabilities[field].argmax(1)] > 0.5

    def agreement(self, creature: Creature) -> np.ndarray:
        """How well the one who is shown fits `creature`: the mean expected credit of its seven features, `[N]`."""
        return np.mean([self.probabilities[f] @ credit(f, getattr(creature, f)) for f in FEATURES], 0)

    def features(self, creature: Creature) -> np.ndarray:
        """The share of `creature`'s seven features that each picture shows, float64 `[N]`."""
        return np.mean([self.shows(field, getattr(creature, field)) for field in FEATURES], 0)

    def creature(self) -> Creature:
        """The creature that all the pictures together show best; hue and lightness at the centre of their bins."""
        return Creature(*(FEATURES[f][self.probabilities[f].mean(0).argmax()] for f in FEATURES))
