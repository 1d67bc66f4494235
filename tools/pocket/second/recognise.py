"""What does a picture of the pocket world show?  A small network that names every part of the scene.

It was trained on renderings alone (`python -m tools.pocket.second.build_recogniser`), never on what a text-to-image
model draws, and it is told nothing about what a picture should show.  Its own errors stand in docs/pocket.md.

Of two creatures it describes the one on the left, with what that one wears and holds; mirror the picture to hear about
the other.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.pocket.second import world
from tools.pocket.second.world import Creature, Scene

WEIGHTS = Path(__file__).parent / "recogniser.safetensors"
CREATURE = "a creature"  # another one beside the first
PARTS = {
    "place": (None, *world.PLACES),
    "accessory": (None, *world.ACCESSORIES),
    "style": world.STYLES,
    "held": (None, *world.HELD),
    "count": (1, 2, 3),  # of the same creature
    "beside": (None, *world.THINGS, CREATURE),
    "side": (None, "left", "right"),  # on which the creature stands of the thing beside it
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


def shown(scene: Scene) -> tuple[dict[str, object], Creature]:
    """The parts of `scene` as they are recognised, and the creature on the left."""
    parts = {field: getattr(scene, field) for field in PARTS}
    if not isinstance(scene.beside, Creature):
        return parts, scene.creature
    parts |= {"beside": CREATURE, "side": None}
    if scene.side == "left":
        return parts, scene.creature
    return parts | {"accessory": None, "held": None}, scene.beside


def labels(scene: Scene) -> list[int]:
    """The classes of all `PARTS`, then of all `FEATURES`."""
    parts, creature = shown(scene)
    return [label(f, parts[f]) for f in PARTS] + [label(f, getattr(creature, f)) for f in FEATURES]


def credit(field: str, value) -> np.ndarray:
    """How right each class of a part or feature is if `value` is the truth, float64 in [0, 1].

    Of hue (a circle) and lightness, a bin counts in full up to half a bin from its centre and not at all from one and
    a half on, so that nothing hangs on which side of a border a colour lies.
    """
    if field not in ("hue", "lightness"):
        return np.eye(len((PARTS | FEATURES)[field]))[label(field, value)]
    away = np.abs(np.array(FEATURES[field]) - value)
    if field == "hue":
        away = np.minimum(away, 1 - away)
    return (1.5 - away * len(away)).clip(0, 1)


class Recogniser(nn.Module):
    """Logits of every part and feature for pictures `[N, 3, 64, 64]` in [-1, 1]."""

    def __init__(self):
        super().__init__()
        widths, strides = (3, 32, 40, 48, 64, 64, 64, 64), (2, 1, 2, 1, 2, 1, 2)
        layers = []
        for (before, after), stride in zip(pairwise(widths), strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.SiLU()]
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
    """What pictures show, uint8 `[N, 64, 64, 3]`: for every part and feature the probabilities of its values."""

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
