"""The demo's world: scenes of one to four emoji on white, the captions that ask for them, and which are
right.

    "a red car"   "three stars"   "a cat and a blue tree"   "a dog left of a house"   "two cats and a boat"

A scene answers a caption when it shows exactly the things asked for, in their colours, and standing as
asked. What it shows otherwise is counted in errors: a thing missing or too many 1, a wrong colour 0.5, a
wrong relation 1. Everything is a pure function of a seed and a number.

A tenth of the combinations (a thing several times, in a colour, beside another thing) is held out: no model
that draws or scores sees a scene or a caption with one of them in training, and half of the benchmark's
captions have one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from drm.text_files import read_text

SIZE = 128
COLOURS = ("red", "green", "blue", "yellow")  # and "", a thing's own colours
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
# share of the kinds: one thing, several alike, two, two that stand in a relation, several and one
KINDS = ("one", "several", "two", "relation", "groups")
TRAINED, ASKED = (0.18, 0.30, 0.17, 0.25, 0.10), (0.02, 0.38, 0.18, 0.25, 0.17)
COLOURED = 0.45
# pixels of a thing when there are one, two, three, four of them
PIXELS = ((66, 104), (46, 62), (40, 54), (38, 50))
SMALL_PIXELS = (46, 62)  # of the one thing of a picture of 64 x 64
TRIES = 16
ALONG_OVER_ACROSS = 1.6
MISSING, EXTRA, WRONG_COLOUR, WRONG_RELATION = 1.0, 1.0, 0.5, 1.0
HELD_OUT_OF = 10


@dataclasses.dataclass(frozen=True)
class Thing:
    """One row of things.txt."""

    icon: str
    word: str
    plural: str
    colours: tuple[str, ...]  # what can be asked for: "" and the colours it does not have by nature


@functools.cache
def things() -> tuple[Thing, ...]:
    """The rows of things.txt; a thing's number is its place here."""
    rows = []
    for line in read_text(Path(__file__).parent / "things.txt").splitlines():
        if not line or line.startswith("#"):
            continue
        icon, word, *rest = (part.strip() for part in line.split(";"))
        own = [part.removeprefix("is ").split() for part in rest if part.startswith("is ")]
        plural = [part for part in rest if not part.startswith("is ")]
        colours = ("", *(c for c in COLOURS if c not in itertools.chain(*own)))
        rows.append(Thing(icon, word, plural[0] if plural else f"{word}s", colours))
    return tuple(rows)


@dataclasses.dataclass(frozen=True, order=True)
class Group:
    """So many of a thing, all in one colour ("" is its own)."""

    count: int
    thing: int
    colour: str = ""

    def __str__(self) -> str:
        thing = things()[self.thing]
        words = f"{self.colour} {thing.word if self.count == 1 else thing.plural}".strip()
        article = "an" if self.count == 1 and words[0] in "aeiou" else NUMBERS[self.count - 1]
        return f"{article} {words}"


