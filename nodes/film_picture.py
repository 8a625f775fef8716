"""A film strip as a picture, drawn with Pillow alone, which ComfyUI brings along.

One row a fork, time running down: a thumbnail a candidate with its number and score below, the chosen one
framed, and a bracket from it to those that were drawn from it. The finished picture, if given, stands last.
"""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .trace_picture import CHOSEN, INK, PAPER

FAINT, BRACKET = "#8a8a8a", "#b8b8b8"


@dataclass(frozen=True)
class Frame:
    """What one candidate would have become; number: counted from 1 in the order drawn."""

    picture: Image.Image
    number: int
    score: float
    chosen: bool


@dataclass(frozen=True)
class Strip:
    """One fork. step: counted from 1. drawn: how many candidates there were, shown or not."""

    step: int
    steps: int
    sigma_next: float
    drawn: int
    frames: list[Frame]


@dataclass(frozen=True)
class Layout:
    """Lengths in pixels of a strip whose thumbnails are at most `side` on each side."""

    side: int
    width: int
    height: int
    columns: int

    @property
    def unit(self) -> float:
        return self.side / 192

    @property
    def gutter(self) -> int:
        return round(112 * max(1.0, self.unit))

    @property
    def gap(self) -> int:
        return round(14 * self.unit)

    @property
    def row(self) -> int:
        return self.height + self.caption + round(30 * self.unit)

    @property
    def caption(self) -> int:
        return round(26 * max(0.75, self.unit))

    @property
    def head(self) -> int:
        return round(40 * max(0.75, self.unit))

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Where a thumbnail's top left pixel lies."""
        return self.gutter + column * (self.width + self.gap), self.head + row * self.row

    def size(self, rows: int) -> tuple[int, int]:
        wide = self.gutter + self.columns * (self.width + self.gap) + self.gap
        return wide, self.head + rows * self.row


def draw_strip(strips: list[Strip], final: Image.Image | None, side: int) -> Image.Image:
    """The RGB picture of at least one fork; side: the longer side of a thumbnail."""
    first = strips[0].frames[0].picture
    scale = side / max(first.size)
    layout = Layout(
        side=side,
        width=max(1, round(first.width * scale)),
        height=max(1, round(first.height * scale)),
        # The headline needs the width of two.
        columns=max(2, *(len(strip.frames) for strip in strips)),
    )
    picture = Image.new("RGB", layout.size(len(strips) + (final is not None)), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14 * max(0.75, layout.unit))
    draw.text((layout.gap, layout.gap), "What each candidate would have become", INK, font=font)
    for row, strip in enumerate(strips):
        after = len(strips[row + 1].frames) if row + 1 < len(strips) else int(final is not None)
        _draw_brackets(draw, layout, row, strip, after)
        _draw_fork(picture, draw, layout, row, strip, font)
    if final is not None:
        place = layout.corner(len(strips), 0)
        picture.paste(final.resize((layout.width, layout.height), Image.Resampling.LANCZOS), place)
        draw.text((layout.gap, place[1]), "finished", INK, font=font)
    return picture


def _draw_fork(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    layout: Layout,
    row: int,
    strip: Strip,
    font: ImageFont.FreeTypeFont,
) -> None:
    top = layout.corner(row, 0)[1]
    lines = [f"step {strip.step} of {strip.steps}", f"sigma {strip.sigma_next:.2f}"]
    if strip.drawn > len(strip.frames):
        lines.append(f"{len(strip.frames)} of {strip.drawn}")
    for i, line in enumerate(lines):
        draw.text((layout.gap, top + i * layout.caption * 0.8), line, FAINT if i else INK, font=font)
    border = max(3, round(5 * layout.unit))
    for column, frame in enumerate(strip.frames):
        left, top = layout.corner(row, column)
        small = frame.picture.resize((layout.width, layout.height), Image.Resampling.LANCZOS)
        if frame.chosen:
            right, bottom = left + layout.width + border - 1, top + layout.height + border - 1
            draw.rectangle([left - border, top - border, right, bottom], fill=CHOSEN)
        picture.paste(small, (left, top))
        words = f"{frame.number}:  {frame.score:+.2f}"
        place = (left + layout.width / 2, top + layout.height + border + layout.caption * 0.1)
        draw.text(place, words, CHOSEN if frame.chosen else INK, font=font, anchor="mt")


def _draw_brackets(draw: ImageDraw.ImageDraw, layout: Layout, row: int, strip: Strip, after: int) -> None:
    """Lines from the chosen candidate to the `after` thumbnails of the next row."""
    chosen = next((i for i, frame in enumerate(strip.frames) if frame.chosen), None)
    if chosen is None or after == 0:
        return
    thick = max(1, round(2 * layout.unit))

    def centre(column: int) -> float:
        return layout.corner(row, column)[0] + layout.width / 2

    below = layout.corner(row + 1, 0)[1]
    bar = below - round(10 * layout.unit)
    start = layout.corner(row, 0)[1] + layout.height + layout.caption
    draw.line([(centre(chosen), start), (centre(chosen), bar)], CHOSEN, width=thick)
    ends = [centre(column) for column in range(after)]
    draw.line([(min(*ends, centre(chosen)), bar), (max(*ends, centre(chosen)), bar)], BRACKET, width=thick)
    for end in ends:
        draw.line([(end, bar), (end, below)], BRACKET, width=thick)
