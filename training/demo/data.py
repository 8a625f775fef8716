"""The demo pictures: emoji of four open icon sets, rasterised, captioned and split.

    python -m training.demo.data --out runs/demo/data

fetches the npm packages @iconify-json/{fluent-emoji, fluent-emoji-flat, noto, twemoji} with `npm pack` (or
takes the .tgz files of --source), draws every icon on white at 128 x 128 and writes

    images.npy    (N, 128, 128, 3) uint8, read memory-mapped
    index.json    {"styles", "concepts": [{"name", "words"}], "icons": [[concept or -1, style], ...],
    "held_out": [icon, ...]}

Icons of concept -1 (everything outside concepts.txt) only ever teach the autoencoder. Held-out icons are 200
(concept, style) pairs that no model sees in training; each of their concepts is seen in the other three
styles. The captions of 100 of them are for practice, see `practice`; the benchmarks ask for `kept_aside`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from drm.text_files import read_text

SETS = {"fluent": "fluent-emoji", "flat": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}
STYLES = list(SETS)
LICENCE = "Apache-2.0; learned from Fluent Emoji (MIT), Noto Emoji (Apache-2.0), Twemoji (CC-BY-4.0)"
SIZE, INNER = 128, 116
HELD_OUT = 200
SPLIT_SEED = 20260  # the split is part of the data set: changing it makes published figures incomparable
HELD_OUT_CONCEPTS = 48
ASKED_FREELY = 200


@dataclasses.dataclass(frozen=True)
class DemoData:
    """Pictures and their labels. `images` (N, 128, 128, 3) uint8; `concept`, `style` (N,) int; masks are
    (N,) bool.
    """

    images: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    held_out: np.ndarray
    names: list[str]
    words: list[list[str]]

    def icons(self, *, held_out: bool) -> np.ndarray:
        """Indices of captioned icons inside (or outside) the held-out split."""
        return np.flatnonzero((self.concept >= 0) & (self.held_out == held_out))

    def caption(self, icon: int) -> str:
        """The canonical caption, as the bundled graphs write it: 'cat face, noto style'."""
        return f"{self.words[self.concept[icon]][0]}, {STYLES[self.style[icon]]} style"


def indices(mask: torch.Tensor) -> torch.Tensor:
    """Where a (N,) mask is true, (M,) int64."""
    return torch.argwhere(mask).flatten()


def read_concepts() -> list[tuple[str, list[str]]]:
    """[(icon name, [words people use, the first the canonical one])] from concepts.txt."""
    rows = []
    for line in read_text(Path(__file__).parent / "concepts.txt").splitlines():
        if line and not line.startswith("#"):
            name, _, synonyms = line.partition(":")
            words = [name.replace("-", " "), *(word.strip() for word in synonyms.split(",") if word.strip())]
            rows.append((name, words))
    return rows


def fetch(package: str, folder: Path) -> dict:
    """The icons.json of one npm package, packed into `folder` unless it is there already."""
    found = sorted(folder.glob(f"iconify-json-{package}-[0-9]*.tgz"))
    if not found:
        subprocess.run(
            ["npm", "pack", f"@iconify-json/{package}"], cwd=folder, check=True, capture_output=True
        )
        found = sorted(folder.glob(f"iconify-json-{package}-[0-9]*.tgz"))
    with tarfile.open(found[-1]) as archive:
        return json.load(archive.extractfile("package/icons.json"))


def rasterise(icons: dict, name: str) -> np.ndarray:
    """One icon on white, (128, 128, 3) uint8, with a margin of 6 pixels."""
    import resvg_py

    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{INNER}" height="{INNER}">'
        f"{icon['body']}</svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=INNER, height=INNER))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def split(icons: list[tuple[int, int]], concepts: int) -> list[int]:
    """Indices of the held-out icons: one style of each of 200 concepts drawn with a fixed seed."""
    rng = random.Random(SPLIT_SEED)
    wanted = {concept: rng.randrange(len(STYLES)) for concept in rng.sample(range(concepts), HELD_OUT)}
    return [i for i, (concept, style) in enumerate(icons) if wanted.get(concept) == style]


def practice(held_out: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Every second of the held-out (concept, style) pairs, in order: reward models and policies may practise
    on their captions, never on their pictures. The others are for tests alone.
    """
    return sorted(held_out)[::2]


