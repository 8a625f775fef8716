"""What Step-GRPO LoRA Trainer shows, drawn with Pillow: the reward curve, and pictures before and after."""

from collections.abc import Sequence

import latent_preview
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pictures import pictures_of
from ..trace_picture import CANDIDATE, CHOSEN, GRID, INK, OVERSAMPLE, PAPER, round_ticks

GAP, LABEL = 4, 22


def to_pictures(latents: Tensor, latent_format: object, vae: object | None) -> list[Image.Image]:
    """(B, C, H, W) latents in model space as pictures; without a VAE small colours, enlarged, or shades where
    ComfyUI knows no colours for the model.
    """
    if vae is None:
        small = [_rough(x.unsqueeze(0), latent_format) for x in latents]
        return [picture.resize((8 * picture.width, 8 * picture.height)) for picture in small]
    framed = latents.unsqueeze(2) if latent_format.latent_dimensions == 3 else latents
    with torch.inference_mode():
        images = torch.cat([vae.decode(latent_format.process_out(x.unsqueeze(0))) for x in framed])
    return pictures_of(images)


def _rough(latent: Tensor, latent_format: object) -> Image.Image:
    factors = latent_format.latent_rgb_factors
    if factors is None or len(factors) != latent.shape[1]:
        shade = latent[0].float().mean(dim=0)
        shade = (shade - shade.min()) / (shade.max() - shade.min()).clamp_min(1e-6)
        return Image.fromarray((255 * shade).byte().cpu().numpy()).convert("RGB")
    previewer = latent_preview.Latent2RGBPreviewer(factors, latent_format.latent_rgb_factors_bias)
    return previewer.decode_latent_to_preview(latent)


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of equally large pictures, each under its label."""
    width, height = rows[0][1][0].size
    columns = max(len(pictures) for _, pictures in rows)
    size = columns * (width + GAP) + GAP, len(rows) * (LABEL + height + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        top = row * (LABEL + height + GAP)
        draw.text((GAP + 2, top + 3), label, INK, font=ImageFont.load_default(size=13))
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + column * (width + GAP), top + LABEL))
    return sheet


def stacked(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """One picture above another, the lower one made as wide as the upper."""
    bottom = bottom.resize((top.width, max(1, round(bottom.height * top.width / bottom.width))))
    sheet = Image.new("RGB", (top.width, top.height + bottom.height), PAPER)
    sheet.paste(top, (0, 0))
    sheet.paste(bottom, (0, top.height))
    return sheet


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """A running mean that forgets by `weight` a step, without the pull of its start."""
    total = count = 0.0
    found = []
    for value in values:
        total, count = weight * total + value, weight * count + 1
        found.append(total / count)
    return found


def draw_curve(
    rewards: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    iterations: int,
    size: tuple[int, int] = (560, 300),
    titles: tuple[str, str] = ("reward", "held-out score"),
) -> Image.Image:
    """Reward of every iteration with its running mean, and below it the held-out score on a scale of its
    own. titles: of the two, where they are other things.
    """
    width, height = (OVERSAMPLE * length for length in size)
    picture = Image.new("RGB", (width, height), PAPER)
    middle = round(height * 0.62)
    points = list(enumerate(rewards, start=1))
    means = list(enumerate(smooth(rewards), start=1))
    _panel(picture, (0, middle), titles[0], [(points, CANDIDATE), (means, CHOSEN)], iterations)
    _panel(picture, (middle, height), titles[1], [(list(held_out), CHOSEN)], iterations)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _panel(
    picture: Image.Image,
    rows: tuple[int, int],
    title: str,
    lines: Sequence[tuple[Sequence[tuple[int, float]], str]],
    iterations: int,
) -> None:
    """One set of lines between two rows of the picture."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12 * OVERSAMPLE)
    left, right = 62 * OVERSAMPLE, picture.width - 14 * OVERSAMPLE
    top, bottom = rows[0] + 26 * OVERSAMPLE, rows[1] - 18 * OVERSAMPLE
    draw.text((left, rows[0] + 6 * OVERSAMPLE), title, INK, font=font)
    values = [value for line, _ in lines for _, value in line]
    if not values:
        return
    margin = 0.08 * (max(values) - min(values)) or 0.5
    low, high = min(values) - margin, max(values) + margin

    def place(iteration: int, value: float) -> tuple[float, float]:
        x = left + iteration / max(1, iterations) * (right - left)
        return x, bottom - (value - low) / (high - low) * (bottom - top)

    for value in round_ticks(low, high, 3):
        y = place(0, value)[1]
        draw.line([(left, y), (right, y)], GRID, width=OVERSAMPLE)
        draw.text((left - 6 * OVERSAMPLE, y), f"{value:.4g}", INK, font=font, anchor="rm")
    for iteration in {0, iterations}:
        draw.text((place(iteration, low)[0], bottom + 2), str(iteration), INK, font=font, anchor="mt")
    for line, colour in lines:
        placed = [place(*point) for point in line]
        draw.line(placed, colour, width=round(1.6 * OVERSAMPLE))
        for x, y in placed[:: max(1, len(placed) // 40)]:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