@dataclasses.dataclass(frozen=True)
class Caption:
    """What is asked for: one or two groups, and how the first stands to the second ("" is anyhow)."""

    groups: tuple[Group, ...]
    relation: str = ""

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(map(str, self.groups))

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups)

    def wanted(self) -> list[tuple[int, str]]:
        """(thing, colour) of every single thing."""
        return [(g.thing, g.colour) for g in self.groups for _ in range(g.count)]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A thing in a picture: which, in what colour, and its centre in pixels."""

    thing: int
    colour: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Placed(Seen):
    """The same as it is drawn, in a square of so many pixels."""

    pixels: int


@functools.cache
def parse(text: str) -> Caption:
    """The caption of a text as people write it; ValueError for one that is not of this world."""
    words = f" {' '.join(text.lower().split())} "
    for relation in (*RELATIONS, "and"):
        first, found, second = words.partition(f" {relation} ")
        if found:
            groups = (_parse_group(first, text), _parse_group(second, text))
            return Caption(groups, relation if relation != "and" else "")
    return Caption((_parse_group(words, text),))


def _parse_group(part: str, text: str) -> Group:
    article, _, rest = part.strip().partition(" ")
    colour, _, name = rest.partition(" ")
    if colour not in COLOURS:
        colour, name = "", rest
    counts = {**{number: i + 1 for i, number in enumerate(NUMBERS)}, "an": 1}
    names = {word: i for i, thing in enumerate(things()) for word in (thing.word, thing.plural)}
    if article not in counts or name not in names:
        raise ValueError(
            f"{text!r} is no caption of the demo's world: wanted such as 'a red car', 'three stars' or 'a cat"
            f" left of a tree', of the things in training/demo/things.txt, but got {part.strip()!r}"
        )
    return Group(counts[article], names[name], colour)


# --- what is held out


def combinations(caption: Caption) -> Iterator[tuple]:
    """What a caption combines: ("count", thing, n), ("colour", thing, colour), ("beside", thing, thing)."""
    for group in caption.groups:
        if group.count > 1:
            yield ("count", group.thing, group.count)
        if group.colour:
            yield ("colour", group.thing, group.colour)
    if len(caption.groups) == 2:
        yield ("beside", *sorted(group.thing for group in caption.groups))


@functools.cache
def is_held_out(combination: tuple) -> bool:
    """Whether this is one of the fixed tenth; by the things' words, so a new row moves no other's."""
    named = [
        things()[part].word if isinstance(part, int) and i else part for i, part in enumerate(combination)
    ]
    if combination[0] == "count":
        named[2] = combination[2]
    digest = hashlib.sha256("/".join(map(str, sorted(named, key=str))).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_OF == 0


def held_out(caption: Caption) -> bool:
    """Whether any of its combinations is held out."""
    return any(map(is_held_out, combinations(caption)))


# --- captions


def random_caption(rng: np.random.Generator, shares: Sequence[float] = TRAINED) -> Caption:
    """A caption with its kind drawn by `shares`; things and colours at random, held out or not."""
    kind = KINDS[rng.choice(len(KINDS), p=shares)]
    first, second = rng.choice(len(things()), 2, replace=False).tolist()
    if kind == "one":
        return Caption((Group(1, first, _colour(first, rng)),))
    if kind == "several":
        return Caption((Group(int(rng.integers(2, 5)), first, _colour(first, rng)),))
    counts = (int(rng.integers(2, 4)), 1) if kind == "groups" else (1, 1)
    if kind == "groups" and rng.random() < 0.5:
        counts = counts[::-1]
    groups = tuple(
        Group(n, thing, _colour(thing, rng)) for n, thing in zip(counts, (first, second), strict=True)
    )
    return Caption(groups, str(rng.choice(RELATIONS)) if kind == "relation" else "")


def _colour(thing: int, rng: np.random.Generator) -> str:
    colours = things()[thing].colours[1:]
    return str(rng.choice(colours)) if colours and rng.random() < COLOURED else ""


def trained_caption(rng: np.random.Generator, shares: Sequence[float] = TRAINED) -> Caption:
    """A caption with nothing held out."""
    while held_out(caption := random_caption(rng, shares)):
        pass
    return caption


def benchmark_captions(count: int, seed: int = 2026) -> list[Caption]:
    """What the benchmarks ask, in this order: all different, every second one with something held out."""
    rng = np.random.default_rng(seed)
    found: dict[Caption, None] = {}
    while len(found) < count:
        caption = random_caption(rng, ASKED)
        if held_out(caption) == bool(len(found) % 2):
            found[caption] = None
    return list(found)


# --- scenes


def place(caption: Caption, rng: np.random.Generator, size: int = SIZE) -> tuple[Placed, ...]:
    """A scene that answers the caption: things of a size by their number, apart from one another."""
    low, high = PIXELS[caption.count - 1] if size == SIZE else SMALL_PIXELS
    while True:
        scene: tuple[Placed, ...] = ()
        for (thing, colour), pixels in zip(
            caption.wanted(), rng.integers(low, high + 1, caption.count).tolist(), strict=True
        ):
            for x, y in (rng.integers(0, size - pixels + 1, (TRIES, 2)) + pixels / 2).tolist():
                if all(max(abs(x - o.x), abs(y - o.y)) >= (pixels + o.pixels) / 2 for o in scene):
                    scene = (*scene, Placed(thing, colour, x, y, pixels))
                    break
        if len(scene) == caption.count and stands_as_asked(caption, scene):
            return scene


def stands_as_asked(caption: Caption, scene: Sequence[Seen]) -> bool:
    """Whether the first thing stands to the second as the relation says, clearly: the way along it is at
    least 1.6 times the way across. True without a relation.
    """
    return not caption.relation or _relation(*scene[:2], ALONG_OVER_ACROSS) == caption.relation


def _relation(a: Seen, b: Seen, along_over_across: float) -> str:
    across, down = b.x - a.x, b.y - a.y
    if abs(across) >= along_over_across * abs(down):
        return "left of" if across > 0 else "right of"
    if abs(down) >= along_over_across * abs(across):
        return "above" if down > 0 else "below"
    return ""


def edited(caption: Caption, rng: np.random.Generator) -> Caption:
    """Another caption, one edit away: a thing more or fewer, another thing, another colour or the colours
    changed over, the relation turned. A scene of it answers the first one wrongly.
    """
    while True:
        other = _edit(caption, rng)
        if other is not None and other.count <= len(NUMBERS) and not same(caption, other):
            return other


def _edit(caption: Caption, rng: np.random.Generator) -> Caption | None:
    groups, at = list(caption.groups), int(rng.integers(len(caption.groups)))
    group = groups[at]
    kind = rng.choice(("count", "thing", "colour", "swap", "relation"))
    if kind == "relation":
        others = [r for r in RELATIONS if r != caption.relation]
        return dataclasses.replace(caption, relation=str(rng.choice(others))) if caption.relation else None
    if kind == "swap":
        if len(groups) < 2 or groups[0].colour == groups[1].colour:
            return None
        colours = [g.colour for g in groups[::-1]]
        if any(c not in things()[g.thing].colours for c, g in zip(colours, groups, strict=True)):
            return None
        groups = [dataclasses.replace(g, colour=c) for c, g in zip(colours, groups, strict=True)]
    elif kind == "count":
        if caption.relation:
            return None
        groups[at] = dataclasses.replace(group, count=group.count + int(rng.choice((-1, 1))))
        groups = [g for g in groups if g.count]
    elif kind == "thing":
        taken = {g.thing for g in groups}
        free = [i for i, t in enumerate(things()) if i not in taken and group.colour in t.colours]
        groups[at] = dataclasses.replace(group, thing=int(rng.choice(free)))
    else:
        free = [c for c in things()[group.thing].colours if c != group.colour]
        groups[at] = dataclasses.replace(group, colour=str(rng.choice(free))) if free else group
    return Caption(tuple(groups), caption.relation) if groups else None


def same(a: Caption, b: Caption) -> bool:
    """Whether every scene of one answers the other: order does not matter without a relation."""
    if a.relation or b.relation:
        return a == b
    return sorted(a.wanted()) == sorted(b.wanted())


def errors(caption: Caption, seen: Sequence[Seen]) -> float:
    """How wrong a picture of these things is for the caption; 0 is right."""
    wanted = collections.Counter(caption.wanted())
    shown = collections.Counter((s.thing, s.colour) for s in seen)
    missing, extra = wanted - shown, shown - wanted
    lacking = collections.Counter(_things(missing))
    surplus = collections.Counter(_things(extra))
    recoloured = (lacking & surplus).total()
    total = (lacking.total() - recoloured) * MISSING + (surplus.total() - recoloured) * EXTRA
    return total + recoloured * WRONG_COLOUR + WRONG_RELATION * _turned(caption, seen)


def _things(counted: collections.Counter) -> Iterator[int]:
    return (thing for thing, _ in counted.elements())


def _turned(caption: Caption, seen: Sequence[Seen]) -> bool:
    """Whether both things of a relation are there and no two of them stand as asked."""
    if not caption.relation:
        return False
    firsts, seconds = ([s for s in seen if s.thing == g.thing] for g in caption.groups)
    pairs = list(itertools.product(firsts, seconds))
    return bool(pairs) and all(_relation(a, b, 1.0) != caption.relation for a, b in pairs)
