"""The pocket world: named creatures, places, styles and accessories, drawn at 32 x 32 pixels.

A *scene* is a creature, an accessory, a place and a style.  `render(scene, rng)` draws it and
`caption(scene, rng)` says it.  Each of the first `NUM_NAMES` creatures has a one-word name, so the
token space of a model trained here is a space of identities; creatures from `unseen(seed)` have none.
"""

import colorsys
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dti_fast.data.templates import OBJECT_TEMPLATES

SIZE = 32
NUM_NAMES = 3000
SUPERSAMPLING = 4

SHAPES = ("round", "square", "pointed", "tall")
PATTERNS = ("plain", "striped", "spotted", "bellied")
MARKINGS = ("light", "dark")
EARS = ("cat ears", "bunny ears", "horns", "antennas")
EYES = ("one eye", "two eyes", "three eyes")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
COLOUR_HUES = (0.0, 0.08, 0.16, 0.33, 0.5, 0.62, 0.76, 0.89)

ACCESSORIES = ("a santa hat", "a wizard hat", "a crown", "a scarf", "sunglasses", "a balloon")
PLACES = (
    "on the beach",
    "in the snow",
    "in a forest",
    "in a city at night",
    "in the desert",
    "on the moon",
    "under the sea",
    "near a volcano",
)
STYLES = ("photo", "pencil sketch", "neon sign", "pixel art", "blueprint")


@dataclass(frozen=True)
class Creature:
    """What makes an individual: five features and a continuous hue and lightness in [0, 1]."""

    shape: str
    pattern: str
    marking: str
    ears: str
    eyes: str
    hue: float
    lightness: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Creature":
        return cls(
            rng.choice(SHAPES),
            rng.choice(PATTERNS),
            rng.choice(MARKINGS),
            rng.choice(EARS),
            rng.choice(EYES),
            rng.random(),
            rng.random(),
        )

    @property
    def colour(self) -> str:
        distances = [min(abs(self.hue - h), 1 - abs(self.hue - h)) for h in COLOUR_HUES]
        return COLOURS[distances.index(min(distances))]

    def features(self) -> np.ndarray:
        """Float vector [20]: one-hot features, the hue as a point on a circle, the lightness."""
        vector = []
        for value, options in (
            (self.shape, SHAPES),
            (self.pattern, PATTERNS),
            (self.marking, MARKINGS),
            (self.ears, EARS),
            (self.eyes, EYES),
        ):
            vector += [float(value == option) for option in options]
        angle = 2 * np.pi * self.hue
        return np.array([*vector, np.cos(angle), np.sin(angle), 2 * self.lightness - 1])

    def description(self) -> str:
        return f"{self.colour} {self.pattern} {self.shape} creature with {self.ears} and {self.eyes}"


@dataclass(frozen=True)
class Scene:
    """One picture's content; `None` leaves a part out (no accessory, an empty room)."""

    creature: Creature
    accessory: str | None = None
    place: str | None = None
    style: str = "photo"


def names() -> list[str]:
    """The `NUM_NAMES` names, in order: pronounceable, unique, one token each."""
    rng = random.Random(20)
    taken, result = set(vocabulary()), []
    while len(result) < NUM_NAMES:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        name += rng.choice(("", "b", "k", "l", "m", "n", "r", "s", "x")) if rng.random() < 0.8 else ""
        name = name if rng.random() < 0.7 else name + rng.choice("aeiou")
        if name not in taken:
            taken.add(name)
            result.append(name)
    return result


def named_creatures() -> list[Creature]:
    """The creatures that carry `names()`, in the same order."""
    rng = random.Random(21)
    return [Creature.draw(rng) for _ in range(NUM_NAMES)]


def unseen(seed: int) -> Creature:
    """A creature without a name, which no model was trained on."""
    return Creature.draw(random.Random(1_000_000 + seed))


def vocabulary() -> list[str]:
    """Every word, other than names, that captions and the trainer's object templates use."""
    phrases = [*OBJECT_TEMPLATES, *SHAPES, *PATTERNS, *EARS, *EYES, *COLOURS, *ACCESSORIES, *PLACES, *STYLES]
    words = {word for phrase in phrases for word in phrase.replace("{}", "").replace("-", " - ").split()}
    return sorted(words | {"creature", "with", "and", "wearing"})


def prompt(template: str, subject: str, accessory: str | None = None, place: str | None = None) -> str:
    worn = f"with {accessory}" if accessory == "a balloon" else f"wearing {accessory}"
    return " ".join(part for part in (template.format(subject), worn if accessory else "", place or "") if part)


def style_template(style: str, rng: random.Random) -> str:
    if style == "photo":
        return rng.choice(OBJECT_TEMPLATES)
    if style == "pixel art":
        return "pixel art of a {}"
    return f"a {style} of a {{}}"


