"""A batch as one picture: the best first, each with its rank, its number in the batch and its score."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .trace_picture import CHOSEN, INK, PAPER

SIDE, GAP, CAPTION = 256, 12, 30


def contact_sheet(
    pictures: Sequence[Image.Image], scores: Sequence[float], order: Sequence[int], numbers: Sequence[int]
) -> Image.Image:
    """pictures, scores, numbers: of the batch in its order; order: places in it, the best first."""
    columns = math.ceil(math.sqrt(len(order)))
    width, height = pictures[0].size
    scale = SIDE / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    # A caption needs the room of a narrow picture, too.
    across, down = max(width, SIDE * 3 // 4) + GAP, height + CAPTION + GAP
    sheet = Image.new("RGB", (columns * across + GAP, math.ceil(len(order) / columns) * down + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for rank, place in enumerate(order):
        left, top = GAP + rank % columns * across, GAP + rank // columns * down
        sheet.paste(
            pictures[place].convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top)
        )
        words = f"{rank + 1}.  picture {numbers[place] + 1}:  {scores[place]:+.2f}"
        draw.text((left, top + height + 6), words, CHOSEN if rank == 0 else INK, font=font)
    return sheet
