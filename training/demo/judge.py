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

from drm.ranges import Count
from training.config import argument
from training.demo import data
from training.demo.autoencoder import to_float
from training.demo.classifier import Icons, Residual, accuracy, shrink, train_classifier

WIDTHS = (32, 64, 96, 192)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/judge"))
    parser.add_argument("--steps", type=argument(Count), default=3000)
    parser.add_argument("--batch", type=argument(Count), default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    demo = data.load(args.data)
    icons = Icons.of(demo)
    judge = Judge(len(demo.names))
    averaged, figures = train_classifier(
        judge, icons, args.out, name="judge", steps=args.steps, batch=args.batch, seed=0
    )
    figures["train_accuracy"] = accuracy(averaged, icons, ~icons.held_out)
    state = averaged.state_dict()
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    header = {"format": "drm-demo-judge", "concepts": json.dumps(demo.names), "figures": json.dumps(figures)}
    save_file(weights, args.out / "judge.safetensors", metadata=header)
    print(f"judge -> {args.out / 'judge.safetensors'}")


if __name__ == "__main__":
    main()
