"""The independent judge: which of the concepts is this picture? A classifier trained from scratch on real
pictures only.

    python -m training.demo.judge --data runs/demo/data --out runs/demo/judge

It shares neither weights, nor latents, nor training pairs with the generator or the reward model; it looks at
pixels (64 x 64) and reports the probability and rank of the concept that was asked for. Heavy augmentation
keeps it from knowing the icons by heart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from training.demo import data
from training.demo.autoencoder import to_float
from training.loop import LoopConfig, bfloat16_autocast, train

WIDTHS = (32, 64, 96, 192)
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


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, concepts)."""

    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*(Residual(WIDTHS[max(0, i - 1)], w, 2) for i, w in enumerate(WIDTHS)))
        self.out = nn.Linear(WIDTHS[-1], concepts)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, 192), what pictures look like to the judge."""
        return self.blocks(F.relu(self.stem(pictures))).mean((2, 3))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.out(self.features(pictures))


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, 64, 64)."""
    return F.interpolate(pictures, size=(PIXELS, PIXELS), mode="bilinear", antialias=True)


def load_judge(path: Path) -> tuple[Judge, list[str]]:
    """The judge of a file and the concepts its logits stand for."""
    with safe_open(path, "pt") as file:
        concepts = json.loads(file.metadata()["concepts"])
    judge = Judge(len(concepts))
    judge.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=False)
    return judge.requires_grad_(False).eval(), concepts


@torch.no_grad()
def judge_pictures(
    judge: Judge, pictures: np.ndarray, asked: torch.Tensor, batch: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, H, W, 3) uint8 pictures and the concepts asked for (N,) -> (probability (N,), rank (N,) from 1)."""
    parts = [judge(shrink(to_float(pictures[i : i + batch]))) for i in range(0, len(pictures), batch)]
    probabilities = torch.cat(parts).softmax(-1)
    found = probabilities.gather(1, asked[:, None])
    return found[:, 0], (probabilities > found).sum(1) + 1


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
    grid = torch.arange(PIXELS) / PIXELS
    top, left, size = uniform(0, 1, 1), uniform(0, 1, 1), uniform(0, 0.35, 1)
    hole = ((grid > top) & (grid < top + size))[:, :, None] & ((grid > left) & (grid < left + size))[
        :, None, :
    ]
    return out.masked_fill(hole[:, None], 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/judge"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    demo = data.load(args.data)
    icons = np.flatnonzero(demo.concept >= 0)
    pictures = torch.cat([shrink(to_float(part)) for part in np.array_split(demo.images[icons], 16)])
    labels, held_out = torch.from_numpy(demo.concept[icons]), torch.from_numpy(demo.held_out[icons])
    pool = data.indices(~held_out)
    judge = Judge(len(demo.names)).to(memory_format=torch.channels_last)

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        picked = pool[torch.randint(len(pool), (args.batch,), generator=rng)]
        batch = augment(pictures[picked], rng).contiguous(memory_format=torch.channels_last)
        with bfloat16_autocast(batch.device):
            logits = judge(batch)
        right = (logits.argmax(1) == labels[picked]).float().mean().item()
        return F.cross_entropy(logits.float(), labels[picked], label_smoothing=0.05), {"accuracy": right}

    figures: dict[str, float] = {}

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        # batch norm's statistics are buffers: the averaged weights need their own
        averaged.load_state_dict(
            {k: v for k, v in judge.state_dict().items() if "running" in k or "num_batches" in k},
            strict=False,
        )
        with torch.no_grad():
            right = averaged(pictures[held_out]).argmax(1) == labels[held_out]
            seen = averaged(pictures[pool]).argmax(1) == labels[pool]
        figures.update(
            step=step,
            held_out_accuracy=right.float().mean().item(),
            train_accuracy=seen.float().mean().item(),
        )
        print(f"\nstep {step}: {figures}", flush=True)

    config = LoopConfig(
        steps=args.steps, learning_rate=2e-3, decay=0.01, weight_decay=0.05, ema=0.99, save_every=500
    )
    averaged = train(judge, loss_fn, config, args.out, name="judge", on_save=on_save)
    state = averaged.state_dict()
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    header = {"format": "drm-demo-judge", "concepts": json.dumps(demo.names), "figures": json.dumps(figures)}
    save_file(weights, args.out / "judge.safetensors", metadata=header)
    print(f"judge -> {args.out / 'judge.safetensors'}")


if __name__ == "__main__":
    main()
