"""The README's table: plain sampling, Step-wise Sampling at k = 1, 2, 4, 6 and best-of-N, on the demo family.

    python -m benchmarks.stepwise                                  # the table: 200 prompts, two seeds each
    python -m benchmarks.stepwise --prompts 100 --noise-level 0.5  # a study of one setting

Every way of sampling starts from the same noise with the same prompts, batch by batch side by side, so its
time divided by plain sampling's is a ratio measured in one run. Scores: the DRM's own on the finished latent
(sigma 0), and the independent judge's probability of the asked concept, how often it ranks it first, and its
median rank. Diversity: mean distance 1 - cosine of the judge's features between two seeds of a prompt.
Intervals: 95 %, bootstrap over prompts; differences are paired with plain sampling. Passes count forwards of
the generator's four blocks; scoring costs 0.75 of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from drm import flow, stepwise
from training.demo import text
from training.demo.autoencoder import to_float
from training.demo.data import STYLES, read_concepts
from training.demo.export import Family, load_family
from training.demo.generator import SHIFT, guided_denoise, initial_noise
from training.demo.judge import judge_pictures, shrink
from training.loop import bfloat16_autocast

SCORE_CHUNK = 96
BOOTSTRAPS = 2000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked of the generator, and the number of the judge's concept it stands for."""

    caption: str
    concept: int


def choose_prompts(family: Family, count: int) -> list[Prompt]:
    """`count` captions spread over concepts and styles: every concept once before any twice."""
    words = {name: synonyms[0] for name, synonyms in read_concepts()}
    order = [
        (concept, (concept + turn) % len(STYLES))
        for turn in range(len(STYLES))
        for concept in range(len(family.concepts))
    ]
    return [
        Prompt(f"{words[family.concepts[concept]]}, {STYLES[style]} style", concept)
        for concept, style in order[:count]
    ]


def drm_scorer(
    family: Family, captions: list[str]
) -> Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]:
    """score(candidates, sigma, item_index) for sample_stepwise, in bfloat16."""
    with torch.no_grad():
        embeds, pooled = text.embed(
            family.generator.text_encoder, text.encode_ids(family.tokenizer, captions)
        )

    def score(candidates: torch.Tensor, sigma: float, item: torch.Tensor) -> torch.Tensor:
        with bfloat16_autocast(candidates.device):
            return family.drm.score(candidates, sigma, embeds[item], pooled[item]).float()

    return score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How all rows of a table sample."""

    steps: int
    cfg: float
    noise_level: float
    kind: str
    start: float
    end: float


def sample(family: Family, captions: list[str], seeds: list[int], setting: Setting, k: int) -> torch.Tensor:
    """Model-space latents (B, 16, 16, 16); k = 0 is plain Euler."""
    latents, _ = stepwise.sample_stepwise(
        guided_denoise(family.generator, family.tokenizer, captions, setting.cfg),
        drm_scorer(family, captions),
        initial_noise(seeds),
        flow.schedule(setting.steps, SHIFT),
        num_branches=max(1, k),
        noise_level=setting.noise_level if k else 0.0,
        kind=setting.kind,
        start=setting.start,
        end=setting.end,
        item_ids=seeds,
        chunk_size=SCORE_CHUNK,
    )
    return latents


def best_of(family: Family, captions: list[str], drawn: list[torch.Tensor]) -> torch.Tensor:
    """Of several finished latents (B, ...) for the same captions, the one the DRM likes best of each."""
    score, index = drm_scorer(family, captions), torch.arange(len(captions))
    scores = torch.stack([score(latents, 0.0, index) for latents in drawn])
    return torch.stack(drawn)[scores.argmax(0), index]


def passes(setting: Setting, k: int) -> float:
    """Generator forwards a picture, scoring counted at its share of the blocks; the last step scores
    nothing.
    """
    branching = sum(setting.start <= i / setting.steps < setting.end for i in range(setting.steps - 1))
    return setting.steps * (1 if setting.cfg == 1 else 2) + (0.75 * k * branching if k > 1 else 0)


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Mean of one value a prompt and its 95 % bootstrap interval: [mean, low, high]."""
    draws = values[rng.integers(len(values), size=(BOOTSTRAPS, len(values)))].mean(1)
    return [float(values.mean()), *(float(q) for q in np.quantile(draws, (0.025, 0.975)))]


