"""What does a picture of the pocket world show?  Recognition by drawing every answer and comparing.

No trained recogniser: a candidate scene is rendered several times with different small shifts, and its
distance from the picture is that of the closest rendering.  Candidates that differ in one respect are
rendered with the same shifts, so that only that respect decides.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dti_fast.pocket import world
from dti_fast.pocket.world import Creature, Scene

RENDERINGS = 8
FEATURES = {
    "shape": world.SHAPES,
    "pattern": world.PATTERNS,
    "marking": world.MARKINGS,
    "ears": world.EARS,
    "eyes": world.EYES,
    "hue": tuple(i / 12 for i in range(12)),
}


def _smooth(picture: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 pixels, float64 in [0, 1], `[H, W, 3]`."""
    padded = np.pad(picture / 255.0, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = picture.shape[:2]
    return sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9


def distance(picture: np.ndarray, scene: Scene) -> float:
    """Mean squared difference between a uint8 `[32, 32, 3]` picture and the closest rendering of `scene`."""
    smooth = _smooth(picture)
    rng = random.Random(0)
    return min(float(np.square(smooth - _smooth(world.render(scene, rng))).mean()) for _ in range(RENDERINGS))


def _is_closest(picture: np.ndarray, truth: Scene, others: Sequence[Scene]) -> bool:
    limit = distance(picture, truth)
    return all(distance(picture, other) > limit for other in others)


def recognise(picture: np.ndarray, scene: Scene) -> dict[str, bool | float]:
    """Whether each part of `scene` is what the picture shows.

    Returns:
        place, accessory, style: whether no other one fits better, the rest of the scene being known.
        identity: the share of 30 random creatures that fit worse than the scene's own.
        features: the share of the creature's shape, pattern, marking, ears, eyes and hue (of twelve) for which no
            other value fits better.
    """
    creature = scene.creature

    def others(field: str, options: Sequence) -> list[Scene]:
        return [replace(scene, **{field: option}) for option in options if option != getattr(scene, field)]

    rng = random.Random(1)
    strangers = [Creature.draw(rng) for _ in range(30)]
    own = distance(picture, scene)
    right = 0
    for name, options in FEATURES.items():
        value = getattr(creature, name)
        if name == "hue":
            variants = [replace(creature, hue=(value + step) % 1.0) for step in options[1:]]
        else:
            variants = [replace(creature, **{name: option}) for option in options if option != value]
        right += _is_closest(picture, scene, [replace(scene, creature=c) for c in variants])
    return {
        "place": _is_closest(picture, scene, others("place", (None, *world.PLACES))),
        "accessory": _is_closest(picture, scene, others("accessory", (None, *world.ACCESSORIES))),
        "style": _is_closest(picture, scene, others("style", world.STYLES)),
        "identity": sum(distance(picture, replace(scene, creature=c)) > own for c in strangers) / len(strangers),
        "features": right / len(FEATURES),
    }
