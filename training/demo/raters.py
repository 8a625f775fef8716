"""The raters: a small crowd of classifiers that prefers, of two drawings, the one it recognises more surely.

    python -m training.demo.raters --data runs/demo/data --out runs/demo/raters

Public preference data is people choosing between a generator's own pictures. No people were asked here: three
classifiers, trained from scratch on real pictures only, look at a drawing and say how sure they are of the
concept that was asked for; their utility is the mean of log p(concept).
None of them shares a weight, a shape or a seed with the judge of the benchmarks, which stays out of all
training; they did learn from the same icons, as people did who know emoji.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from drm.ranges import Count
from training.config import argument
from training.demo import data
from training.demo.autoencoder import to_float
from training.demo.classifier import Icons, Residual, shrink, train_classifier

NAMES = ("mixer", "wide", "plain")
# A rater that is surely wrong is no more against a picture than this: one vote must not decide alone.
FLOOR = -5.0


class Mixer(nn.Module):
    """ConvMixer: 8 x 8 patches, then depth-wise 5 x 5 and point-wise convolutions."""

    def __init__(self, concepts: int, width: int = 192, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.GELU(), nn.BatchNorm2d(width))
        self.spatial = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 5, 1, 2, groups=width), nn.GELU(), nn.BatchNorm2d(width))
            for _ in range(depth)
        )
        self.channel = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)) for _ in range(depth)
        )
        self.out = nn.Linear(width, concepts)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.stem(pictures)
        for spatial, channel in zip(self.spatial, self.channel, strict=True):
            x = channel(x + spatial(x))
        return self.out(x.mean((2, 3)))


class Pyramid(nn.Module):
    """Residual blocks of the widths given, halving from block to block."""

    def __init__(self, concepts: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2, bias=False)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.blocks = nn.Sequential(*(Residual(before, width, 2) for before, width in pairs))
        self.out = nn.Linear(widths[-1], concepts)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(F.relu(self.stem(pictures))).mean((2, 3)))


def build_rater(name: str, concepts: int) -> nn.Module:
    """A rater with fresh weights: pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, concepts)."""
    if name == "mixer":
        return Mixer(concepts)
    return Pyramid(concepts, {"wide": (64, 128, 256), "plain": (40, 80, 120, 160)}[name])


def load_raters(folder: Path) -> list[nn.Module]:
    """All raters of a folder, in eval mode."""
    raters = []
    for name in NAMES:
        weights = load_file(folder / f"{name}.safetensors")
        rater = build_rater(name, len(weights["out.bias"]))
        rater.load_state_dict(weights)
        raters.append(rater.requires_grad_(False).eval())
    return raters


@torch.no_grad()
def log_probabilities(raters: list[nn.Module], pictures: np.ndarray, batch: int = 128) -> torch.Tensor:
    """(N, H, W, 3) uint8 pictures -> (N, concepts): the raters' mean log p of every concept."""
    parts = []
    for first in range(0, len(pictures), batch):
        small = shrink(to_float(pictures[first : first + batch]))
        logs = [rater(small).log_softmax(-1).clamp_min(FLOOR) for rater in raters]
        parts.append(torch.stack(logs).mean(0))
    return torch.cat(parts)


def train_rater(
    name: str, icons: Icons, concepts: int, out: Path, steps: int, batch: int
) -> dict[str, float]:
    """One rater's training; its file is <name>.safetensors. Returns its figures."""
    seed = 101 + NAMES.index(name)
    torch.manual_seed(seed)
    averaged, figures = train_classifier(
        build_rater(name, concepts), icons, out, name=name, steps=steps, batch=batch, seed=seed
    )
    weights = {key: value.contiguous() for key, value in averaged.state_dict().items()}
    save_file(weights, out / f"{name}.safetensors")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/raters"))
    parser.add_argument("--steps", type=argument(Count), default=2000)
    parser.add_argument("--batch", type=argument(Count), default=64)
    parser.add_argument("--only", choices=NAMES, nargs="*", default=list(NAMES))
    args = parser.parse_args()
    demo = data.load(args.data)
    icons = Icons.of(demo)
    for name in args.only:
        figures = train_rater(name, icons, len(demo.names), args.out, args.steps, args.batch)
        (args.out / f"{name}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
