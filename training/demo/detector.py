"""Judge and rater of the demo's world: convolutional detectors that say what a picture shows, where, and in
what colour. A program then compares it with the caption.

Every cell of 8 x 8 pixels says whether the centre of a thing lies in it, which thing, and in which colour;

    loss = BCE(centre) + CE(thing) + CE(colour), the latter two at the cells with a centre

They learn from drawn scenes of every combination, the held-out ones too, as they are and as the autoencoder
hands them on, with gains, blur and noise. The rater labels the reward model's pairs and nothing else; the
judge has other widths, another seed, and reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training.demo.scenes import COLOURS, Caption, Placed, Seen, errors, things

STRIDE = 8
ALL_COLOURS = ("", *COLOURS)
CENTRE_WEIGHT, POSITIVE = 4.0, 20.0  # a centre is one cell of two hundred
FOUND = 0.5


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Detector(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> logits (B, 1 + things + colours, H / 8, W / 8)."""

    def __init__(self, width: int, depth: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, width // 2, 4, 4, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(),
                Residual(width // 2),
                nn.Conv2d(width // 2, width, 2, 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                *(Residual(width) for _ in range(depth)),
            )
            self.out = nn.Conv2d(width, 1 + len(things()) + len(ALL_COLOURS), 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(pictures))


def build_judge() -> Detector:
    return Detector(width=128, depth=5, seed=1)


def build_rater() -> Detector:
    return Detector(width=96, depth=6, seed=2)


def targets(scenes: Sequence[Sequence[Placed]]) -> torch.Tensor:
    """(N, 5) int64: picture, row, column, thing and colour of every thing of some scenes."""
    rows = [
        (n, int(p.y // STRIDE), int(p.x // STRIDE), p.thing, ALL_COLOURS.index(p.colour))
        for n, scene in enumerate(scenes)
        for p in scene
    ]
    return torch.tensor(rows)


def detection_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The loss of logits (B, 1 + things + colours, h, w) for the rows of `targets`."""
    n, y, x, thing, colour = wanted.to(logits.device).unbind(1)
    centre = torch.zeros_like(logits[:, 0])
    centre[n, y, x] = 1.0
    weight = 1 + (POSITIVE - 1) * centre
    found = F.binary_cross_entropy_with_logits(logits[:, 0], centre, weight)
    at = logits[n, :, y, x]
    which, tint = at[:, 1 : 1 + len(things())], at[:, 1 + len(things()) :]
    return CENTRE_WEIGHT * found + F.cross_entropy(which, thing) + F.cross_entropy(tint, colour)


def augmented(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Gains and offsets of the channels, blur and noise: (B, 3, H, W) -> the same."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pictures), *shape, generator=rng, device=rng.device)

    out = (pictures - 1) * uniform(0.85, 1.1, 3, 1, 1) + 1 + uniform(-0.06, 0.06, 3, 1, 1)
    out = torch.lerp(out, F.avg_pool2d(out, 5, 1, 2, count_include_pad=False), uniform(0, 0.9, 1, 1, 1))
    noise = torch.randn(out.shape, generator=rng, device=rng.device)
    return (out + uniform(0, 0.12, 1, 1, 1) * noise).clamp(-1, 1)


@dataclasses.dataclass(frozen=True)
class Opinion:
    """What a detector saw, and how many errors that is."""

    seen: tuple[Seen, ...]
    errors: float


@torch.no_grad()
def detect(detector: Detector, pictures: torch.Tensor) -> list[tuple[Seen, ...]]:
    """What each of the pictures (B, 3, H, W) in [-1, 1] shows: cells more likely a centre than not and than
    any cell within two of them.
    """
    logits = detector(pictures.contiguous(memory_format=torch.channels_last)).float().cpu()
    centre = logits[:, 0].sigmoid()
    peak = (centre == F.max_pool2d(centre[:, None], 5, 1, 2)[:, 0]) & (centre > FOUND)
    which = logits[:, 1 : 1 + len(things())].argmax(1)
    tint = logits[:, 1 + len(things()) :].argmax(1)
    found: list[list[Seen]] = [[] for _ in pictures]
    for n, y, x in peak.nonzero().tolist():
        middle = ((x + 0.5) * STRIDE, (y + 0.5) * STRIDE)
        found[n].append(Seen(int(which[n, y, x]), ALL_COLOURS[int(tint[n, y, x])], *middle))
    return [tuple(seen) for seen in found]


def opinions(
    detector: Detector, pictures: np.ndarray, captions: Sequence[Caption], batch: int = 128
) -> list[Opinion]:
    """What a detector thinks of pictures (N, H, W, 3) uint8 of these captions."""
    where = next(detector.parameters()).device
    seen: list[tuple[Seen, ...]] = []
    for first in range(0, len(pictures), batch):
        part = torch.from_numpy(np.ascontiguousarray(pictures[first : first + batch])).to(where)
        seen += detect(detector, part.permute(0, 3, 1, 2).float().div(127.5).sub(1))
    return [Opinion(s, errors(caption, s)) for s, caption in zip(seen, captions, strict=True)]
