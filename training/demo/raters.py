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

from training.demo import data
from training.demo.autoencoder import to_float
from training.demo.judge import Residual, augment, shrink
from training.loop import LoopConfig, bfloat16_autocast, train

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


def train_rater(name: str, demo: data.DemoData, out: Path, steps: int, batch: int) -> dict[str, float]:
    """One rater's training; its file is <name>.safetensors. Returns its figures."""
    seed = 101 + NAMES.index(name)
    torch.manual_seed(seed)
    icons = np.flatnonzero(demo.concept >= 0)
    pictures = torch.cat([shrink(to_float(part)) for part in np.array_split(demo.images[icons], 16)])
    labels, held_out = torch.from_numpy(demo.concept[icons]), torch.from_numpy(demo.held_out[icons])
    pool = data.indices(~held_out)
    rater = build_rater(name, len(demo.names)).to(memory_format=torch.channels_last)

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        picked = pool[torch.randint(len(pool), (batch,), generator=rng)]
        seen = augment(pictures[picked], rng).contiguous(memory_format=torch.channels_last)
        with bfloat16_autocast(seen.device):
            logits = rater(seen)
        right = (logits.argmax(1) == labels[picked]).float().mean().item()
        return F.cross_entropy(logits.float(), labels[picked], label_smoothing=0.05), {"accuracy": right}

    figures: dict[str, float] = {}

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        buffers = {k: v for k, v in rater.state_dict().items() if "running" in k or "num_batches" in k}
        averaged.load_state_dict(buffers, strict=False)
        with torch.no_grad():
            right = averaged(pictures[held_out]).argmax(1) == labels[held_out]
        figures.update(step=step, held_out_accuracy=right.float().mean().item())
        print(f"\n{name}, step {step}: {figures}", flush=True)

    config = LoopConfig(
        steps=steps,
        learning_rate=2e-3,
        decay=0.01,
        weight_decay=0.05,
        ema=0.99,
        save_every=500,
        seed=seed,
    )
    averaged = train(rater, loss_fn, config, out, name=name, on_save=on_save)
    weights = {key: value.contiguous() for key, value in averaged.state_dict().items()}
    save_file(weights, out / f"{name}.safetensors")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/raters"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", choices=NAMES, nargs="*", default=list(NAMES))
    args = parser.parse_args()
    demo = data.load(args.data)
    for name in args.only:
        figures = train_rater(name, demo, args.out, args.steps, args.batch)
        (args.out / f"{name}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
