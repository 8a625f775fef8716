"""The demo reward model: the generator cut off before its last block, a head after each block that is left,
and Bradley-Terry on the pairs of training.demo.pairs.

    python -m training.demo.reward --generator runs/demo/generator --out runs/demo/reward
    python -m training.demo.reward --random-backbone --out runs/demo/reward_random      # the ablation, equal
    steps

Both pictures of a pair get the same noise at the same sigma, uniform in (0, 1). Every head learns from every
pair; a head further forward is what the sampler reads to stop early.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from drm import DRM, flow, load_drm, preference, save_drm, stepwise
from drm.backbone import TruncatedSD3, backbone_from_transformer
from drm.head import ConvHead
from training.demo import data, text
from training.demo.generator import (
    SHIFT,
    Generator,
    guided_denoise,
    initial_noise,
    load_generator,
)
from training.demo.pairs import Pool, ask, make_pool, pairs
from training.demo.rated import FREE, SHARPNESS, crossed
from training.loop import LoopConfig, bfloat16_autocast, train

KEPT, COARSE = 3, 2
HIDDEN = 128
# Of every 24 pairs so many are of each kind: half are two drawings of a caption without a style.
MIX = {
    "wrong": 2,
    "degraded": 3,
    "generated early": 1,
    "drawn": 1,
    "augmented": 1,
    "mixed": 1,
    "preferred": 1,
    "loose": 2,
    **dict.fromkeys(FREE, 3),
}
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
    under fresh heads.
    """
    generator, _ = load_generator(generator_folder)
    backbone = backbone_from_transformer(generator.transformer, kept, coarse=coarse)
    if random_backbone:
        backbone = TruncatedSD3(backbone.config)
    width = backbone.config.width
    early = {depth: ConvHead(width, HIDDEN) for depth in range(1, kept)}
    return DRM(backbone.requires_grad_(True), ConvHead(width, HIDDEN), early_heads=early)


