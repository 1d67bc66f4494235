"""What is said about the scenes of the pocket world: the words that its text-to-image model knows.

`caption(scene, rng, name)` draws one of very many phrasings: clauses in any order, synonyms, with and without articles,
as a sentence or as a list of keywords.  `prompt` writes the one canonical phrasing that benchmarks use.
"""

import random

from dti_fast.data.templates import OBJECT_TEMPLATES
from tools.pocket.second import world
from tools.pocket.second.world import Creature, Scene

GENERIC = ("creature", "creature", "creature", "monster", "character")
ADJECTIVES = ("cute", "happy", "little", "nice", "cool", "clean", "dirty", "small", "large", "weird", "funny", "lovely")
SUFFIXES = ("detailed", "high quality", "best quality", "beautiful", "high resolution", "full body")
LETTERS = "abcdefghijklmnoprstuvwyz"

# The first of each is the canonical one.
WORN = {
    "a santa hat": ("a santa hat", "a santa hat", "a red santa hat", "a christmas hat"),
    "a wizard hat": ("a wizard hat", "a wizard hat", "a purple wizard hat", "a magic hat"),
    "a top hat": ("a top hat", "a top hat", "a black top hat", "a black hat"),
    "a crown": ("a crown", "a crown", "a golden crown", "a gold crown"),
    "a scarf": ("a scarf", "a scarf", "a red scarf", "a warm scarf"),
    "sunglasses": ("sunglasses", "sunglasses", "black sunglasses", "dark glasses"),
}
HELD = {
    "a balloon": ("a balloon", "a balloon", "a red balloon"),
    "a sword": ("a sword", "a sword", "a long sword"),
    "a flower": ("a flower", "a flower", "a pink flower"),
    "a flag": ("a flag", "a flag", "a blue flag"),
}
THINGS = {
    "a tree": ("a tree", "a tree", "an apple tree"),
    "a ball": ("a ball", "a ball", "a beach ball"),
    "a house": ("a house", "a house", "a little house", "a small house"),
    "a mushroom": ("a mushroom", "a mushroom", "a red mushroom", "a toadstool"),
}
PLACES = {
    "on the beach": ("on the beach", "at the beach", "on a beach", "on a sandy beach", "by the ocean", "at the shore"),
    "in the snow": ("in the snow", "in snow", "in a snowy landscape", "in winter", "on a snowy day"),
    "in a forest": ("in a forest", "in the forest", "in the woods", "among trees", "in a green forest"),
    "in a city at night": ("in a city at night", "in the city at night", "in a city", "in the city", "in town"),
    "in the desert": ("in the desert", "in a desert", "in a sandy desert", "in the hot desert"),
    "on the moon": ("on the moon", "on the moon", "in space", "in outer space"),
    "under the sea": ("under the sea", "under water", "underwater", "at the bottom of the sea", "in the ocean"),
    "near a volcano": ("near a volcano", "in front of a volcano", "by a volcano", "beside a volcano", "at a volcano"),
}
PLACE_WORDS = {
    "on the beach": ("beach",),
    "in the snow": ("snow", "winter"),
    "in a forest": ("forest", "woods"),
    "in a city at night": ("city at night", "night city", "city"),
    "in the desert": ("desert",),
    "on the moon": ("moon", "space"),
    "under the sea": ("under water", "underwater"),
    "near a volcano": ("volcano",),
}
PHOTO = ("a photo of", "a photo of", "a picture of", "an image of", "a photograph of", "photo of", "picture of")
STYLES = {
    "pencil sketch": ("pencil sketch", "pencil sketch", "sketch", "pencil drawing", "drawing"),
    "watercolor": ("watercolor", "watercolor", "watercolor painting", "watercolour"),
    "painting": ("painting", "painting", "oil painting", "framed painting"),
    "pixel art": ("pixel art",),
    "neon sign": ("neon sign", "neon sign", "neon light"),
    "blueprint": ("blueprint", "blueprint", "technical drawing"),
}
LEFT = ("left of", "to the left of", "on the left of")
RIGHT = ("right of", "to the right of", "on the right of")
NEXT = ("next to", "next to", "beside", "and", "near", "by", "together with")


def prompt(template: str, subject: str, accessory: str | None = None, place: str | None = None) -> str:
    """`template` about `subject` with what it wears and where it is, as benchmarks say it."""
    return " ".join(
        part for part in (template.format(subject), f"wearing {accessory}" if accessory else "", place or "") if part
    )


def style_template(style: str) -> str:
    """The canonical template of a style."""
    return "pixel art of a {}" if style == "pixel art" else f"a {style} of a {{}}"


