"""The demo reward model: the generator cut off before its last block, a head, and Bradley-Terry on
training.demo.comparisons.

    python -m training.demo.reward --generator runs/demo/generator --out runs/demo/reward
    python -m training.demo.reward --random-backbone --out runs/demo/reward_random      # the ablation, equal
    steps

    loss = mean of -log sigmoid(s(ahead) - s(behind)), weighed by its probability, over comparisons
           + NAMING * cross entropy of the concept read off the image tokens with the noisy rater's opinion

The names are read by a linear layer that is left behind: it makes the tokens know what is drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from drm import DRM, flow, load_drm, preference, save_drm
from drm.backbone import TruncatedSD3, backbone_from_transformer
from drm.head import ConvHead
from drm.ranges import Count, CountOrNone, Range, Seed
from training.config import argument
from training.demo import data, text
from training.demo.comparisons import (
    Comparisons,
    draw_crossed,
    draw_pairs,
    noised,
    rated_under_noise,
    together,
)
from training.demo.generator import load_generator
from training.demo.loop import LoopConfig, bfloat16_autocast, train
from training.demo.noisy_rater import load_noisy_rater
from training.demo.pairs import Pool, make_pool, pairs

KEPT, COARSE = 3, 2
Pairs = Annotated[int, Range(22, 22_000, multiple=22)]
Blocks = Annotated[int, Range(1, 4)]
HIDDEN = 128
# The weight of naming the concept beside the comparisons.
NAMING = 0.5
REPORTED = (
    "wrong concept",
    "wrong style",
    "degraded",
    "generated early",
    "generated final",
    "drawn",
    "preferred",
)
# Pairs of two drawings are reported where the raters are this sure.
SURE = 0.75


def build_drm(generator_folder: Path, kept: int, coarse: int, *, random_backbone: bool) -> DRM:
    """The generator's first `kept` blocks on tokens `coarse` times the side (or fresh weights of that shape)
    under a fresh head.
    """
    generator, _ = load_generator(generator_folder)
    backbone = backbone_from_transformer(generator.transformer, kept, coarse=coarse)
    if random_backbone:
        backbone = TruncatedSD3(backbone.config)
    return DRM(backbone.requires_grad_(True), ConvHead(backbone.config.width, HIDDEN))


def score_pair(
    drm: DRM, chosen, rejected, sigma, prompt_embeds, pooled, rng
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of both sides of each pair under one noise and one sigma: twice (B,)."""
    noise = torch.randn(chosen.shape, generator=rng)
    both = torch.cat([flow.add_noise(chosen, noise, sigma), flow.add_noise(rejected, noise, sigma)])
    with bfloat16_autocast(both.device):
        scores = drm(both, sigma.repeat(2), prompt_embeds.repeat(2, 1, 1), pooled.repeat(2, 1))
    return scores.float().chunk(2)


@torch.no_grad()
def evaluate(drm: DRM, pool: Pool, embed, *, rounds: int = 2) -> dict[str, list[float]]:
    """Accuracy on the captions kept aside by kind of pair, in the four quarters of sigma from low to high."""
    icons, everything = data.indices(pool.tested), torch.ones_like(pool.tested)
    table: dict[str, list[float]] = {}
    for seed, kind in enumerate(REPORTED):
        rng = torch.Generator().manual_seed(seed)
        wins, losses, sigmas = [], [], []
        for quarter in range(4):
            for _ in range(rounds):
                chosen, rejected, label = pairs(pool, icons, kind, everything, rng)
                sigma = (quarter + torch.rand(len(icons), generator=rng)) / 4
                sides = score_pair(drm, chosen, rejected, sigma, *embed(icons), rng)
                sure = label >= SURE
                wins.append(sides[0][sure])
                losses.append(sides[1][sure])
                sigmas.append(sigma[sure])
        table[kind] = preference.accuracy_by_sigma(torch.cat(wins), torch.cat(losses), torch.cat(sigmas))
    return table


@torch.no_grad()
def calibrate(drm: DRM, pool: Pool, embed) -> dict[str, list[float]]:
    """Mean and std of the scores of real held-out icons by sigma, for the file's header."""
    icons = data.indices(pool.tested)
    rng = torch.Generator().manual_seed(99)
    scores, sigmas = [], []
    for _ in range(8):
        sigma = torch.rand(len(icons), generator=rng)
        noisy = flow.add_noise(pool.real[icons], torch.randn(pool.real[icons].shape, generator=rng), sigma)
        scores.append(drm.score(noisy, sigma, *embed(icons)))
        sigmas.append(sigma)
    return preference.calibration(torch.cat(scores), torch.cat(sigmas))


