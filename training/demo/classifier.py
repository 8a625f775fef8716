"""What judge and raters share: real pictures and the concepts they show, and how a classifier learns to name
them.

    loss = cross entropy of logits(augmented picture) with the concept, labels smoothed by 0.05
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training.demo.autoencoder import to_float
from training.demo.data import DemoData, indices
from training.demo.loop import LoopConfig, bfloat16_autocast, train

PIXELS = 64


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; the first may halve the resolution."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = (
            nn.Conv2d(width_in, width, 1, stride, bias=False)
            if stride > 1 or width_in != width
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(hidden + self.skip(x))


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, 64, 64)."""
    return F.interpolate(pictures, size=(PIXELS, PIXELS), mode="bilinear", antialias=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Icons:
    """Real pictures (N, 3, 64, 64) in [-1, 1], their concepts (N,) and which are held out (N,)."""

    pictures: torch.Tensor
    concept: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def of(cls, demo: DemoData) -> Icons:
        rows = np.flatnonzero(demo.concept >= 0)
        return cls(
            pictures=torch.cat([shrink(to_float(part)) for part in np.array_split(demo.images[rows], 16)]),
            concept=torch.from_numpy(demo.concept[rows]),
            held_out=torch.from_numpy(demo.held_out[rows]),
        )


def augment(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random affine, gains and offsets of the channels, blur, noise and a grey patch: (B, 3, H, W) -> the
    same.
    """
    batch = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=rng)

    angle, scale = uniform(-0.3, 0.3), uniform(0.85, 1.3)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    rows = torch.stack([cos * flip, -sin, uniform(-0.15, 0.15), sin * flip, cos, uniform(-0.15, 0.15)], 1)
    where = F.affine_grid(rows.reshape(batch, 2, 3), list(pictures.shape), align_corners=False)
    out = F.grid_sample(pictures - 1, where, align_corners=False) + 1  # outside the icon is white
    out = out * uniform(0.7, 1.1, 3, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)
    blurred = F.avg_pool2d(out, 3, 1, 1)
    out = torch.lerp(out, blurred, uniform(0, 1, 1, 1, 1))
    out = out + uniform(0, 0.15, 1, 1, 1) * torch.randn(out.shape, generator=rng)
    grid = torch.arange(pictures.shape[-1]) / pictures.shape[-1]
    top, left, size = uniform(0, 1, 1), uniform(0, 1, 1), uniform(0, 0.35, 1)
    hole = ((grid > top) & (grid < top + size))[:, :, None] & ((grid > left) & (grid < left + size))[
        :, None, :
    ]
    return out.masked_fill(hole[:, None], 0.0)


@torch.no_grad()
def accuracy(classifier: nn.Module, icons: Icons, mask: torch.Tensor) -> float:
    """The share of the icons under the mask (N,) that the classifier names right."""
    right = classifier(icons.pictures[mask]).argmax(1) == icons.concept[mask]
    return right.float().mean().item()


def train_classifier(
    classifier: nn.Module, icons: Icons, out: Path, *, name: str, steps: int, batch: int, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """Train on the icons that are not held out; the averaged copy and its held-out figures."""
    classifier = classifier.to(memory_format=torch.channels_last)
    pool = indices(~icons.held_out)

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        picked = pool[torch.randint(len(pool), (batch,), generator=rng)]
        seen = augment(icons.pictures[picked], rng).contiguous(memory_format=torch.channels_last)
        with bfloat16_autocast(seen.device):
            logits = classifier(seen)
        concept = icons.concept[picked]
        right = (logits.argmax(1) == concept).float().mean().item()
        return F.cross_entropy(logits.float(), concept, label_smoothing=0.05), {"accuracy": right}

    figures: dict[str, float] = {}

    def on_save(step: int, averaged: nn.Module) -> None:
        # The loop averages parameters; batch norm's statistics are buffers.
        averaged.load_state_dict(dict(classifier.named_buffers()), strict=False)
        figures.update(step=step, held_out_accuracy=accuracy(averaged, icons, icons.held_out))
        print(f"\n{name}, step {step}: {figures}", flush=True)

    config = LoopConfig(
        steps=steps, learning_rate=2e-3, decay=0.01, weight_decay=0.05, ema=0.99, save_every=500, seed=seed
    )
    return train(classifier, loss_fn, config, out, name=name, on_save=on_save), figures
