"""The pocket world: named creatures in places, with things, in styles, drawn at 64 x 64 pixels.

A *scene* is one creature, once or several times, what it wears, holds and stands beside, a place and a style.
`render(scene, rng)` draws it; `tools.pocket.second.captions` says it.  Each of the first `NUM_NAMES` creatures has a
one-word name, so the token space of a model trained here is a space of identities; creatures from `unseen(seed)` have
none.
"""

import colorsys
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 64
NUM_NAMES = 3000
SUPERSAMPLING = 3
UNIT = SIZE * SUPERSAMPLING / 32  # scenes are laid out on a square of 32 by 32 units

SHAPES = ("round", "square", "pointed", "tall")
PATTERNS = ("plain", "striped", "spotted", "bellied")
MARKINGS = ("light", "dark")
EARS = ("cat ears", "bunny ears", "horns", "antennas")
EYES = ("one eye", "two eyes", "three eyes")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
COLOUR_HUES = (0.0, 0.08, 0.16, 0.33, 0.5, 0.62, 0.76, 0.89)

ACCESSORIES = ("a santa hat", "a wizard hat", "a top hat", "a crown", "a scarf", "sunglasses")
HELD = ("a balloon", "a sword", "a flower", "a flag")
THINGS = ("a tree", "a ball", "a house", "a mushroom")
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
STYLES = ("photo", "pencil sketch", "watercolor", "painting", "pixel art", "neon sign", "blueprint")

# Pairs that training never shows: what a model draws for them it composes.
UNSEEN_PAIRS = frozenset(
    (
        ("pencil sketch", "on the moon"),
        ("watercolor", "under the sea"),
        ("painting", "near a volcano"),
        ("pixel art", "in the desert"),
        ("neon sign", "in a forest"),
        ("blueprint", "on the beach"),
    )
)


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
    """One picture's content; `None` leaves a part out (nothing worn, an empty room).

    `count` is how often the creature is there.  `beside` is a thing or another creature, of which the first stands on
    the given `side`, "left" or "right"; there is one creature then.
    """

    creature: Creature
    accessory: str | None = None
    place: str | None = None
    style: str = "photo"
    held: str | None = None
    count: int = 1
    beside: "str | Creature | None" = None
    side: str | None = None


def named_creatures() -> list[Creature]:
    """The creatures that carry the names of `captions.names()`, in the same order."""
    rng = random.Random(21)
    return [Creature.draw(rng) for _ in range(NUM_NAMES)]


def unseen(seed: int) -> Creature:
    """A creature without a name, which no model was trained on."""
    return Creature.draw(random.Random(1_000_000 + seed))


