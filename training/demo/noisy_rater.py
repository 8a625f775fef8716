"""The rater that sees what a reward model sees: noisy latents. Which concept will this be?

    python -m training.demo.noisy_rater --generator runs/demo/generator --out runs/demo/raters

A convolutional classifier of the latents at any noise, taught by the raters of training.demo.raters, who see
clean pictures:

    loss = cross entropy of softmax(SHARPNESS * utility) with softmax(logits(x_sigma, sigma))

so its log p is what can be known of a picture's concept under the noise. It says of two candidates in the
middle of a path, with noise of their own, which is the more promising; the raters cannot. What benchmarks ask
for is kept from it as it is from reward models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from drm import flow
from drm.ranges import Count
from training.config import argument
from training.demo import data
from training.demo.classifier import Residual
from training.demo.loop import LoopConfig, bfloat16_autocast, train
from training.demo.pairs import Pool, make_pool
from training.demo.rated import FREE, SHARPNESS

FILE = "noisy.safetensors"
WIDTHS = (128, 192, 256)
# Surer than this it need not be that a picture is something else.
FLOOR = -7.0
# families of what it learns from and how many of each are in a batch
BATCH = {"augmented": 53, "mixed": 10, "drawn": 10, "loose": 10, **dict.fromkeys(FREE, 4)}


class NoisyRater(nn.Module):
    """Latents (B, 16, H, W) in model space at noise sigma (B,) -> logits (B, concepts)."""

    def __init__(self, concepts: int, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels + 1, WIDTHS[0], 3, 1, 1, bias=False)
        strides = ((WIDTHS[0], 1), (WIDTHS[0], 2), (WIDTHS[1], 2))
        self.blocks = nn.Sequential(
            *(
                Residual(before, width, stride)
                for (before, stride), width in zip(strides, WIDTHS, strict=True)
            )
        )
        self.out = nn.Linear(WIDTHS[-1], concepts)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = sigma.reshape(-1, 1, 1, 1).expand(-1, 1, *latents.shape[2:])
        seen = torch.cat([latents, level], 1).contiguous(memory_format=torch.channels_last)
        return self.out(self.blocks(F.relu(self.stem(seen))).mean((2, 3)))


@torch.no_grad()
def opinions(rater: NoisyRater, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Its log p of every concept (B, concepts), no less than FLOOR."""
    with bfloat16_autocast(latents.device):
        logits = rater(latents, sigma)
    return logits.float().log_softmax(-1).clamp_min(FLOOR)


def load_noisy_rater(folder: Path) -> NoisyRater:
    """The noisy rater of a folder, in eval mode."""
    weights = load_file(folder / FILE)
    rater = NoisyRater(len(weights["out.bias"])).to(memory_format=torch.channels_last)
    rater.load_state_dict(weights)
    return rater.requires_grad_(False).eval()


def draw_batch(pool: Pool, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, ...) of every family in the numbers of BATCH, moved by a cell at most, and what the raters
    think of them (B, concepts).
    """
    rated, found = pool.rated, []
    for family, count in BATCH.items():
        places = rated.families[family]
        if family not in FREE:
            places = places[pool.prompted[rated.owner[places]]]
        found.append(places[torch.randint(len(places), (count,), generator=rng)])
    places = torch.cat(found)
    rows, columns = torch.randint(-1, 2, (2,), generator=rng).tolist()
    return rated.latents[places].float().roll((rows, columns), (2, 3)), rated.utility[places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/raters"))
    parser.add_argument("--steps", type=argument(Count), default=2400)
    args = parser.parse_args()

    torch.manual_seed(0)
    pool = make_pool(args.generator, args.data, args.autoencoder)
    rater = NoisyRater(int(pool.concept.max()) + 1).to(memory_format=torch.channels_last)

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        latents, utility = draw_batch(pool, rng)
        sigma = torch.rand(len(latents), generator=rng)
        noisy = flow.add_noise(latents, torch.randn(latents.shape, generator=rng), sigma)
        with bfloat16_autocast(noisy.device):
            logits = rater(noisy, sigma).float()
        wanted = (SHARPNESS * utility).softmax(-1)
        right = (logits.argmax(1) == utility.argmax(1)).float().mean().item()
        return -(wanted * logits.log_softmax(-1)).sum(-1).mean(), {"agrees": right}

    icons = data.indices(pool.tested)
    figures: dict[str, float] = {}

    def on_save(step: int, averaged: nn.Module) -> None:
        # The loop averages parameters; batch norm's statistics are buffers.
        averaged.load_state_dict(dict(rater.named_buffers()), strict=False)
        rng = torch.Generator().manual_seed(1)
        for level in (0.05, 0.4, 0.8):
            sigma = torch.full((len(icons),), level)
            real = pool.real[icons]
            noisy = flow.add_noise(real, torch.randn(real.shape, generator=rng), sigma)
            named = opinions(averaged, noisy, sigma).argmax(1) == pool.concept[icons]
            figures[f"held_out_accuracy_{level}"] = named.float().mean().item()
        print(f"\nnoisy rater, step {step}: {figures}", flush=True)

    config = LoopConfig(
        steps=args.steps, learning_rate=2e-3, decay=0.01, weight_decay=0.05, ema=0.99, save_every=400
    )
    averaged = train(rater, loss_fn, config, args.out, name="noisy", on_save=on_save)
    weights = {key: value.contiguous() for key, value in averaged.state_dict().items()}
    save_file(weights, args.out / FILE)
    (args.out / "noisy.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