def score_pair(
    forward, chosen, rejected, sigma, prompt_embeds, pooled, rng
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of both sides of each pair under one noise and one sigma: twice (B,) or (B, depths)."""
    noise = torch.randn(chosen.shape, generator=rng)
    both = torch.cat([flow.add_noise(chosen, noise, sigma), flow.add_noise(rejected, noise, sigma)])
    with bfloat16_autocast(both.device):
        scores = forward(both, sigma.repeat(2), prompt_embeds.repeat(2, 1, 1), pooled.repeat(2, 1))
    return scores.float().chunk(2)


@torch.no_grad()
def evaluate(drm: DRM, pool: Pool, embed, *, rounds: int = 2) -> dict[int, dict[str, list[float]]]:
    """Accuracy on the captions kept aside by depth and kind of pair, in the four quarters of sigma from low
    to high.
    """
    icons, everything = data.indices(pool.tested), torch.ones_like(pool.tested)
    tables: dict[int, dict[str, list[float]]] = {depth: {} for depth in drm.depths}
    for seed, kind in enumerate(REPORTED):
        rng = torch.Generator().manual_seed(seed)
        wins, losses, sigmas = [], [], []
        for quarter in range(4):
            for _ in range(rounds):
                chosen, rejected, label = pairs(pool, icons, kind, everything, rng)
                sigma = (quarter + torch.rand(len(icons), generator=rng)) / 4
                sides = score_pair(drm.forward_depths, chosen, rejected, sigma, *embed(icons), rng)
                sure = label >= SURE
                wins.append(sides[0][sure])
                losses.append(sides[1][sure])
                sigmas.append(sigma[sure])
        for depth, win, lose in zip(drm.depths, torch.cat(wins).T, torch.cat(losses).T, strict=True):
            tables[depth][kind] = preference.accuracy_by_sigma(win, lose, torch.cat(sigmas))
    return tables


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


@torch.no_grad()
def sibling_scores(
    drm: DRM, generator: Generator, tokenizer: Tokenizer, captions: list[str], *, k: int = 4, steps: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (n, k, depths) of siblings on the paths a sampler takes, and their sigmas (n,)."""
    embeds, pooled = text.embed(generator.text_encoder, text.encode_ids(tokenizer, captions))
    found, sigmas = [], []

    def score(candidates: torch.Tensor, sigma: float, item: torch.Tensor) -> torch.Tensor:
        with bfloat16_autocast(candidates.device):
            by_depth = drm.forward_depths(candidates, sigma, embeds[item], pooled[item]).float()
        found.append(by_depth.reshape(-1, k, by_depth.shape[-1]))
        sigmas.append(torch.full((len(found[-1]),), sigma))
        return by_depth[:, -1]

    stepwise.sample_stepwise(
        guided_denoise(generator, tokenizer, captions, 1.5),
        score,
        initial_noise([70_000 + i for i in range(len(captions))]),
        flow.schedule(steps, SHIFT),
        num_branches=k,
        seed=7,
        chunk_size=len(captions) * k,
    )
    return torch.cat(found), torch.cat(sigmas)


def decisive_leads(drm: DRM, scores: torch.Tensor, sigmas: torch.Tensor) -> dict[str, dict]:
    """For each early depth, how far behind a sibling must be to be given up there, by sigma."""
    return {
        str(depth): preference.decisive_lead(scores[..., place], scores[..., -1], sigmas)
        for place, depth in enumerate(drm.depths[:-1])
    }


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Rows to score, latents (R, ...) with a caption each, and what is known of them: that row `ahead` (P,)
    is better than row `behind` (P,) has probability label (P,). Rows of one group (R,) share noise and sigma.
    """

    latents: torch.Tensor
    captions: list[str]
    group: torch.Tensor
    ahead: torch.Tensor
    behind: torch.Tensor
    label: torch.Tensor


def caption_of(demo: data.DemoData, pool: Pool, icon: int, rng: torch.Generator, *, styled: bool) -> str:
    """A caption a person might write for this icon."""
    words, style = demo.words[pool.concept[icon]], int(pool.style[icon])
    return text.random_caption(words, style, rng, empty=0.0, unstyled=float(not styled))


def draw_pairs(demo: data.DemoData, pool: Pool, size: int, rng: torch.Generator) -> Comparisons:
    """Pairs of two pictures under one caption, the kinds in the shares of MIX."""
    chosen, rejected, labels, captions = [], [], [], []
    for kind, share in MIX.items():
        icons, allowed = ask(pool, kind, round(share * size / sum(MIX.values())), rng)
        better, worse, label = pairs(pool, icons, kind, allowed, rng)
        chosen.append(better)
        rejected.append(worse)
        labels.append(label)
        captions += [caption_of(demo, pool, i, rng, styled=kind not in FREE) for i in icons.tolist()]
    count = len(captions)
    first, second = torch.arange(count), torch.arange(count, 2 * count)
    return Comparisons(
        torch.cat([*chosen, *rejected]),
        captions * 2,
        torch.arange(count).repeat(2),
        first,
        second,
        torch.cat(labels),
    )


def draw_crossed(demo: data.DemoData, pool: Pool, count: int, rng: torch.Generator) -> Comparisons:
    """Two pictures under two captions, four rows each: which picture suits a caption better, and which
    caption a picture.
    """
    places, icons, utility = crossed(pool.rated, pool.concept, pool.style, count, pool.prompted, rng)
    named = [[caption_of(demo, pool, i, rng, styled=True) for i in both] for both in icons.tolist()]
    row = torch.arange(4 * count).reshape(count, 2, 2)  # picture, caption
    matched = torch.stack([row[:, 0, 0], row[:, 1, 1]], 1).repeat(1, 2).flatten()
    crosswise = torch.stack([row[:, 1, 0], row[:, 0, 1], row[:, 0, 1], row[:, 1, 0]], 1).flatten()
    gap = utility.flatten()[matched] - utility.flatten()[crosswise]
    return Comparisons(
        pool.rated.latents[places].float().repeat_interleave(2, 1).flatten(0, 1),
        [caption for both in named for caption in both * 2],
        torch.arange(count).repeat_interleave(4),
        matched,
        crosswise,
        (SHARPNESS * gap).sigmoid(),
    )


def together(one: Comparisons, other: Comparisons) -> Comparisons:
    """Both in one batch."""
    rows, groups = len(one.captions), int(one.group.max()) + 1
    return Comparisons(
        torch.cat([one.latents, other.latents]),
        one.captions + other.captions,
        torch.cat([one.group, other.group + groups]),
        torch.cat([one.ahead, other.ahead + rows]),
        torch.cat([one.behind, other.behind + rows]),
        torch.cat([one.label, other.label]),
    )


def noised(batch: Comparisons, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' latents under noise, and sigma (R,), uniform in (0, 1)."""
    groups = int(batch.group.max()) + 1
    noise = torch.randn(groups, *batch.latents.shape[1:], generator=rng)[batch.group]
    sigma = torch.rand(groups, generator=rng)[batch.group]
    return flow.add_noise(batch.latents, noise, sigma), sigma


def figures_of(margin: torch.Tensor, label: torch.Tensor, paired: int) -> dict[str, float]:
    """What a step logs: how often pairs, crossed pictures with captions, and the raters' favourites among the
    drawings of captions without a style are told apart.
    """
    right = ((margin > 0) == (label >= 0.5)).float()
    free = slice(paired - sum(MIX[kind] for kind in FREE) * paired // sum(MIX.values()), paired)
    return {
        "accuracy": right[:paired].mean().item(),
        "crossed": right[paired:].mean().item(),
        "free": right[free].mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/reward"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24, help="pairs a step, a multiple of 24")
    parser.add_argument("--crossed", type=int, default=4, help="two pictures with two captions, a step")
    parser.add_argument("--start", type=Path, help="a reward model's file to go on from")
    parser.add_argument("--kept", type=int, default=KEPT, help="blocks kept of the generator's four")
    parser.add_argument("--coarse", type=int, default=COARSE, help="side of a token over the generator's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-backbone", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    # Weights that die leave gradients too small for a normal float, and each costs a CPU 100 cycles: a step
    # once took 14 s in place of 0.5. Threads take the setting over when they start, so it comes first.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    demo = data.load(args.data)
    pool = make_pool(args.generator, args.data, args.autoencoder)
    generator, tokenizer = load_generator(args.generator)
    drm = build_drm(args.generator, args.kept, args.coarse, random_backbone=args.random_backbone)
    if args.start:
        drm.load_state_dict(load_drm(args.start).state_dict())
    compiled = torch.compile(drm.forward_depths) if args.compile else drm.forward_depths

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
        with bfloat16_autocast(noisy.device):
            scores = compiled(noisy, sigma, *embed_ids(batch.captions)).float()
        win, lose = scores[batch.ahead], scores[batch.behind]
        losses = [
            preference.bradley_terry_loss(w, r, label=batch.label) for w, r in zip(win.T, lose.T, strict=True)
        ]
        return torch.stack(losses).mean(), figures_of((win - lose)[:, -1].detach(), batch.label, args.batch)

    tables: dict[int, dict[str, list[float]]] = {}

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        tables.update(evaluate(averaged, pool, embed_icons))
        for depth, table in tables.items():
            rows = "  ".join(f"{kind} {' / '.join(f'{a:.3f}' for a in row)}" for kind, row in table.items())
            print(f"\nstep {step}, {depth} blocks: {rows}", flush=True)

    config = LoopConfig(
        steps=args.steps,
        learning_rate=4e-4,
        decay=0.02,
        weight_decay=0.01,
        ema=0.995,
        save_every=500,
        seed=args.seed,
    )
    averaged = train(drm, loss_fn, config, args.out, name="reward", on_save=on_save)
    table = tables[args.kept]
    (args.out / "accuracy.json").write_text(
        json.dumps({"steps": args.steps, "pairs": args.steps * args.batch, "accuracy": tables})
    )
    tested = captions_of(data.indices(pool.tested)[::2])
    facts = {
        "name": "DRM demo, emoji",
        "text_length": text.LENGTH,
        "calibration": calibrate(averaged, pool, embed_icons),
        "decisive": decisive_leads(averaged, *sibling_scores(averaged, generator, tokenizer, tested)),
        "accuracy": table,
        "accuracy_by_depth": {str(depth): found for depth, found in tables.items()},
        "pairs": args.steps * args.batch,
        "license": data.LICENCE,
    }
    save_drm(averaged, args.out / "reward.safetensors", metadata=facts, dtype=torch.float16)
    print(f"reward model -> {args.out / 'reward.safetensors'}")


if __name__ == "__main__":
    main()