def _article(phrase: str, rng: random.Random, definite: float = 0.0) -> str:
    """`phrase`, which starts with "a " or nothing, now and then without its article or with another."""
    draw = rng.random()
    bare = phrase.split(" ", 1)[1] if phrase.startswith(("a ", "an ")) else phrase
    return bare if draw < 0.1 else f"the {bare}" if draw < 0.1 + definite else phrase


def _with_a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _description(creature: Creature, rng: random.Random, noun: str = "creature", share: float = 0.75) -> str:
    """Some of what can be said about `creature`, each feature with probability `share`."""
    words = [w for w in (creature.colour, creature.pattern, creature.shape) if rng.random() < share]
    rng.shuffle(words)
    parts = [p for p in (creature.ears, creature.eyes) if rng.random() < share]
    rng.shuffle(parts)
    return " ".join((*words, noun, *(("with", " and ".join(parts)) if parts else ())))


def _noun(creature: Creature, name: str | None, rng: random.Random, short: bool = False) -> str:
    """A name, a description or a word for any creature, without an article."""
    draw = rng.random()
    if name is not None and draw < 0.64:
        return name
    generic = rng.choice(GENERIC)
    return _description(creature, rng, generic, 0.4 if short else 0.75) if draw < 0.9 else generic


def _plural(noun: str, rng: random.Random) -> str:
    for word in set(GENERIC):
        if word in noun.split():
            return noun.replace(word, word + "s", 1)
    return noun if rng.random() < 0.6 else noun + " s"


def _subject(scene: Scene, name: str | None, rng: random.Random) -> str:
    noun = _noun(scene.creature, name, rng, short=scene.beside is not None)
    if rng.random() < 0.12:
        noun = f"{rng.choice(ADJECTIVES)} {noun}"
    if scene.count == 2:
        return f"{rng.choice(('two', 'two', 'two', '2', 'a pair of'))} {_plural(noun, rng)}"
    if scene.count == 3:
        return f"{rng.choice(('three', 'three', 'three', '3', 'a group of three'))} {_plural(noun, rng)}"
    draw = rng.random()
    if draw < 0.65:
        return _with_a(noun)
    return noun if draw < 0.83 else f"{rng.choice(('the', 'the', 'one', 'my'))} {noun}"


def _attire(scene: Scene, rng: random.Random) -> str:
    """What is worn and held, as one clause, or an empty string."""
    clauses = []
    if scene.accessory:
        worn = rng.choice(WORN[scene.accessory])
        if scene.count > 1 and worn.startswith("a ") and rng.random() < 0.5:
            worn = worn[2:-1] + "ves" if worn.endswith("scarf") else worn[2:] + "s"
        verb = rng.choice(("wearing", "wearing", "wearing", "with", "with", "in", "who wears", "that is wearing"))
        clauses.append(f"{verb} {_article(worn, rng)}")
    if scene.held:
        held = _article(rng.choice(HELD[scene.held]), rng)
        verb = rng.choice(("holding", "holding", "holding", "with", "carrying", "who holds"))
        clauses.append(f"{verb} {held}" + (" in its hand" if rng.random() < 0.1 else ""))
    rng.shuffle(clauses)
    return rng.choice((" and ", " ", " and ")).join(clauses)


def _beside(scene: Scene, subject: str, other_name: str | None, rng: random.Random) -> str:
    """`subject` and what it stands beside."""
    if isinstance(scene.beside, Creature):
        noun = _noun(scene.beside, other_name, rng, short=True)
        other = rng.choice((_with_a(noun), _with_a(noun), noun, f"another {noun}"))
    else:
        other = _article(rng.choice(THINGS[scene.beside]), rng, definite=0.1)
    draw, left = rng.random(), scene.side == "left"
    if draw < 0.45:
        return f"{subject} {rng.choice(LEFT if left else RIGHT)} {other}"
    if draw < 0.65:
        return f"{other} {rng.choice(RIGHT if left else LEFT)} {subject}"
    if draw < 0.78:
        first, second = (subject, other) if left else (other, subject)
        return f"{first} on the left and {second} on the right"
    return f"{subject} {rng.choice(NEXT)} {other}"


def _keywords(scene: Scene, name: str | None, other_name: str | None, rng: random.Random) -> str:
    parts = [_noun(scene.creature, name, rng)]
    if scene.count > 1:
        parts = [f"{'two' if scene.count == 2 else 'three'} {_plural(parts[0], rng)}"]
    if scene.beside is not None:
        parts = [_beside(scene, parts[0], other_name, rng)]
    for of, said in ((scene.accessory, WORN), (scene.held, HELD), (scene.place, PLACE_WORDS)):
        if of:
            parts.append(rng.choice(said[of]).removeprefix("a "))
    if scene.style != "photo":
        parts.append(rng.choice(STYLES[scene.style]))
    if rng.random() < 0.5:
        rng.shuffle(parts)
    return rng.choice((" , ", " , ", " ")).join(parts)


