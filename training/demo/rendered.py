"""Scenes as pictures on disk: those without what is held out, any, and single things on 64 x 64 pixels.

    OUT/trained.npy, any.npy, small.npy   (N, H, W, 3) uint8, read through the file map
    OUT/trained.txt, any.txt, small.txt   their captions, a line each
    OUT/scenes.json                       how many of each

What scene n of a set shows is a function of its number.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

from training.demo.fit import once
from training.demo.icons import Renderer
from training.demo.scenes import SIZE, Caption, Placed, place, random_caption, trained_caption

SMALL = 64
# of the rendered pictures: without anything held out, any, single things
OF_SET = {"trained": 0.6, "any": 0.25, "small": 0.15}
FEWEST, MOST = 1024, 160_000
SEEDS = {"trained": 1, "any": 2, "small": 3}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A set of rendered scenes: pictures (N, H, W, 3) uint8, and what they answer and show."""

    pictures: np.ndarray
    captions: list[Caption]
    scenes: list[tuple[Placed, ...]]


def scene_of(name: str, number: int) -> tuple[Caption, tuple[Placed, ...]]:
    """The scene with this number in a set."""
    rng = np.random.default_rng([SEEDS[name], number])
    if name == "small":
        caption = trained_caption(rng, (1.0, 0.0, 0.0, 0.0, 0.0))
        return caption, place(caption, rng, SMALL)
    caption = trained_caption(rng) if name == "trained" else random_caption(rng)
    return caption, place(caption, rng)


def size_of(name: str) -> int:
    return SMALL if name == "small" else SIZE


@functools.cache
def renderer(source: Path) -> Renderer:
    return Renderer(source)


def render(source: Path, name: str, first: int, last: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (last - first, H, W, 3) and captions of scenes `first` to `last` of a set."""
    draw_one = renderer(source).picture
    captions, scenes = zip(*(scene_of(name, n) for n in range(first, last)), strict=True)
    return np.stack([draw_one(scene, size_of(name)) for scene in scenes]), [str(c) for c in captions]


def in_processes() -> concurrent.futures.ProcessPoolExecutor:
    """One process for every core; a renderer lives in each."""
    return concurrent.futures.ProcessPoolExecutor(
        os.cpu_count() or 1, mp_context=multiprocessing.get_context("spawn")
    )


def render_all(out: Path, minutes: float) -> dict[str, int]:
    """As many scenes as fit into the minutes, in OUT/<set>.npy; how many of each set."""
    counted = out / "scenes.json"
    if not counted.exists():
        source = out / "source"
        render(source, "trained", 0, 64)  # every size of every icon once
        begun = time.monotonic()
        render(source, "trained", 64, 320)
        fits = int(60 * minutes * (os.cpu_count() or 1) * 256 / (time.monotonic() - begun))
        counts = {name: max(FEWEST, int(share * min(MOST, fits))) for name, share in OF_SET.items()}
        with in_processes() as pool:
            for name, count in counts.items():
                edges = range(0, count, 256)
                jobs = [pool.submit(render, source, name, n, min(n + 256, count)) for n in edges]
                parts, captions = zip(*(job.result() for job in jobs), strict=True)
                lines = "\n".join(caption for part in captions for caption in part)
                once(out / f"{name}.txt", lambda path, lines=lines: path.write_text(lines))
                pictures = np.concatenate(parts)
                once(out / f"{name}.npy", lambda path, pictures=pictures: save_array(path, pictures))
        once(counted, lambda path: path.write_text(json.dumps(counts)))
    return json.loads(counted.read_text())


def save_array(path: Path, pictures: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, pictures)


def load_set(out: Path, name: str) -> Shown:
    pictures = np.load(out / f"{name}.npy", mmap_mode="r")
    both = [scene_of(name, n) for n in range(len(pictures))]
    return Shown(pictures, [caption for caption, _ in both], [scene for _, scene in both])
