"""A trace as a picture, drawn with Pillow alone, which ComfyUI brings along.

One dot a candidate, steps from left to right, sigma_next below; the winners joined by a line. Steps that
scored nothing are shaded and the line crosses them thinly. Scores at two sigmas do not compare: they share an
axis only as distances from their step's mean, and as given each step fills the height with its own range.
Drawn at twice the size and scaled down, which smooths edges and letters.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from ..drm.stepwise import Trace

RAW, RELATIVE = "as given", "above the step's mean"
OVERSAMPLE = 2
PAPER, INK, GRID, CANDIDATE, CHOSEN = "#ffffff", "#333333", "#e4e4e4", "#9db4cc", "#d1495b"
UNSCORED, CROSSING = "#f6f6f6", "#e8a4ad"


@dataclass(frozen=True)
class Row:
    """One step of one picture: who won, and its scores, as they are drawn and as the DRM gave them."""

    scores: list[float]
    winner: int
    given: list[float]


@dataclass(frozen=True)
class Axes:
    """The plot's rectangle in pixels, and the ranges it stands for."""

    left: float
    top: float
    right: float
    bottom: float
    steps: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return self.left + (step + 0.5) / self.steps * (self.right - self.left)

    def y(self, score: float) -> float:
        return self.bottom - (score - self.low) / (self.high - self.low) * (self.bottom - self.top)


def item_rows(trace: "Trace", item: int, relative: bool) -> list[Row | None]:
    """Every step of one batch item, None where nothing was scored for it. relative: scores less their step's
    mean; else from 0, the step's lowest, to 1, its highest.
    """
    rows: list[Row | None] = []
    for step in trace.steps:
        given = step.scores[item] if step.scores is not None else []
        if not given:
            rows.append(None)
            continue
        zero, unit = (sum(given) / len(given), 1.0) if relative else (min(given), max(given) - min(given))
        drawn = [(score - zero) / unit if unit else 0.5 for score in given]
        rows.append(Row(drawn, step.winner[item], given))
    return rows


def draw_trace(
    trace: "Trace", item: int = 0, relative: bool = False, size: tuple[int, int] = (768, 432)
) -> Image.Image:
    """The plot of one batch item, an RGB picture of `size` (width, height)."""
    rows = item_rows(trace, item, relative)
    width, height = (OVERSAMPLE * length for length in size)
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    unit = min(width / 768, height / 432)
    font = ImageFont.load_default(size=13.5 * unit)
    draw.text((16 * unit, 10 * unit), _title(trace, item, relative), INK, font=font)
    flat = [score for row in rows if row is not None for score in row.scores]
    if not flat:
        message = "No step branched: there are no scores to plot."
        draw.text((width / 2, height / 2), message, INK, font=font, anchor="mm")
        return picture.resize(size, Image.Resampling.LANCZOS)
    margin = (0.08 if relative else 0.16) * (max(flat) - min(flat)) or 0.5
    axes = Axes(
        left=72 * unit,
        top=68 * unit,
        right=width - 20 * unit,
        bottom=height - 54 * unit,
        steps=len(rows),
        low=min(flat) - margin,
        high=max(flat) + margin,
    )
    _draw_legend(draw, unit, font, shaded=None in rows)
    _shade_unscored(draw, axes, rows)
    _draw_steps(draw, axes, trace, unit, font)
    if relative:
        _draw_ticks(draw, axes, unit, font)
    else:
        _write_ranges(draw, axes, rows, unit, font)
    _draw_scores(draw, axes, rows, unit)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _title(trace: "Trace", item: int, relative: bool) -> str:
    what = "DRM score above the step's mean" if relative else "DRM score, each step on its own scale"
    run, preset = trace.settings.chosen(), trace.settings.preset
    return (
        f"{what}   |   picture {item + 1}, seed {run.seed}, {run.num_branches} branches,"
        f" {run.kind} {run.noise_level:g}" + ("" if preset == "custom" else f", {preset}")
    )


