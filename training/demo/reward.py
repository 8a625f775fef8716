"""The demo reward model: the generator cut off before its last block, a head, and Bradley-Terry on pairs made
here.

    python -m training.demo.reward --generator runs/demo/generator --out runs/demo/reward
    python -m training.demo.reward --random-backbone --out runs/demo/reward_random      # the ablation, equal
    steps

The preferred picture is the real icon of a caption. The other one is
    wrong      another caption's icon: another concept, or the same concept in another style
    degraded   the same icon blurred, recoloured, warped, covered by noise, or with a piece cut out
    generated  what the generator draws for that caption, with early or final weights, few or many steps
A fourth kind, "drawn", sets a final picture of the generator's against an early one or one of another
caption, so that the model also learns to rank what it will meet in a sampler. Both pictures of a pair get the
same noise at the same sigma, uniform in (0, 1). No pair of a held-out concept, and no held-out icon, is seen
in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from drm import DRM, flow, preference, save_drm
from drm.backbone import BackboneConfig, TruncatedSD3, backbone_from_transformer
from drm.head import ConvHead
from training.demo import data, text
from training.demo.autoencoder import to_float
from training.demo.generator import draw, load_generator, prepare
from training.loop import LoopConfig, bfloat16_autocast, train

KEPT = 3
HIDDEN = 128
HELD_OUT_CONCEPTS = 48
KINDS = ("wrong", "degraded", "generated", "drawn")
REPORTED = ("wrong concept", "wrong style", "degraded", "generated early", "generated final", "drawn")
DEGRADATIONS = ("blur", "colour", "warp", "noise", "cut")
# (weights, steps, cfg) of what the generator draws: first with early weights, last its best
DRAWINGS = (
    ("snapshot_006", 8, 1.0),
    ("snapshot_020", 8, 2.0),
    ("final", 5, 2.0),
    ("final", 12, 1.0),
    ("final", 14, 3.0),
)
# how often the other caption of a "wrong" pair names the same concept in another style
WRONG = {"wrong": 0.25, "wrong concept": 0.0, "wrong style": 1.0}
GENERATED = {"generated": (0, 5), "generated early": (0, 2), "generated final": (2, 5)}


def degrade(pictures: torch.Tensor, kind: str, rng: torch.Generator) -> torch.Tensor:
    """Spoil pictures (B, 3, H, W) in [-1, 1] in one of five ways, each picture with its own strength."""
    batch, _, height, width = pictures.shape

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=rng)

    def field(channels: int, cells: int) -> torch.Tensor:
        coarse = torch.randn(batch, channels, cells, cells, generator=rng)
        return F.interpolate(coarse, size=(height, width), mode="bicubic")

    strength = uniform(0.35, 1.0, 1, 1, 1)
    if kind == "blur":
        wide = F.avg_pool2d(
            F.avg_pool2d(pictures, 13, 1, 6, count_include_pad=False), 9, 1, 4, count_include_pad=False
        )
        return torch.lerp(pictures, wide, strength)
    if kind == "colour":
        ink = 1 - pictures
        turned = torch.stack([ink[i, torch.randperm(3, generator=rng)] for i in range(batch)])
        return 1 - torch.lerp(ink, turned * uniform(0.5, 1.2, 3, 1, 1), strength)
    if kind == "warp":
        shift = field(2, 5).permute(0, 2, 3, 1) * 0.16 * strength
        identity = F.affine_grid(
            torch.eye(2, 3).expand(batch, 2, 3), list(pictures.shape), align_corners=False
        )
        return F.grid_sample(pictures - 1, identity + shift, align_corners=False) + 1
    if kind == "noise":
        return pictures + strength * (0.25 * torch.randn(pictures.shape, generator=rng) + 0.35 * field(3, 16))
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    top, left, tall, wide_ = (
        uniform(0.1, 0.6, 1),
        uniform(0.1, 0.6, 1),
        uniform(0.2, 0.5, 1),
        uniform(0.2, 0.5, 1),
    )
    hole = ((rows > top) & (rows < top + tall))[:, :, None] & ((columns > left) & (columns < left + wide_))[
        :, None, :
    ]
    filler = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, torch.ones(()), pictures.roll(height // 2, 2).flip(3))
    return torch.where(hole[:, None], filler, pictures).clamp(-1, 1)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Model-space latents by icon: real (N, ...), degraded (N, 5, ...), drawn (N, 5, ...); labels
    concept, style (N,).
    """

    real: torch.Tensor
    degraded: torch.Tensor
    drawn: torch.Tensor
    concept: torch.Tensor
    style: torch.Tensor
    trained: torch.Tensor
    tested: torch.Tensor


