"""How often the reward model and the independent judge prefer the same of two drawings of one prompt.

    python -m benchmarks.agreement                                  # benchmarks/results/agreement.json
    python -m benchmarks.agreement --drm runs/demo/reward_v1/reward.safetensors

This is the question that choosing among candidates, and fine-tuning, put to a reward model; telling a right
icon from a wrong one is another and easier one. Prompts are those of benchmarks.judging, four drawings each
with SDE noise. Both drawings get the same noise at the same sigma; chance is 50 %. "Clear" pairs are those
whose probability by the judge differs by more than 0.2.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.judging import KINDS, Prompt, asked_prompts, embed, interval
from drm import DRM, flow, load_drm
from drm.ranges import Count
from training.config import argument
from training.demo.drawings import draw_way
from training.demo.export import REWARD, Family, load_family
from training.demo.judge import judge_pictures
from training.demo.loop import bfloat16_autocast
from training.engine.atomic import replace_atomically

DRAWINGS = 4
WAY = ("final", 20, 1.5, 0.7, 0.9)
SIGMAS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9)
NEAR, CLEAR = 0.02, 0.2
BATCH = 50


def draw(family: Family, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (P, DRAWINGS, ...) and the judge's probability of the concept asked for (P, DRAWINGS)."""
    captions, concepts = [p.caption for p in prompts], torch.tensor([p.concept for p in prompts])
    latents, judged = [], []
    for number in range(DRAWINGS):
        parts = [
            draw_way(
                family.generator,
                family.tokenizer,
                captions[first : first + BATCH],
                [9_000_000 + 1000 * number + i for i in range(first, min(first + BATCH, len(captions)))],
                WAY,
            )
            for first in range(0, len(captions), BATCH)
        ]
        latents.append(torch.cat(parts))
        judged.append(judge_pictures(family.judge, family.decode(latents[-1]), concepts)[0])
    return torch.stack(latents, 1), torch.stack(judged, 1)


@torch.no_grad()
def scores_at(
    drm: DRM, latents: torch.Tensor, sigma: float, prompt_embeds: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """(P, DRAWINGS): all drawings of a prompt under one noise."""
    rng, found = torch.Generator().manual_seed(17), []
    for first in range(0, len(latents), BATCH):
        part = latents[first : first + BATCH]
        noise = torch.randn(len(part), 1, *part.shape[2:], generator=rng).expand_as(part)
        level = torch.full((len(part) * DRAWINGS,), sigma)
        noisy = flow.add_noise(part.flatten(0, 1), noise.flatten(0, 1), level)
        text = [t[first : first + BATCH].repeat_interleave(DRAWINGS, 0) for t in (prompt_embeds, pooled)]
        with bfloat16_autocast("cpu"):
            scores = drm(noisy, sigma, *text).float()
        found.append(scores.reshape(len(part), DRAWINGS))
    return torch.cat(found)


def agreement(scores: torch.Tensor, judged: torch.Tensor, least: float) -> np.ndarray:
    """Share of right pairs of each prompt that has some (P',): scores, judged (P, DRAWINGS)."""
    ahead, liked = (table[:, :, None] - table[:, None, :] for table in (scores, judged))
    counted = liked.abs() > least
    right = ((ahead * liked > 0) & counted).sum((1, 2))
    return (right / counted.sum((1, 2)))[counted.any(2).any(1)].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--drm", type=Path, help="another reward model of this family")
    parser.add_argument("--prompts", type=argument(Count), default=200)
    parser.add_argument("--of", choices=KINDS, default="free", help="see benchmarks.judging")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agreement.json"))
    args = parser.parse_args()

    family = load_family(args.models)
    drm = load_drm(args.drm or args.models / REWARD).requires_grad_(False)
    prompts = asked_prompts(family, args.of, args.prompts)
    latents, judged = draw(family, prompts)
    learned = torch.tensor([prompt.learned for prompt in prompts])
    text, rows = embed(family, [prompt.caption for prompt in prompts]), []
    for sigma in SIGMAS:
        mine, rng = scores_at(drm, latents, sigma, *text), np.random.default_rng(0)
        best = judged.gather(1, mine.argmax(1, keepdim=True))[:, 0] - judged.mean(1)
        row = {"sigma": sigma, "all": interval(agreement(mine, judged, NEAR), rng)}
        row["clear"] = interval(agreement(mine, judged, CLEAR), rng)
        row["best_of_4_gain"] = interval(best.numpy(), rng)
        for name, some in (("learned", learned), ("new", ~learned)):
            if some.any():
                row[f"all_{name}"] = interval(agreement(mine[some], judged[some], NEAR), rng)
        rows.append(row)
        shown = (f"{name} {100 * row[name][0]:.1f}" for name in ("all", "clear", "best_of_4_gain"))
        print(f"sigma {sigma:.2f}: {', '.join(shown)}")
    oracle = interval((judged.amax(1) - judged.mean(1)).numpy(), np.random.default_rng(0))
    result = {
        "prompts": len(prompts),
        "of": args.of,
        "drawings": DRAWINGS,
        "oracle_best_of_4_gain": oracle,
        "rows": rows,
    }
    replace_atomically(args.out, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    print(f"choosing by the judge itself: {100 * oracle[0]:.1f} points -> {args.out}")


if __name__ == "__main__":
    main()