def round_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _draw_legend(draw: ImageDraw.ImageDraw, unit: float, font: ImageFont.FreeTypeFont, shaded: bool) -> None:
    x, y = 22 * unit, 44 * unit
    entries = [(CHOSEN, "chosen"), (CANDIDATE, "drawn and left")] + [("#dddddd", "not scored")] * shaded
    for colour, words in entries:
        draw.ellipse([x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit], fill=colour)
        draw.text((x + 11 * unit, y), words, INK, font=font, anchor="lm")
        x += 34 * unit + draw.textlength(words, font=font)


def _draw_ticks(draw: ImageDraw.ImageDraw, axes: Axes, unit: float, font: ImageFont.FreeTypeFont) -> None:
    for value in round_ticks(axes.low, axes.high):
        y = axes.y(value)
        draw.line([(axes.left, y), (axes.right, y)], GRID, width=round(unit))
        draw.text((axes.left - 8 * unit, y), f"{value:.4g}", INK, font=font, anchor="rm")


def _write_ranges(
    draw: ImageDraw.ImageDraw, axes: Axes, rows: list[Row | None], unit: float, font: ImageFont.FreeTypeFont
) -> None:
    """Each step's highest and lowest score, where there is room for them."""
    for end, anchor, score_of in ((axes.high, "mt", max), (axes.low, "mb", min)):
        draw.text(
            (axes.left - 8 * unit, axes.y(end)),
            "highest" if score_of is max else "lowest",
            INK,
            font=font,
            anchor=anchor.replace("m", "r", 1),
        )
        for i, row in enumerate(rows):
            if row is not None and i % _every(axes, unit) == 0:
                words = f"{score_of(row.given):.2f}"
                draw.text((axes.x(i), axes.y(end)), words, INK, font=font, anchor=anchor)


def _every(axes: Axes, unit: float) -> int:
    """Of how many steps one has room for a label."""
    return math.ceil(axes.steps / max(1, (axes.right - axes.left) / (42 * unit)))


def _draw_steps(
    draw: ImageDraw.ImageDraw, axes: Axes, trace: "Trace", unit: float, font: ImageFont.FreeTypeFont
) -> None:
    every = _every(axes, unit)
    for i, step in enumerate(trace.steps):
        if i % every == 0:
            draw.text((axes.x(i), axes.bottom + 8 * unit), str(i + 1), INK, font=font, anchor="mt")
            draw.text(
                (axes.x(i), axes.bottom + 25 * unit),
                f"{step.sigma_next:.2f}",
                "#8a8a8a",
                font=font,
                anchor="mt",
            )
    draw.text((axes.left - 8 * unit, axes.bottom + 8 * unit), "step", INK, font=font, anchor="rt")
    draw.text((axes.left - 8 * unit, axes.bottom + 25 * unit), "sigma", "#8a8a8a", font=font, anchor="rt")
    draw.line(
        [(axes.left, axes.top), (axes.left, axes.bottom), (axes.right, axes.bottom)], INK, width=round(unit)
    )


def _shade_unscored(draw: ImageDraw.ImageDraw, axes: Axes, rows: list[Row | None]) -> None:
    for i, row in enumerate(rows):
        if row is None:
            draw.rectangle([axes.x(i - 0.5), axes.top, axes.x(i + 0.5), axes.bottom], UNSCORED)


def _draw_scores(draw: ImageDraw.ImageDraw, axes: Axes, rows: list[Row | None], unit: float) -> None:
    def dot(x: float, y: float, radius: float, colour: str) -> None:
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    scored = [(i, row) for i, row in enumerate(rows) if row is not None]
    for i, row in scored:
        for score in row.scores:
            dot(axes.x(i), axes.y(score), 3.5 * unit, CANDIDATE)
    path = [(i, axes.x(i), axes.y(row.scores[row.winner])) for i, row in scored]
    for (i, *start), (j, *end) in pairwise(path):
        next_door = j == i + 1
        draw.line(
            [tuple(start), tuple(end)],
            CHOSEN if next_door else CROSSING,
            width=round((2 if next_door else 1) * unit),
        )
    for _, x, y in path:
        dot(x, y, 4.5 * unit, CHOSEN)