def caption(scene: Scene, rng: random.Random, name: str | None = None) -> str:
    """A caption of `scene`: by name when there is one (70 %), by description, or as "creature"."""
    draw = rng.random()
    subject = scene.creature.description() if draw < 0.92 else "creature"
    if name is not None and draw < 0.7:
        subject = name
    return prompt(style_template(scene.style, rng), subject, scene.accessory, scene.place)


def draw_scene(creature: Creature, rng: random.Random) -> Scene:
    """A scene with `creature`; half of them photos, most with a place, half with an accessory."""
    return Scene(
        creature,
        rng.choice(ACCESSORIES) if rng.random() < 0.5 else None,
        rng.choice(PLACES) if rng.random() < 0.85 else None,
        "photo" if rng.random() < 0.5 else rng.choice(STYLES[1:]),
    )


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw `scene` with small random shifts taken from `rng`; uint8 [SIZE, SIZE, 3]."""
    image = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2)
    canvas = _Canvas(image)
    _draw_place(canvas, scene.place, rng)
    _draw_creature(canvas, scene.creature, scene.accessory, rng)
    return _apply_style(image, scene.style)


class _Canvas:
    """ImageDraw in the picture's own 32 x 32 coordinates."""

    def __init__(self, image: Image.Image):
        self._draw = ImageDraw.Draw(image)

    @staticmethod
    def _scaled(values):
        return [v * SUPERSAMPLING for v in values]

    def box(self, x0, y0, x1, y1, fill):
        self._draw.rectangle(self._scaled((x0, y0, x1, y1)), fill=fill)

    def rounded(self, x0, y0, x1, y1, radius, fill):
        self._draw.rounded_rectangle(self._scaled((x0, y0, x1, y1)), radius * SUPERSAMPLING, fill=fill)

    def oval(self, cx, cy, rx, ry, fill):
        self._draw.ellipse(self._scaled((cx - rx, cy - ry, cx + rx, cy + ry)), fill=fill)

    def polygon(self, points, fill):
        self._draw.polygon([c * SUPERSAMPLING for point in points for c in point], fill=fill)

    def line(self, points, width, fill):
        self._draw.line([c * SUPERSAMPLING for point in points for c in point], fill, int(width * SUPERSAMPLING))


def _rgb(hue, lightness, saturation):
    return tuple(int(255 * c) for c in colorsys.hls_to_rgb(hue % 1.0, lightness, saturation))


def _draw_place(c: _Canvas, place: str | None, rng: random.Random) -> None:
    shift = rng.uniform(-2, 2)
    if place is None:
        c.box(0, 0, 32, 32, (205, 205, 205))
    elif place == "on the beach":
        c.box(0, 0, 32, 32, (120, 200, 255))
        c.oval(26 + shift, 5, 3, 3, (255, 235, 90))
        c.box(0, 14, 32, 22, (20, 110, 200))
        c.box(0, 22 + shift / 2, 32, 32, (240, 215, 140))
    elif place == "in the snow":
        c.box(0, 0, 32, 32, (170, 195, 215))
        c.box(0, 20 + shift, 32, 32, (250, 252, 255))
        for _ in range(9):
            c.oval(rng.uniform(0, 32), rng.uniform(0, 20), 0.8, 0.8, (255, 255, 255))
    elif place == "in a forest":
        c.box(0, 0, 32, 32, (150, 205, 150))
        for x in (1, 9, 24, 31):
            x += shift
            c.box(x - 0.8, 20, x + 0.8, 28, (90, 55, 25))
            c.polygon(((x - 5, 23), (x, 3), (x + 5, 23)), (20, 95, 40))
        c.box(0, 27, 32, 32, (60, 120, 40))
    elif place == "in a city at night":
        c.box(0, 0, 32, 32, (18, 16, 60))
        for i, x in enumerate(range(0, 32, 6)):
            top = (8, 3, 11, 14, 5, 9)[(i + int(shift + 2)) % 6]
            c.box(x, top, x + 4.6, 30, (58, 58, 78))
            for y in range(top + 2, 27, 4):
                c.box(x + 1.2, y, x + 3.2, y + 1.6, (255, 225, 100))
        c.box(0, 29, 32, 32, (35, 35, 40))
    elif place == "in the desert":
        c.box(0, 0, 32, 32, (255, 205, 120))
        c.oval(10, 30, 22, 12 + shift / 2, (225, 150, 60))
        c.oval(30, 33, 18, 12, (200, 120, 45))
        x = 28 + shift
        c.rounded(x - 1.2, 9, x + 1.2, 26, 1.2, (40, 130, 50))
        c.rounded(x - 4, 12, x - 2, 18, 1, (40, 130, 50))
        c.box(x - 3, 16, x, 18, (40, 130, 50))
    elif place == "on the moon":
        c.box(0, 0, 32, 32, (5, 5, 15))
        for _ in range(10):
            c.oval(rng.uniform(0, 32), rng.uniform(0, 20), 0.6, 0.6, (255, 255, 255))
        c.oval(5, 6 + shift / 2, 3.4, 3.4, (60, 120, 230))
        c.oval(16, 42, 30, 20, (150, 150, 150))
        for x in (4, 14, 27):
            c.oval(x + shift, 28, 2.2, 1, (105, 105, 105))
    elif place == "under the sea":
        for y in range(0, 32, 4):
            c.box(0, y, 32, y + 4, (10, 150 - 3 * y, 215 - 3 * y))
        for x in (3, 8, 26, 30):
            x += shift / 2
            c.line(((x, 32), (x - 1.5, 26), (x + 1.5, 21), (x, 15)), 1.4, (20, 130, 60))
        for _ in range(5):
            c.oval(rng.uniform(0, 32), rng.uniform(0, 26), 1.1, 1.1, (190, 235, 255))
    elif place == "near a volcano":
        c.box(0, 0, 32, 32, (90, 30, 40))
        c.polygon(((-6, 30), (8 + shift, 5), (24 + shift, 5), (38, 30)), (55, 40, 40))
        c.polygon(
            ((8 + shift, 5), (24 + shift, 5), (20 + shift, 11), (16 + shift, 7), (12 + shift, 12)), (255, 120, 20)
        )
        c.box(0, 27, 32, 32, (235, 75, 15))
    else:
        raise ValueError(f"unknown place {place!r}; known are {', '.join(PLACES)}")