@torch.no_grad()
def make_pool(generator_folder: Path, data_folder: Path, autoencoder_folder: Path) -> Pool:
    """Draw and degrade once; cached beside the generator, because every reward run uses the same pictures."""
    demo = data.load(data_folder)
    cached, statistics = prepare(generator_folder, data_folder, autoencoder_folder)
    icons = cached["icon"].numpy()
    path = generator_folder / "pairs.safetensors"
    if not path.exists():
        autoencoder = AutoencoderTiny.from_pretrained(autoencoder_folder)
        rng = torch.Generator().manual_seed(0)
        degraded = torch.empty(len(icons), len(DEGRADATIONS), *cached["latents"].shape[1:])
        for part in np.array_split(np.arange(len(icons)), len(icons) // 32):
            pictures = to_float(demo.images[icons[part]])
            for j, kind in enumerate(DEGRADATIONS):
                with bfloat16_autocast("cpu"):
                    raw = autoencoder.encoder(
                        degrade(pictures, kind, rng).contiguous(memory_format=torch.channels_last)
                    ).float()
                degraded[part, j] = (raw - statistics["mean"]) / statistics["std"]
        print("degraded pictures encoded", flush=True)
        captions = [demo.caption(icon) for icon in icons]
        drawn = []
        for j, (snapshot, steps, cfg) in enumerate(DRAWINGS):
            generator, tokenizer = load_generator(generator_folder, snapshot)
            seeds = [10_000 * (j + 1) + i for i in range(len(icons))]
            drawn.append(draw(generator, tokenizer, captions, seeds, steps=steps, cfg=cfg))
            print(f"drawn with {snapshot}, {steps} steps, cfg {cfg}", flush=True)
        save_file({"degraded": degraded, "drawn": torch.stack(drawn, 1)}, path)
    made = load_file(path)
    concept, style = torch.from_numpy(demo.concept[icons]), torch.from_numpy(demo.style[icons])
    held = torch.tensor(random.Random(data.SPLIT_SEED + 1).sample(range(len(demo.names)), HELD_OUT_CONCEPTS))
    tested = torch.isin(concept, held)
    trained = ~tested & ~torch.from_numpy(demo.held_out[icons])
    return Pool(cached["latents"], made["degraded"], made["drawn"], concept, style, trained, tested)


def other_icon(
    pool: Pool, icons: torch.Tensor, allowed: torch.Tensor, rng: torch.Generator, same_concept: float
) -> torch.Tensor:
    """For each icon another one of `allowed`: of another concept, or with probability `same_concept` of its
    own in another style, where `allowed` has one.
    """
    candidates = data.indices(allowed)
    picked = candidates[torch.randint(len(candidates), icons.shape, generator=rng)]
    clash = pool.concept[picked] == pool.concept[icons]
    place = torch.searchsorted(candidates, icons)
    picked = torch.where(clash, candidates[(place + len(candidates) // 3) % len(candidates)], picked)
    for i in data.indices(torch.rand(icons.shape, generator=rng) < same_concept).tolist():
        concept, style = pool.concept[icons[i]], pool.style[icons[i]]
        siblings = data.indices(allowed & (pool.concept == concept) & (pool.style != style))
        if len(siblings):
            picked[i] = siblings[torch.randint(len(siblings), (), generator=rng)]
    return picked


def pairs(
    pool: Pool, icons: torch.Tensor, kind: str, allowed: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(preferred, other) latents of one loser type for the captions of `icons`."""
    size, best = len(icons), len(DRAWINGS) - 1
    if kind in WRONG:
        return pool.real[icons], pool.real[other_icon(pool, icons, allowed, rng, WRONG[kind])]
    if kind == "degraded":
        return pool.real[icons], pool.degraded[
            icons, torch.randint(len(DEGRADATIONS), (size,), generator=rng)
        ]
    if kind in GENERATED:
        first, last = GENERATED[kind]
        return pool.real[icons], pool.drawn[icons, torch.randint(first, last, (size,), generator=rng)]
    early = pool.drawn[icons, torch.randint(best, (size,), generator=rng)]
    elsewhere = pool.drawn[other_icon(pool, icons, allowed, rng, WRONG["wrong"]), best]
    choice = torch.rand(size, 1, 1, 1, generator=rng) < 0.5
    return pool.drawn[icons, best], torch.where(choice, early, elsewhere)


def build_drm(generator_folder: Path, *, random_backbone: bool) -> DRM:
    """The truncated generator (or one of the same shape with fresh weights) under a fresh head."""
    generator, _ = load_generator(generator_folder)
    if random_backbone:
        backbone = TruncatedSD3(BackboneConfig.from_diffusers(generator.transformer.config, KEPT))
    else:
        backbone = backbone_from_transformer(generator.transformer, KEPT)
    return DRM(backbone.requires_grad_(True), ConvHead(backbone.config.width, HIDDEN))


@torch.no_grad()
def evaluate(drm: DRM, pool: Pool, embed, *, rounds: int = 2) -> dict[str, list[float]]:
    """Accuracy on held-out concepts by loser type, in the four quarters of sigma from low to high."""
    icons = data.indices(pool.tested)
    table = {}
    for seed, kind in enumerate(REPORTED):
        rng = torch.Generator().manual_seed(seed)
        wins, losses, sigmas = [], [], []
        for quarter in range(4):
            for _ in range(rounds):
                chosen, rejected = pairs(pool, icons, kind, pool.tested, rng)
                sigma = (quarter + torch.rand(len(icons), generator=rng)) / 4
                scores = score_pair(drm, chosen, rejected, sigma, *embed(icons), rng)
                wins.append(scores[0])
                losses.append(scores[1])
                sigmas.append(sigma)
        table[kind] = preference.accuracy_by_sigma(torch.cat(wins), torch.cat(losses), torch.cat(sigmas))
    return table


def score_pair(drm, chosen, rejected, sigma, prompt_embeds, pooled, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of both sides of each pair under one noise and one sigma."""
    noise = torch.randn(chosen.shape, generator=rng)
    both = torch.cat([flow.add_noise(chosen, noise, sigma), flow.add_noise(rejected, noise, sigma)])
    with bfloat16_autocast(both.device):
        scores = drm(both, sigma.repeat(2), prompt_embeds.repeat(2, 1, 1), pooled.repeat(2, 1))
    return scores.float().chunk(2)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/reward"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=32, help="pairs a step")
    parser.add_argument("--random-backbone", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    demo = data.load(args.data)
    pool = make_pool(args.generator, args.data, args.autoencoder)
    generator, tokenizer = load_generator(args.generator)
    drm = build_drm(args.generator, random_backbone=args.random_backbone)
    compiled = torch.compile(drm)
    train_icons = data.indices(pool.trained)

    def embed_ids(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return text.embed(generator.text_encoder, text.encode_ids(tokenizer, captions))

    def embed_icons(icons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return embed_ids(
            [f"{demo.words[pool.concept[i]][0]}, {data.STYLES[pool.style[i]]} style" for i in icons]
        )

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        icons = train_icons[torch.randint(len(train_icons), (args.batch,), generator=rng)]
        chosen, rejected = (
            torch.cat(side)
            for side in zip(
                *(
                    pairs(pool, part, kind, pool.trained, rng)
                    for kind, part in zip(KINDS, icons.chunk(len(KINDS)), strict=True)
                ),
                strict=True,
            )
        )
        captions = [
            text.random_caption(demo.words[pool.concept[i]], pool.style[i], rng, empty=0.0, unstyled=0.0)
            for i in icons
        ]
        sigma = torch.rand(args.batch, generator=rng)
        win, lose = score_pair(compiled, chosen, rejected, sigma, *embed_ids(captions), rng)
        figures = {
            "accuracy": preference.preference_accuracy(win, lose),
            "margin": (win - lose).mean().item(),
        }
        return preference.bradley_terry_loss(win, lose), figures

    table: dict[str, list[float]] = {}

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        table.update(evaluate(averaged, pool, embed_icons))
        rows = "  ".join(f"{kind} {' / '.join(f'{a:.3f}' for a in row)}" for kind, row in table.items())
        print(f"\nstep {step}: {rows}", flush=True)

    config = LoopConfig(
        steps=args.steps, learning_rate=4e-4, decay=0.02, weight_decay=0.01, ema=0.995, save_every=500
    )
    averaged = train(drm, loss_fn, config, args.out, name="reward", on_save=on_save)
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