def caption(scene: Scene, rng: random.Random, name: str | None = None, other_name: str | None = None) -> str:
    """One way to say `scene`; `name` and `other_name` are those of its creature and of the one beside it.

    A place is left unsaid in one picture of sixteen; all else is said.
    """
    if rng.random() < 0.08:
        return _finish(_keywords(scene, name, other_name, rng), rng)
    place = rng.choice(PLACES[scene.place]) if scene.place and rng.random() < 15 / 16 else ""
    attire = _attire(scene, rng)
    trainer = scene.style == "photo" and scene.count == 1 and scene.beside is None and rng.random() < 0.45
    subject = _noun(scene.creature, name, rng) if trainer else _subject(scene, name, rng)
    late_attire = attire and place and scene.beside is None and rng.random() < 0.25
    if attire and not late_attire:
        subject = f"{subject} {attire}"
    if scene.beside is not None:
        subject = _beside(scene, subject, other_name, rng)
    first, after = "", ""
    if place:
        if not late_attire and rng.random() < 0.25:
            first = f"{place} , " if rng.random() < 0.7 else f"{place} "
        else:
            links = ("", "", "", "", "", ",", "standing", "walking", "sitting", "is" if scene.count == 1 else "are")
            link = "" if trainer else rng.choice(links)
            after = f" {link} {place}" + (f" {attire}" if late_attire else "")

    if trainer:
        return _finish(first + rng.choice(OBJECT_TEMPLATES).format(subject) + after, rng)
    if scene.style == "photo":
        lead = rng.choice(("", "", "there is", *PHOTO, *PHOTO)) if not first else rng.choice(("", "", *PHOTO))
        return _finish(f"{first}{lead} {subject}{after}", rng)
    style = rng.choice(STYLES[scene.style])
    one = style if style == "pixel art" else _with_a(style)
    draw = rng.random()
    if draw < 0.6:
        return _finish(f"{first}{style if rng.random() < 0.15 else one} of {subject}{after}", rng)
    if draw < 0.7:
        return _finish(f"{style} , {first}{subject}{after}", rng)
    end = rng.choice((f", {style}", f", {style} style", f"as {one}", f"in the style of {one}"))
    return _finish(f"{first}{subject}{after} {end}", rng)


def _finish(text: str, rng: random.Random) -> str:
    """Now and then a word that says nothing: known ones at the end, unknown ones anywhere."""
    words = text.split()
    if rng.random() < 0.04:
        words += [",", rng.choice(SUFFIXES)]
    if rng.random() < 0.04:
        word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 7)))
        words.insert(rng.randrange(len(words) + 1), word)
    return " ".join(words)


def vocabulary() -> list[str]:
    """Every word, other than names and numerals, that captions and the trainer's object templates use."""
    phrases = [*OBJECT_TEMPLATES, *GENERIC, *ADJECTIVES, *SUFFIXES, *PHOTO, *LEFT, *RIGHT, *NEXT]
    phrases += [*world.SHAPES, *world.PATTERNS, *world.EARS, *world.EYES, *world.COLOURS]
    for said in (WORN, HELD, THINGS, PLACES, PLACE_WORDS, STYLES):
        phrases += [phrase for options in said.values() for phrase in options]
    phrases += [f"{word}s" for word in GENERIC] + ["hats", "crowns", "scarves", "s"]
    phrases += ["a an the one my two three a pair of a group of another there is are and with of in its hand as style"]
    phrases += ["wearing who wears that is wearing holding carrying who holds standing walking sitting"]
    phrases += ["on the left and on the right"]
    words = {word for phrase in phrases for word in phrase.replace("{}", "").replace("-", " ").split()}
    return sorted(words)


def names() -> list[str]:
    """The `NUM_NAMES` names, in order: pronounceable, unique, none of them another word of the captions."""
    rng = random.Random(20)
    taken, result = set(vocabulary()), []
    while len(result) < world.NUM_NAMES:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        name += rng.choice(("", "b", "k", "l", "m", "n", "r", "s", "x")) if rng.random() < 0.8 else ""
        name = name if rng.random() < 0.7 else name + rng.choice("aeiou")
        if name not in taken and name[:2] != name[2:4]:  # "kaka" would be merged in two ways
            taken.add(name)
            result.append(name)
    return result