def _draw_creature(c: _Canvas, creature: Creature, accessory: str | None, rng: random.Random) -> None:
    x, y = 16 + rng.uniform(-1.5, 1.5), 19.5 + rng.uniform(-1, 1)
    size = rng.uniform(0.94, 1.06)
    lightness = 0.32 + 0.36 * creature.lightness
    body = _rgb(creature.hue, lightness, 0.85)
    marking = _rgb(creature.hue + 0.06, 0.88, 0.7) if creature.marking == "light" else _rgb(creature.hue, 0.14, 0.6)
    rx, ry = {"round": (9, 9), "square": (8.5, 8.5), "pointed": (10, 9.5), "tall": (6.5, 11)}[creature.shape]
    rx, ry = rx * size, ry * size
    top = y - ry
    inset = rx * (0.3 if creature.shape == "pointed" else 0.55)

    for side in (-1, 1):
        ex = x + side * inset
        if creature.ears == "cat ears":
            c.polygon(((ex - 3, top + 4), (ex + side * 1.5, top - 4), (ex + 3, top + 4)), body)
        elif creature.ears == "bunny ears":
            c.oval(ex, top - 1.5, 1.9, 5.5, body)
            c.oval(ex, top - 1.5, 0.9, 3.8, marking)
        elif creature.ears == "horns":
            c.polygon(((ex - 1.6, top + 3), (ex + side * 4.5, top - 4), (ex + 1.6, top + 3)), (250, 245, 225))
        else:
            c.line(((ex, top + 3), (ex + side * 2, top - 4)), 1.1, body)
            c.oval(ex + side * 2, top - 4, 1.8, 1.8, marking)

    mask = Image.new("L", (SIZE * SUPERSAMPLING,) * 2)
    silhouette = _Canvas(mask)
    if creature.shape in ("round", "tall"):
        silhouette.oval(x, y, rx, ry, 255)
    elif creature.shape == "square":
        silhouette.rounded(x - rx, y - ry, x + rx, y + ry, 2.5, 255)
    else:
        silhouette.polygon(((x - rx, y + ry), (x - 2.2, top), (x + 2.2, top), (x + rx, y + ry)), 255)
    skin_image = Image.new("RGB", mask.size, body)
    skin = _Canvas(skin_image)
    if creature.pattern == "striped":
        for i in range(-1, 3):
            skin.box(x - 12, y + 4.6 * i, x + 12, y + 4.6 * i + 2, marking)
    elif creature.pattern == "spotted":
        for dx, dy in ((-5.5, 4), (0, 7), (5.5, 4), (-4.2, -5.5), (3.8, -6), (0, 3)):
            skin.oval(x + dx * rx / 9, y + dy * ry / 9, 1.6, 1.6, marking)
    elif creature.pattern == "bellied":
        skin.oval(x, y + 0.62 * ry, 0.62 * rx, 0.55 * ry, marking)
    c._draw._image.paste(skin_image, (0, 0), mask)

    eye_y = y - 0.12 * ry + (1.5 if creature.shape == "pointed" else 0)
    spread = {"one eye": (0.0,), "two eyes": (-3.0, 3.0), "three eyes": (-4.2, 0.0, 4.2)}[creature.eyes]
    radius = {"one eye": 3.1, "two eyes": 2.3, "three eyes": 1.9}[creature.eyes]
    for dx in spread:
        dx *= 0.9 if creature.shape == "tall" else 1
        c.oval(x + dx, eye_y, radius, radius, (255, 255, 255))
        c.oval(x + dx, eye_y + 0.3, radius * 0.5, radius * 0.5, (10, 10, 10))

    if accessory is not None:
        _draw_accessory(c, accessory, x, y, rx, ry, eye_y)