def draw_scene(creature: Creature, rng: random.Random, strangers: list[Creature] | None = None) -> Scene:
    """A scene with `creature`, alone (60 %), two or three of it, or beside a thing or one of `strangers`."""
    style = "photo" if rng.random() < 0.45 else rng.choice(STYLES[1:])
    place = rng.choice(PLACES) if rng.random() < 0.8 else None
    while (style, place) in UNSEEN_PAIRS:
        place = rng.choice(PLACES)
    accessory = rng.choice(ACCESSORIES) if rng.random() < 0.45 else None
    held = rng.choice(HELD) if rng.random() < 0.22 else None
    layout, count, beside, side = rng.random(), 1, None, None
    if layout > 0.84:
        count = 2 if layout < 0.94 else 3
        held = None
    elif layout > 0.6:
        stranger = rng.choice(strangers) if strangers else Creature.draw(rng)
        beside = rng.choice(THINGS) if layout < 0.72 else stranger
        side = rng.choice(("left", "right"))
    return Scene(creature, accessory, place, style, held, count, beside, side)


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw `scene` with small random shifts taken from `rng`; uint8 [SIZE, SIZE, 3]."""
    image = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2)
    canvas = _Canvas(image)
    _draw_place(canvas, scene.place, rng)
    ground, worn = 29.6, (scene.accessory, scene.held)
    size = rng.uniform(0.95, 1.05)

    def creature_at(who, x, scale, accessory=None, held=None):
        spot = (x + rng.uniform(-0.8, 0.8), ground + rng.uniform(-0.7, 0.5))
        _draw_creature(canvas.at(*spot, scale * size), who, accessory, held)

    if scene.beside is not None:
        left = scene.side == "left"
        x, other = (9.0, 24.0) if left else (23.0, 8.0)
        if scene.held:
            x, other = x - 1.0, other + (0.8 if left else -1.0)
        if isinstance(scene.beside, Creature):
            creature_at(scene.beside, other, 0.7)
        else:
            _draw_thing(canvas.at(other + rng.uniform(-0.8, 0.8), ground, 1.0), scene.beside)
        creature_at(scene.creature, x, 0.7, *worn)
    elif scene.count == 1:
        creature_at(scene.creature, 14.2 if scene.held else 16.0, 1.0, *worn)
    else:
        places, scale = {2: ((8.3, 23.7), 0.72), 3: ((5.6, 16.0, 26.4), 0.52)}[scene.count]
        for x in places:
            creature_at(scene.creature, x, scale, *worn)
    return _apply_style(image, scene.style, rng)


class _Canvas:
    """ImageDraw in units of the scene, with an origin and a scale."""

    def __init__(self, image: Image.Image, x: float = 0.0, y: float = 0.0, scale: float = 1.0):
        self.image, self._draw = image, ImageDraw.Draw(image)
        self._x, self._y, self._scale = x, y, scale

    def at(self, x: float, y: float, scale: float, image: Image.Image | None = None) -> "_Canvas":
        return _Canvas(image or self.image, self._x + x * self._scale, self._y + y * self._scale, self._scale * scale)

    def _points(self, *points):
        return [((self._x + x * self._scale) * UNIT, (self._y + y * self._scale) * UNIT) for x, y in points]

    def _pen(self, width):
        return max(1, round(width * self._scale * UNIT))

    def _outline(self, line):
        return {} if line is None else {"outline": line, "width": self._pen(max(0.55, 0.4 / self._scale))}

    def box(self, x0, y0, x1, y1, fill, line=None):
        self._draw.rectangle(self._points((x0, y0), (x1, y1)), fill, **self._outline(line))

    def rounded(self, x0, y0, x1, y1, radius, fill, line=None):
        corners = self._points((x0, y0), (x1, y1))
        self._draw.rounded_rectangle(corners, radius * self._scale * UNIT, fill, **self._outline(line))

    def oval(self, cx, cy, rx, ry, fill, line=None):
        self._draw.ellipse(self._points((cx - rx, cy - ry), (cx + rx, cy + ry)), fill, **self._outline(line))

    def polygon(self, points, fill, line=None):
        self._draw.polygon(self._points(*points), fill, **self._outline(line))

    def line(self, points, width, fill):
        self._draw.line(self._points(*points), fill, self._pen(width), joint="curve")

    def arc(self, cx, cy, rx, ry, start, end, width, fill):
        self._draw.arc(self._points((cx - rx, cy - ry), (cx + rx, cy + ry)), start, end, fill, self._pen(width))


def _rgb(hue, lightness, saturation):
    return tuple(int(255 * c) for c in colorsys.hls_to_rgb(hue % 1.0, lightness, saturation))


def _draw_place(c: _Canvas, place: str | None, rng: random.Random) -> None:
    shift = rng.uniform(-2, 2)
    if place is None:
        c.box(0, 0, 32, 32, (208, 208, 208))
        c.box(0, 26, 32, 32, (188, 188, 188))
    elif place == "on the beach":
        c.box(0, 0, 32, 32, (125, 205, 255))
        c.oval(26 + shift, 5, 3, 3, (255, 235, 90))
        c.box(0, 14, 32, 22, (25, 115, 205))
        c.box(0, 22 + shift / 2, 32, 32, (240, 215, 140))
        c.line(((0, 22 + shift / 2), (32, 22 + shift / 2)), 0.7, (245, 250, 255))
    elif place == "in the snow":
        c.box(0, 0, 32, 32, (160, 190, 215))
        c.oval(8 + shift, 30, 16, 11, (225, 235, 245))
        c.oval(26 + shift, 32, 16, 10, (248, 251, 255))
        c.box(0, 27, 32, 32, (250, 252, 255))
        for _ in range(9):
            c.oval(rng.uniform(0, 32), rng.uniform(0, 20), 0.7, 0.7, (255, 255, 255))
    elif place == "in a forest":
        c.box(0, 0, 32, 32, (160, 212, 160))
        for x in (1, 9, 24, 31):
            x += shift
            c.box(x - 0.8, 20, x + 0.8, 28, (90, 55, 25))
            c.polygon(((x - 5, 23), (x, 11), (x + 5, 23)), (18, 88, 40))
            c.polygon(((x - 4, 16), (x, 3), (x + 4, 16)), (28, 105, 50))
        c.box(0, 26, 32, 32, (70, 135, 50))
    elif place == "in a city at night":
        c.box(0, 0, 32, 32, (18, 16, 60))
        for i, x in enumerate(range(0, 32, 6)):
            top = (8, 3, 11, 14, 5, 9)[(i + int(shift + 2)) % 6]
            c.box(x, top, x + 4.6, 30, (58, 58, 82))
            for y in range(top + 2, 26, 4):
                c.box(x + 0.9, y, x + 2.0, y + 1.8, (255, 225, 100))
                c.box(x + 2.8, y, x + 3.9, y + 1.8, (255, 225, 100) if (y + i) % 3 else (90, 90, 110))
        c.box(0, 28, 32, 32, (35, 35, 40))
    elif place == "in the desert":
        c.box(0, 0, 32, 32, (255, 208, 125))
        c.oval(10, 30, 22, 12 + shift / 2, (228, 155, 65))
        c.oval(30, 33, 18, 12, (205, 125, 48))
        x = 28 + shift
        c.rounded(x - 1.2, 9, x + 1.2, 26, 1.2, (40, 130, 50))
        c.rounded(x - 4, 12, x - 2, 18, 1, (40, 130, 50))
        c.box(x - 3, 16, x, 18, (40, 130, 50))
    elif place == "on the moon":
        c.box(0, 0, 32, 32, (6, 6, 18))
        for _ in range(10):
            c.oval(rng.uniform(0, 32), rng.uniform(0, 20), 0.45, 0.45, (255, 255, 255))
        c.oval(5, 6 + shift / 2, 3.6, 3.6, (60, 120, 230))
        c.oval(4.2, 5.4 + shift / 2, 1.5, 1.3, (70, 180, 90))
        c.oval(16, 42, 30, 20, (155, 155, 155))
        for x in (4, 14, 27):
            c.oval(x + shift, 28, 2.4, 1.1, (110, 110, 110))
    elif place == "under the sea":
        for y in range(0, 32, 4):
            c.box(0, y, 32, y + 4, (10, 150 - 3 * y, 215 - 3 * y))
        c.box(0, 28.5, 32, 32, (150, 140, 100))
        for x in (3, 8, 26, 30):
            x += shift / 2
            c.line(((x, 30), (x - 1.5, 26), (x + 1.5, 21), (x, 15)), 1.4, (20, 135, 65))
        for _ in range(5):
            c.oval(rng.uniform(0, 32), rng.uniform(0, 24), 1.1, 1.1, (120, 200, 240), (205, 240, 255))
    elif place == "near a volcano":
        c.box(0, 0, 32, 32, (95, 32, 42))
        c.polygon(((-6, 30), (8 + shift, 6), (24 + shift, 6), (38, 30)), (58, 42, 42))
        lava = ((8, 6), (12, 3.5), (16, 5), (20, 3.5), (24, 6), (20, 12), (16, 8), (12, 14))
        c.polygon([(x + shift, y) for x, y in lava], (255, 120, 20))
        c.box(0, 27.5, 32, 32, (235, 75, 15))
        c.box(0, 27.5, 32, 28.4, (255, 170, 40))
    else:
        raise ValueError(f"unknown place {place!r}; known are {', '.join(PLACES)}")


def _draw_thing(c: _Canvas, thing: str) -> None:
    """`thing` on the ground at the origin, some 13 units wide and up to 20 high."""
    dark = (30, 25, 30)
    if thing == "a tree":
        c.box(-1.3, -8, 1.3, 0, (120, 75, 35), dark)
        c.oval(0, -12.5, 6.2, 6.6, (60, 175, 60), dark)
        for x, y in ((-3, -13), (2.6, -15), (1.5, -10), (-1.5, -16.5)):
            c.oval(x, y, 1.1, 1.1, (225, 35, 40))
    elif thing == "a ball":
        c.oval(0, -4.8, 4.8, 4.8, (245, 245, 245), dark)
        c.oval(0, -4.8, 2.0, 4.6, (225, 45, 50))
        c.box(-4.5, -5.6, 4.5, -4.0, (40, 100, 220))
        c.arc(0, -4.8, 4.8, 4.8, 0, 360, 0.55, dark)
    elif thing == "a house":
        c.box(-5.5, -9, 5.5, 0, (245, 225, 185), dark)
        c.polygon(((-7, -8.5), (0, -15.5), (7, -8.5)), (190, 60, 50), dark)
        c.box(-1.4, -5, 1.4, 0, (115, 70, 40), dark)
        c.box(-4.4, -6.8, -2.2, -4.4, (120, 200, 240), dark)
        c.box(2.2, -6.8, 4.4, -4.4, (120, 200, 240), dark)
    elif thing == "a mushroom":
        c.rounded(-2.2, -6, 2.2, 0, 1.4, (250, 240, 220), dark)
        c._draw.pieslice(c._points((-6.4, -12.5), (6.4, 1.5)), 180, 360, (215, 35, 40), dark, c._pen(0.55))
        for x, y in ((-3.6, -7.4), (0, -10), (3.6, -7.4)):
            c.oval(x, y, 1.2, 1.1, (255, 255, 255))
    else:
        raise ValueError(f"unknown thing {thing!r}; known are {', '.join(THINGS)}")


def _draw_creature(ground: _Canvas, creature: Creature, accessory: str | None, held: str | None) -> None:
    """`creature` standing at the origin of `ground`."""
    lightness = 0.34 + 0.34 * creature.lightness
    body = _rgb(creature.hue, lightness, 0.85)
    line = _rgb(creature.hue, 0.13, 0.6)
    marking = _rgb(creature.hue + 0.06, 0.88, 0.7) if creature.marking == "light" else _rgb(creature.hue, 0.15, 0.6)
    rx, ry = {"round": (8.8, 8.4), "square": (8.2, 8.2), "pointed": (9.6, 9.4), "tall": (6.2, 10.4)}[creature.shape]
    c = ground.at(0, -ry - 0.8, 1.0)
    inset = rx * (0.34 if creature.shape == "pointed" else 0.66)
    top = -ry * (0.62 if creature.shape == "pointed" else 0.74)

    for side in (-1, 1):
        c.oval(side * rx * 0.45, ry, 2.6, 1.5, body, line)
        if not (held and side == 1):
            c.oval(side * rx * 0.96, 0.3 * ry, 1.6, 2.4, body, line)
        x = side * inset
        if creature.ears == "cat ears":
            c.polygon(((x - 2.9, top + 2.4), (x + side * 1.8, top - 5.4), (x + 2.9, top + 2.4)), body, line)
            c.polygon(((x - 1.2, top), (x + side * 1.2, top - 3.2), (x + 1.4, top)), marking)
        elif creature.ears == "bunny ears":
            c.oval(x, top - 3, 2.1, 6, body, line)
            c.oval(x, top - 3, 0.9, 3.8, marking)
        elif creature.ears == "horns":
            tip = (x + side * 4.2, top - 5)
            c.polygon(((x - 2, top + 1.6), (x + side * 3.4, top - 1.6), tip, (x + 2, top + 1.6)), (250, 245, 225), line)
        else:
            c.line(((x, top + 2), (x + side * 1.6, top - 4)), 0.9, line)
            c.oval(x + side * 1.6, top - 4.6, 2, 2, marking, line)

    mask = Image.new("L", c.image.size)
    silhouette = c.at(0, 0, 1.0, mask)
    skin_image = Image.new("RGB", mask.size, body)
    skin = c.at(0, 0, 1.0, skin_image)
    if creature.shape in ("round", "tall"):
        silhouette.oval(0, 0, rx, ry, 255)
    elif creature.shape == "square":
        silhouette.rounded(-rx, -ry, rx, ry, 2.6, 255)
    else:
        peak = ((-rx, ry - 1), (-rx + 0.8, ry), (rx - 0.8, ry), (rx, ry - 1), (2.6, -ry + 0.6), (0, -ry))
        silhouette.polygon((*peak, (-2.6, -ry + 0.6)), 255)
    if creature.pattern == "striped":
        for i in range(-2, 3):
            skin.box(-12, 4.4 * i + 2, 12, 4.4 * i + 3.9, marking)
    elif creature.pattern == "spotted":
        for dx, dy in ((-5.6, 4.2), (-1.8, 7), (5.2, 4.6), (-5.6, -3.6), (5.2, -4.2), (2.2, 6.2), (0, -6.6)):
            skin.oval(dx * rx / 9, dy * ry / 9, 1.5, 1.5, marking)
    elif creature.pattern == "bellied":
        skin.oval(0, 0.68 * ry, 0.62 * rx, 0.5 * ry, marking)
    width = 2 * max(1, round(0.5 * max(0.6, c._scale) * UNIT / 2)) + 1
    ink = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(width)))
    skin_image.paste(line, (0, 0), ink)
    c.image.paste(skin_image, (0, 0), mask)

    eye_y = -0.16 * ry + (1.3 if creature.shape == "pointed" else 0)
    narrow = 0.9 if creature.shape == "tall" else 1.0
    spread = {"one eye": (0.0,), "two eyes": (-2.9, 2.9), "three eyes": (-4.1, 0.0, 4.1)}[creature.eyes]
    radius = {"one eye": 3.2, "two eyes": 2.4, "three eyes": 1.9}[creature.eyes]
    centres = [dx * narrow for dx in spread]
    if accessory == "sunglasses":
        c.line(((-rx * 0.85, eye_y - 0.8), (rx * 0.85, eye_y - 0.8)), 1.0, (8, 8, 8))
    for dx in centres:
        if accessory == "sunglasses":
            c.rounded(dx - radius, eye_y - 1.9, dx + radius, eye_y + 2.1, 1.2, (8, 8, 8))
            c.line(((dx - 0.9, eye_y + 0.7), (dx + 0.5, eye_y - 1.0)), 0.6, (190, 210, 255))
        else:
            c.oval(dx, eye_y, radius, radius, (255, 255, 255), line)
            c.oval(dx, eye_y + 0.3, radius * 0.52, radius * 0.52, (10, 10, 10))
            c.oval(dx + 0.35, eye_y - 0.25, radius * 0.18, radius * 0.18, (255, 255, 255))
    mouth = (250, 250, 250) if creature.pattern == "bellied" and creature.marking == "dark" else (20, 15, 20)
    c.arc(0, eye_y + 2.9, 1.9, 1.5, 20, 160, 0.75, mouth)

    if accessory is not None:
        _draw_accessory(c, accessory, rx, ry)
    if held is not None:
        _draw_held(c, held, rx + 1.8, 0.2 * ry)
        c.oval(rx * 0.98 + 0.6, 0.2 * ry, 2.2, 1.6, body, line)


def _draw_accessory(c: _Canvas, accessory: str, rx: float, ry: float) -> None:
    top, dark = -ry + 1.6, (35, 10, 20)
    if accessory == "a santa hat":
        c.polygon(((-4.6, top), (4.4, top - 7.6), (4.6, top)), (225, 20, 30), dark)
        c.rounded(-5.2, top - 1.1, 5.2, top + 1.3, 1.1, (255, 255, 255))
        c.oval(4.6, top - 7.4, 1.7, 1.7, (255, 255, 255))
    elif accessory == "a wizard hat":
        c.polygon(((-4.2, top), (0, top - 9), (4.2, top)), (75, 30, 170), dark)
        c.oval(0, top + 0.2, 6.6, 1.3, (75, 30, 170), dark)
        c.oval(0, top - 3.2, 1.2, 1.2, (255, 225, 60))
    elif accessory == "a top hat":
        c.box(-3.6, top - 7.2, 3.6, top, (28, 28, 34), (5, 5, 8))
        c.box(-3.6, top - 2.2, 3.6, top - 0.6, (205, 30, 40))
        c.rounded(-6, top - 0.7, 6, top + 0.9, 0.7, (28, 28, 34))
    elif accessory == "a crown":
        peaks = ((-5, top - 5.6), (-2.4, top - 2.6), (0, top - 6.2), (2.4, top - 2.6), (5, top - 5.6))
        c.polygon(((-4.6, top + 0.8), *peaks, (4.6, top + 0.8)), (255, 208, 0), (120, 80, 0))
        c.oval(0, top - 1, 1.1, 1.1, (220, 20, 60))
    elif accessory == "a scarf":
        y = 0.36 * ry
        c.rounded(-rx - 0.4, y, rx + 0.4, y + 3, 1.4, (235, 50, 45), dark)
        c.box(2.4, y + 1, 5.6, y + 7.4, (235, 50, 45), dark)
        c.box(2.9, y + 4.6, 5.1, y + 5.8, (255, 240, 230))
    elif accessory != "sunglasses":
        raise ValueError(f"unknown accessory {accessory!r}; known are {', '.join(ACCESSORIES)}")


def _draw_held(c: _Canvas, held: str, x: float, y: float) -> None:
    dark = (35, 20, 25)
    if held == "a balloon":
        c.line(((x, y), (x + 1, y - 9)), 0.5, (250, 250, 250))
        c.oval(x + 1, y - 12.6, 3.6, 4.3, (235, 25, 75), dark)
        c.oval(x - 0.1, y - 14, 0.8, 1.1, (255, 190, 205))
    elif held == "a sword":
        c.polygon(((x - 0.9, y - 2), (x - 0.9, y - 12), (x, y - 14), (x + 0.9, y - 12), (x + 0.9, y - 2)),
                  (215, 225, 235), dark)  # fmt: skip
        c.box(x - 2.6, y - 2.6, x + 2.6, y - 1.3, (200, 150, 30), dark)
        c.box(x - 0.7, y - 1.3, x + 0.7, y + 2.4, (110, 60, 30))
    elif held == "a flower":
        c.line(((x, y + 2.5), (x, y - 6)), 0.8, (40, 140, 50))
        for dx, dy in ((0, -2.4), (2.3, -0.7), (1.4, 2), (-1.4, 2), (-2.3, -0.7)):
            c.oval(x + dx, y - 8 + dy, 1.6, 1.6, (255, 120, 200))
        c.oval(x, y - 8, 1.3, 1.3, (255, 220, 60))
    elif held == "a flag":
        c.box(x - 0.5, y - 13, x + 0.5, y + 3, (120, 80, 45))
        c.polygon(((x + 0.5, y - 13), (x + 6.5, y - 10.6), (x + 0.5, y - 8)), (40, 90, 225), dark)
    else:
        raise ValueError(f"unknown thing to hold {held!r}; known are {', '.join(HELD)}")


def _cloud(rng: random.Random) -> np.ndarray:
    """Smooth random field [SIZE, SIZE, 1] in [0, 1]."""
    coarse = Image.fromarray(np.frombuffer(rng.randbytes(36), np.uint8).reshape(6, 6))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)[..., None] / 255


def _apply_style(image: Image.Image, style: str, rng: random.Random) -> np.ndarray:
    small = image.reduce(SUPERSAMPLING)
    if style == "photo":
        return np.asarray(small)
    if style == "pixel art":
        blocks = np.asarray(small.reduce(2)).astype(np.int32)
        return ((blocks + 32) // 64 * 64).clip(0, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    if style == "watercolor":
        wash = np.asarray(small.filter(ImageFilter.GaussianBlur(0.6))).astype(np.float32)
        wash = 255 - (255 - wash) * (0.55 + 0.4 * _cloud(rng))
        line = np.arange(SIZE) + 0.5
        edge = np.minimum(np.minimum(line, SIZE - line)[:, None], np.minimum(line, SIZE - line)[None])[..., None]
        paper = ((edge - 2 - 5 * _cloud(rng)) / 2.5).clip(0, 1)
        result = 252 - (252 - wash) * paper
    elif style == "painting":
        result = np.asarray(small.filter(ImageFilter.ModeFilter(3))).astype(np.float32)
        result = result * np.array((0.98, 0.86, 0.66)) + np.array((14, 6, 0))
        result[:4], result[-4:], result[:, :4], result[:, -4:] = ((178, 132, 48),) * 4
        result[:1], result[-1:], result[:, :1], result[:, -1:] = ((110, 74, 20),) * 4
        result[3:4, 3:-3] = result[-4:-3, 3:-3] = result[3:-3, 3:4] = result[3:-3, -4:-3] = (96, 62, 16)
    else:
        colour = np.asarray(image).astype(np.float32)
        edges = np.abs(np.diff(colour, axis=0, prepend=colour[:1])).max(-1)
        edges = np.maximum(edges, np.abs(np.diff(colour, axis=1, prepend=colour[:, :1])).max(-1))
        edges = (edges / 60).clip(0, 1).reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING).mean((1, 3))[..., None]
        edges = (2.0 * edges).clip(0, 1)
        colour = np.asarray(small).astype(np.float32)
        grey = colour.mean(-1, keepdims=True)
        if style == "pencil sketch":
            result = (244 - 0.24 * (255 - grey) - 165 * edges) * np.array((1.0, 0.99, 0.96))
        elif style == "neon sign":
            hot = colour / (colour.max(-1, keepdims=True) + 1)
            result = 0.12 * colour + edges * (50 + 205 * hot)
        elif style == "blueprint":
            result = np.array((20, 60, 170)) * (0.7 + 0.3 * grey / 255) + 190 * edges
        else:
            raise ValueError(f"unknown style {style!r}; known are {', '.join(STYLES)}")
    return result.clip(0, 255).astype(np.uint8)
