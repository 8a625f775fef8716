"""What encoded pairs weigh and how long they take: bytes from the shapes, time from the measured rates."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

MILLION = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What was encoded and how fast; a rate is None when nothing of its kind was left to do. `waiting`: the
    share of the pictures' time that the VAE waited for decoded ones.
    """

    pairs: int
    pictures: int
    prompts: int
    picture_bytes: int
    prompt_bytes: int
    pictures_per_second: float | None
    prompts_per_second: float | None
    waiting: float = 0.0

    @property
    def bytes(self) -> int:
        return self.pictures * self.picture_bytes + self.prompts * self.prompt_bytes


def forecast(cost: Cost, pairs: int = MILLION) -> tuple[float, float | None]:
    """(bytes, hours) of `pairs` pairs with as many pictures and prompts each; hours at the measured rates."""
    scale = pairs / cost.pairs
    if cost.pictures_per_second is None or cost.prompts_per_second is None:
        return scale * cost.bytes, None
    seconds = cost.pictures / cost.pictures_per_second + cost.prompts / cost.prompts_per_second
    return scale * cost.bytes, scale * seconds / 3600


def rate_of(what: str, figures: list[tuple[dict, dict]]) -> float | None:
    """All processes' rows a second, None when there was nothing to do."""
    encoded = sum(counts[what] for counts, _ in figures)
    return encoded / max(seconds[what] for _, seconds in figures) if encoded else None


def row_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of one row of tensors with these shapes: 131,072 for SD3's latents at 512 in float16, 3,047,424
    for a prompt with T5 lengths 77 and 256.
    """
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def summary(cost: Cost, folder: Path) -> Iterator[str]:
    """What was encoded, how fast, and what a million such pairs would take, line by line."""

    def rate(value: float | None) -> str:
        return "all there before" if value is None else f"{value:,.1f} a second"

    report = json.loads((folder / "report.json").read_text())["sources"]
    bad = sum(sum(counts["bad"].values()) for counts in report.values())
    yield f"{folder}: {cost.pairs:,} pairs, {bad:,} rows could not be used (report.json says why)"
    waited = f", {cost.waiting:.0%} of it waiting for decoding" if cost.pictures_per_second else ""
    pictures = f"{rate(cost.pictures_per_second)}{waited}"
    yield f"pictures {cost.pictures:>12,} of {cost.picture_bytes:>9,} bytes, {pictures}"
    yield f"prompts  {cost.prompts:>12,} of {cost.prompt_bytes:>9,} bytes, {rate(cost.prompts_per_second)}"
    stored, hours = forecast(cost)
    took = f" and {hours:,.1f} hours at this rate" if hours is not None else ""
    yield f"{cost.bytes / 1e9:,.3f} GB in all; a million such pairs: {stored / 1e9:,.1f} GB{took}"