class Learner(nn.Module):
    """The reward model and, while it learns, a linear reading of the concepts off its image tokens: (R,)
    scores and (R, concepts) logits.
    """

    def __init__(self, drm: DRM, concepts: int) -> None:
        super().__init__()
        self.drm = drm
        width = drm.backbone.config.width
        self.names = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, concepts))

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        drm, grid = self.drm, self.drm.backbone.token_grid(*latents.shape[-2:])
        tokens = drm.backbone(latents, 1000 * sigma, embeds, pooled)
        return drm.head(tokens, *grid), self.names(tokens.mean(1))


def figures_of(margin: torch.Tensor, batch: Comparisons, named: torch.Tensor) -> dict[str, float]:
    """What a step logs: how often pairs whose better picture is known, and the others, are told apart, and
    how often the concept is named right.
    """
    right = ((margin > 0) == (batch.label >= 0.5)).float()
    known = batch.known[batch.ahead]
    return {
        "known": right[known].mean().item(),
        "rated": right[~known].mean().item(),
        "named": named.float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--raters", type=Path, default=Path("runs/demo/raters"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/reward"))
    parser.add_argument("--steps", type=argument(Count), default=2000)
    parser.add_argument("--batch", type=argument(Pairs), default=22, help="pairs a step, a multiple of 22")
    parser.add_argument(
        "--crossed", type=argument(CountOrNone), default=5, help="two pictures with two captions, a step"
    )
    parser.add_argument("--start", type=Path, help="a reward model's file to go on from")
    parser.add_argument(
        "--kept", type=argument(Blocks), default=KEPT, help="blocks kept of the generator's four"
    )
    parser.add_argument(
        "--coarse", type=argument(Count), default=COARSE, help="side of a token over the generator's"
    )
    parser.add_argument("--seed", type=argument(Seed), default=0)
    parser.add_argument("--random-backbone", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    # Weights that die leave gradients too small for a normal float, and each costs a CPU 100 cycles: a step
    # once took 14 s in place of 0.5. Threads take the setting over when they start, so it comes first.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    demo = data.load(args.data)
    pool = make_pool(args.generator, args.data, args.autoencoder)
    rater = load_noisy_rater(args.raters)
    generator, tokenizer = load_generator(args.generator)
    drm = build_drm(args.generator, args.kept, args.coarse, random_backbone=args.random_backbone)
    if args.start:
        drm.load_state_dict(load_drm(args.start).state_dict())
    learner = Learner(drm, len(demo.names))
    compiled = torch.compile(learner) if args.compile else learner

    def embed_ids(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return text.embed(generator.text_encoder, text.encode_ids(tokenizer, captions))

    def captions_of(icons: torch.Tensor) -> list[str]:
        return [f"{demo.words[pool.concept[i]][0]}, {data.STYLES[pool.style[i]]} style" for i in icons]

    def embed_icons(icons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return embed_ids(captions_of(icons))

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        batch = together(draw_pairs(demo, pool, args.batch, rng), draw_crossed(demo, pool, args.crossed, rng))
        noisy, sigma = noised(batch, rng)
        batch, opinion = rated_under_noise(batch, noisy, sigma, rater)
        with bfloat16_autocast(noisy.device):
            scores, names = compiled(noisy, sigma, *embed_ids(batch.captions))
        win, lose = scores.float()[batch.ahead], scores.float()[batch.behind]
        loss = preference.bradley_terry_loss(win, lose, label=batch.label)
        naming = -(opinion.exp() * names.float().log_softmax(-1)).sum(-1).mean()
        named = names.argmax(1) == opinion.argmax(1)
        return loss + NAMING * naming, figures_of((win - lose).detach(), batch, named)

    table: dict[str, list[float]] = {}

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        table.update(evaluate(averaged.drm, pool, embed_icons))
        rows = "  ".join(f"{kind} {' / '.join(f'{a:.3f}' for a in row)}" for kind, row in table.items())
        print(f"\nstep {step}: {rows}", flush=True)

    config = LoopConfig(
        steps=args.steps,
        learning_rate=4e-4,
        decay=0.02,
        weight_decay=0.01,
        ema=0.995,
        save_every=500,
        seed=args.seed,
    )
    averaged = train(learner, loss_fn, config, args.out, name="reward", on_save=on_save).drm
    (args.out / "accuracy.json").write_text(
        json.dumps({"steps": args.steps, "pairs": args.steps * args.batch, "accuracy": table})
    )
    facts = {
        "name": "DRM demo, emoji",
        "text_length": text.LENGTH,
        "calibration": calibrate(averaged, pool, embed_icons),
        "accuracy": table,
        "pairs": args.steps * args.batch,
        "license": data.LICENCE,
    }
    save_drm(averaged, args.out / "reward.safetensors", metadata=facts, dtype=torch.float16)
    print(f"reward model -> {args.out / 'reward.safetensors'}")


if __name__ == "__main__":
    main()
