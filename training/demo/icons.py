"""The things of the demo's world as pictures: icons of Fluent Emoji Flat (MIT), tinted, placed on white.

The npm package @iconify-json/fluent-emoji-flat is fetched once with `npm pack`. A tint keeps an icon's light
and shade: its luminance runs from a dark tone of the colour through the colour to a pale one.
"""

from __future__ import annotations

import functools
import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.demo.scenes import SIZE, Placed, things

PACKAGE, VERSION = "@iconify-json/fluent-emoji-flat", "1.2.6"
LICENCE = "Apache-2.0; learned from Fluent Emoji Flat (MIT)"
TINTS = {"red": (228, 38, 48), "green": (34, 160, 72), "blue": (38, 108, 232), "yellow": (250, 204, 30)}
DARK, PALE = 0.25, 0.75  # the darkest tone's share of the tint; how far the palest is on the way to white
CONTRAST = 1.5
DRAWN_AT = 256


def fetch(folder: Path) -> dict:
    """The package's icons.json, packed into `folder` unless it is there already; RuntimeError when npm
    cannot.
    """
    name = f"{PACKAGE.strip('@').replace('/', '-')}-{VERSION}.tgz"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed, is npm there? It said: {done.stderr.strip()}")
    with tarfile.open(folder / name) as archive:
        return json.load(archive.extractfile("package/icons.json"))


def rasterise(icons: dict, name: str) -> Image.Image:
    """One icon as RGBA of 256 x 256."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}"'
        f' width="{DRAWN_AT}" height="{DRAWN_AT}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN_AT, height=DRAWN_AT))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def tinted(icon: Image.Image, colour: str) -> Image.Image:
    """The icon in another colour, its light and shade kept; "" leaves it as it is."""
    if not colour:
        return icon
    pixels = np.asarray(icon).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    mean = float((light * alpha[..., 0]).sum() / alpha.sum())
    tint = np.array(TINTS[colour], np.float32)
    stops = np.stack([tint * DARK, tint, tint + PALE * (255 - tint)])
    at = np.clip(CONTRAST * (light - mean), -0.5, 0.5) + 0.5
    ramp = np.stack([np.interp(at, (0.0, 0.5, 1.0), stops[:, c]) for c in range(3)], -1)
    return Image.fromarray(np.concatenate([ramp, pixels[..., 3:]], -1).round().astype(np.uint8), "RGBA")


class Renderer:
    """Draws scenes from the icons in a folder; keeps every icon in the sizes it was asked for."""

    def __init__(self, folder: Path) -> None:
        icons = fetch(folder)
        self._icons = [rasterise(icons, thing.icon) for thing in things()]
        self._tinted = functools.cache(lambda thing, colour: tinted(self._icons[thing], colour))
        self._sized = functools.cache(self._draw)

    def _draw(self, thing: int, colour: str, pixels: int) -> Image.Image:
        return self._tinted(thing, colour).resize((pixels, pixels), Image.Resampling.BOX)

    def picture(self, scene: Sequence[Placed], size: int = SIZE) -> np.ndarray:
        """(size, size, 3) uint8."""
        canvas = Image.new("RGBA", (size, size), "white")
        for placed in scene:
            corner = (int(placed.x - placed.pixels / 2), int(placed.y - placed.pixels / 2))
            canvas.alpha_composite(self._sized(placed.thing, placed.colour, placed.pixels), corner)
        return np.asarray(canvas.convert("RGB"))