def held_out_concepts(concepts: int) -> list[int]:
    """The concepts that studies of reward models keep out of training altogether."""
    return random.Random(SPLIT_SEED + 1).sample(range(concepts), HELD_OUT_CONCEPTS)


def kept_aside(concepts: int) -> list[tuple[int, int]]:
    """The (concept, style) pairs the benchmarks ask for: no reward model of the demo learns from their
    captions or pictures, no policy practises on them. In turn one that the generator never saw and one it
    knows, of the held-out concepts.
    """
    everything = [(concept, style) for style in range(len(STYLES)) for concept in range(concepts)]
    held_out = {everything[i] for i in split(everything, concepts)}
    unseen = sorted(held_out - set(practice(sorted(held_out))))
    asked = set(held_out_concepts(concepts))
    turns = [(c, (c + turn) % len(STYLES)) for turn in range(len(STYLES)) for c in range(concepts)]
    known = [pair for pair in turns if pair[0] in asked and pair not in held_out]
    return [pair for both in zip(unseen, known, strict=False) for pair in both]


def asked_freely(concepts: int) -> list[int]:
    """The concepts, ascending, of whose captions without a style no model but the generator learns; every
    second one is in the benchmarks.
    """
    return sorted(random.Random(SPLIT_SEED + 2).sample(range(concepts), ASKED_FREELY))


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which of some icons are what, (N,) bool each. held_out: pictures no model saw; practice: those of them
    whose captions may be practised on; aside: see `kept_aside`; foreign: of a concept that is held out of
    studies.
    """

    held_out: torch.Tensor
    practice: torch.Tensor
    aside: torch.Tensor
    foreign: torch.Tensor


def roles(demo: DemoData, icons: np.ndarray) -> Roles:
    """The roles of these icons."""
    held_out, concepts = demo.held_out[icons], len(demo.names)
    labels = list(zip(demo.concept[icons].tolist(), demo.style[icons].tolist(), strict=True))
    practised = set(practice([label for label, held in zip(labels, held_out, strict=True) if held]))
    aside = set(kept_aside(concepts))
    return Roles(
        held_out=torch.from_numpy(held_out),
        practice=torch.tensor([label in practised for label in labels]),
        aside=torch.tensor([label in aside for label in labels]),
        foreign=torch.from_numpy(np.isin(demo.concept[icons], held_out_concepts(concepts))),
    )


def build(out: Path, source: Path | None) -> None:
    """Draw everything and write images.npy and index.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sets = {style: fetch(package, source or out) for style, package in SETS.items()}
    shared = set.intersection(*(set(icons["icons"]) for icons in sets.values()))
    concepts = [(name, words) for name, words in read_concepts() if name in shared]
    missing = [name for name, _ in read_concepts() if name not in shared]
    if missing:
        print(f"not in all four sets, left out: {', '.join(missing)}")
    number = {name: i for i, (name, _) in enumerate(concepts)}
    pictures, icons = [], []
    for style, style_icons in enumerate(sets.values()):
        for name in sorted(shared):
            pictures.append(rasterise(style_icons, name))
            icons.append((number.get(name, -1), style))
    np.save(out / "images.npy", np.stack(pictures))
    index = {
        "styles": STYLES,
        "concepts": [{"name": name, "words": words} for name, words in concepts],
        "icons": icons,
        "held_out": split(icons, len(concepts)),
    }
    (out / "index.json").write_text(json.dumps(index))
    print(f"{len(pictures)} pictures: {len(shared)} names, {len(concepts)} of them concepts")


def load(folder: Path) -> DemoData:
    """Read what `build` wrote; pictures stay on disk until used."""
    if not (folder / "index.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no demo data: run `python -m training.demo.data --out {folder}` first"
        )
    index = json.loads((folder / "index.json").read_text())
    icons = np.array(index["icons"])
    held_out = np.zeros(len(icons), dtype=bool)
    held_out[index["held_out"]] = True
    return DemoData(
        images=np.load(folder / "images.npy", mmap_mode="r"),
        concept=icons[:, 0],
        style=icons[:, 1],
        held_out=held_out,
        names=[concept["name"] for concept in index["concepts"]],
        words=[concept["words"] for concept in index["concepts"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--source", type=Path, help="folder with the four .tgz files, to work offline")
    args = parser.parse_args()
    build(args.out, args.source)


if __name__ == "__main__":
    main()