@torch.no_grad()
def measure(
    family: Family, latents: torch.Tensor, prompts: list[Prompt], seeds_each: int
) -> dict[str, np.ndarray]:
    """Per-prompt figures (P,) of latents (P * seeds, ...) ordered prompt by prompt."""
    captions = [prompt.caption for prompt in prompts for _ in range(seeds_each)]
    asked = torch.tensor([prompt.concept for prompt in prompts]).repeat_interleave(seeds_each)
    scores = torch.cat(
        [
            drm_scorer(family, captions[i : i + 64])(
                latents[i : i + 64], 0.0, torch.arange(len(captions[i : i + 64]))
            )
            for i in range(0, len(latents), 64)
        ]
    )
    pictures = family.decode(latents)
    probability, rank = judge_pictures(family.judge, pictures, asked)
    features = torch.cat(
        [family.judge.features(shrink(to_float(pictures[i : i + 128]))) for i in range(0, len(pictures), 128)]
    )
    by_prompt = F.normalize(features, dim=1).reshape(len(prompts), seeds_each, -1)
    figures = {
        "drm": scores,
        "judge": probability,
        "judge_first": (rank == 1).float(),
        "judge_rank": rank.float(),
    }
    rows = {name: value.reshape(len(prompts), seeds_each).mean(1).numpy() for name, value in figures.items()}
    rows["judge_rank"] = rank.reshape(len(prompts), seeds_each).float().median(1).values.numpy()
    if seeds_each > 1:
        rows["diversity"] = 1 - (by_prompt[:, 0] * by_prompt[:, 1]).sum(1).numpy()
    return rows


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What work returns and the seconds it took."""
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun


def draw_batch(
    family: Family,
    captions: list[str],
    seeds: list[int],
    setting: Setting,
    branches: list[int],
    bests: list[int],
) -> dict[tuple[str, int], tuple[torch.Tensor, float]]:
    """Latents and seconds of every way; best-of-N starts with the plain pictures, then adds seeds."""
    made = {("stepwise", k): timed(lambda k=k: sample(family, captions, seeds, setting, k)) for k in branches}
    plain = [made["stepwise", 0]]
    for i in range(1, max(bests, default=1)):
        others = [seed + 1_000_000 * i for seed in seeds]
        plain.append(timed(lambda others=others: sample(family, captions, others, setting, 0)))
    for n in bests:
        chosen, choosing = timed(lambda n=n: best_of(family, captions, [latents for latents, _ in plain[:n]]))
        made["best-of", n] = chosen, choosing + sum(seconds for _, seconds in plain[:n])
    return made


def run(
    family: Family,
    prompts: list[Prompt],
    setting: Setting,
    branches: list[int],
    bests: list[int],
    seeds_each: int,
    batch: int,
) -> list[dict]:
    """One row for each way of sampling; branches must hold 0, plain sampling."""
    captions = [prompt.caption for prompt in prompts for _ in range(seeds_each)]
    seeds = [7 + 13 * i for i in range(len(captions))]
    draw_batch(
        family, captions[:batch], seeds[:batch], dataclasses.replace(setting, steps=2), branches, bests
    )
    batches = [
        draw_batch(family, captions[i : i + batch], seeds[i : i + batch], setting, branches, bests)
        for i in tqdm(range(0, len(captions), batch), desc="sampling", mininterval=10)
    ]
    drawn = {way: torch.cat([made[way][0] for made in batches]) for way in batches[0]}
    seconds = {way: sum(made[way][1] for made in batches) for way in batches[0]}
    figures = {way: measure(family, latents, prompts, seeds_each) for way, latents in drawn.items()}
    plain = figures["stepwise", 0]
    rows = []
    for (name, k), values in figures.items():
        rng = np.random.default_rng(0)
        row = {"way": name if k else "plain", "k": k, "time_ratio": seconds[name, k] / seconds["stepwise", 0]}
        row["passes"] = passes(setting, k) if name == "stepwise" else k * (passes(setting, 0) + 0.75)
        row |= {key: interval(value, rng) for key, value in values.items()}
        row |= {
            f"{key}_gain": interval(values[key] - plain[key], rng) for key in ("drm", "judge", "judge_first")
        }
        rows.append(row)
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The table people read."""

    def cell(values: list[float], scale: float = 1, digits: int = 2) -> str:
        mean, low, high = (f"{scale * v:.{digits}f}" for v in values)
        return f"{mean} ({low} to {high})"

    lines = [
        "| sampling | time / plain | passes | DRM score | judge: probability, % | gain over plain, points "
        "| judge: first, % | diversity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = (
            "plain"
            if row["way"] == "plain"
            else f"k = {row['k']}"
            if row["way"] == "stepwise"
            else f"best of {row['k']}"
        )
        cells = [
            name,
            f"{row['time_ratio']:.2f}",
            f"{row['passes']:.0f}",
            cell(row["drm"]),
            cell(row["judge"], 100, 1),
        ]
        cells += [
            cell(row["judge_gain"], 100, 1),
            cell(row["judge_first"], 100, 1),
            cell(row["diversity"], 1, 3) if "diversity" in row else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, help="pictures a prompt")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--noise-level", type=float, default=0.7)
    parser.add_argument("--kind", choices=("sde", "cps"), default="sde")
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--end", type=float, default=1.0)
    parser.add_argument("--branches", type=int, nargs="+", default=[0, 1, 2, 4, 6])
    parser.add_argument("--best-of", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stepwise_table.json"))
    args = parser.parse_args()

    family = load_family(args.models)
    prompts = choose_prompts(family, args.prompts)
    setting = Setting(
        steps=args.steps,
        cfg=args.cfg,
        noise_level=args.noise_level,
        kind=args.kind,
        start=args.start,
        end=args.end,
    )
    branches = sorted({0, *args.branches})
    rows = run(family, prompts, setting, branches, args.best_of, args.seeds, args.batch)
    report = {
        "setting": dataclasses.asdict(setting),
        "prompts": len(prompts),
        "seeds": args.seeds,
        "batch": args.batch,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))
    print(f"{len(prompts)} prompts x {args.seeds} seeds, {setting}\n\n{as_markdown(rows)}\n\n-> {args.out}")


if __name__ == "__main__":
    main()