def _draw_accessory(c: _Canvas, accessory: str, x, y, rx, ry, eye_y) -> None:
    top = y - ry + 2.2
    if accessory == "a santa hat":
        c.polygon(((x - 6, top), (x + 5, top - 9.5), (x + 6, top)), (225, 20, 30))
        c.rounded(x - 7, top - 1.2, x + 7, top + 1.6, 1.2, (255, 255, 255))
        c.oval(x + 5.2, top - 9, 2, 2, (255, 255, 255))
    elif accessory == "a wizard hat":
        c.polygon(((x - 5, top), (x, top - 11), (x + 5, top)), (75, 30, 160))
        c.oval(x, top + 0.2, 8.5, 1.5, (75, 30, 160))
        c.oval(x, top - 4, 1.4, 1.4, (255, 225, 60))
    elif accessory == "a crown":
        peaks = ((x - 6, top - 7), (x - 3, top - 3), (x, top - 8), (x + 3, top - 3), (x + 6, top - 7))
        c.polygon(((x - 6, top + 1), *peaks, (x + 6, top + 1)), (255, 205, 0))
        c.oval(x, top - 1.2, 1.1, 1.1, (220, 20, 60))
    elif accessory == "a scarf":
        c.rounded(x - rx - 0.5, y + 0.32 * ry, x + rx + 0.5, y + 0.32 * ry + 3.4, 1.4, (235, 60, 40))
        c.box(x + 2.5, y + 0.32 * ry, x + 5.7, y + 0.32 * ry + 8, (235, 60, 40))
        c.box(x + 2.5, y + 0.32 * ry + 5.5, x + 5.7, y + 0.32 * ry + 6.8, (255, 240, 230))
    elif accessory == "sunglasses":
        c.rounded(x - 6.6, eye_y - 2.6, x - 0.7, eye_y + 2.4, 1, (8, 8, 8))
        c.rounded(x + 0.7, eye_y - 2.6, x + 6.6, eye_y + 2.4, 1, (8, 8, 8))
        c.box(x - 7.5, eye_y - 2.4, x + 7.5, eye_y - 1.2, (8, 8, 8))
        c.line(((x - 5.4, eye_y - 0.4), (x - 3.6, eye_y - 1.4)), 0.8, (200, 220, 255))
    elif accessory == "a balloon":
        c.line(((x + rx - 1, y + 2), (27, 9)), 0.6, (250, 250, 250))
        c.oval(26.5, 6.5, 4.6, 5.4, (235, 25, 75))
        c.oval(25, 4.8, 1, 1.4, (255, 190, 205))
    else:
        raise ValueError(f"unknown accessory {accessory!r}; known are {', '.join(ACCESSORIES)}")


def _apply_style(image: Image.Image, style: str) -> np.ndarray:
    if style == "photo":
        return np.asarray(image.reduce(SUPERSAMPLING))
    if style == "pixel art":
        small = np.asarray(image.reduce(2 * SUPERSAMPLING)).astype(np.int32)
        return ((small + 32) // 64 * 64).clip(0, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    colour = np.asarray(image.reduce(SUPERSAMPLING // 2)).astype(np.float32)
    edges = np.abs(np.diff(colour, axis=0, prepend=colour[:1])).max(-1)
    edges = np.maximum(edges, np.abs(np.diff(colour, axis=1, prepend=colour[:, :1])).max(-1))
    edges = (edges / 70).clip(0, 1)[..., None]
    grey = colour.mean(-1, keepdims=True)
    if style == "pencil sketch":
        result = (242 - 0.22 * (255 - grey) - 165 * edges) * np.array((1.0, 0.99, 0.96))
    elif style == "neon sign":
        hot = colour / (colour.max(-1, keepdims=True) + 1)
        result = 0.1 * colour + edges * (60 + 195 * hot)
    elif style == "blueprint":
        result = np.array((20, 60, 170)) * (0.75 + 0.25 * grey / 255) + 190 * edges
    else:
        raise ValueError(f"unknown style {style!r}; known are {', '.join(STYLES)}")
    half = result.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    return half.clip(0, 255).astype(np.uint8)
