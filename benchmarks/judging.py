"""What the demo family is asked for in the benchmarks, and how its pictures are judged.

Prompts: by default 200 that name a concept and no style, so that drawings of one prompt differ and there is
something to choose. The reward model learned from other drawings of every second of them, and never met the
others; no policy practises on either. Or 200 of a concept and a style (`fresh_prompts`), which leave little
room: the generator draws each nearly one way.

Scores: the DRM's own on the finished latent (sigma 0); the independent judge's probability of the concept
that was asked for, how often it ranks it first, and its median rank. Diversity: mean distance 1 - cosine of
the judge's features between two seeds of a prompt. Intervals: 95 %, bootstrap over prompts.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from training.demo import data, text
from training.demo.autoencoder import to_float
from training.demo.classifier import shrink
from training.demo.data import STYLES, read_concepts
from training.demo.export import Family
from training.demo.judge import judge_pictures
from training.demo.loop import bfloat16_autocast

BOOTSTRAPS = 2000
ASKED, SAMPLE_SEED = 200, 5
KINDS = ("free", "styled", "known")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked of the generator, the number of the judge's concept it stands for, and whether the demo's
    reward model learned from drawings of this caption.
    """

    caption: str
    concept: int
    learned: bool = False


def choose_prompts(family: Family, count: int) -> list[Prompt]:
    """`count` captions spread over concepts and styles: every concept once before any twice."""
    order = [
        (concept, (concept + turn) % len(STYLES))
        for turn in range(len(STYLES))
        for concept in range(len(family.concepts))
    ]
    return [_prompt(family, concept, style) for concept, style in order[:count]]


def unseen_prompts(family: Family) -> tuple[list[Prompt], list[Prompt]]:
    """The (concept, style) pairs whose pictures no model saw: those for practice, and those for tests."""
    concepts = len(family.concepts)
    everything = [(concept, style) for style in range(len(STYLES)) for concept in range(concepts)]
    held_out = [everything[i] for i in data.split(everything, concepts)]
    practised = data.practice(held_out)
    rest = sorted(set(held_out) - set(practised))
    return tuple([_prompt(family, *pair) for pair in half] for half in (practised, rest))


def free_prompts(family: Family) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that name a concept and no style: those to practise on, and the 200 of the benchmarks, in turn
    one that the reward model never met and one it learned from (see `data.asked_freely`).
    """
    words = {name: synonyms[0] for name, synonyms in read_concepts()}
    new = set(data.asked_freely(len(family.concepts)))
    everything = [Prompt(words[name], c, c not in new) for c, name in enumerate(family.concepts)]
    learned = [prompt for prompt in everything if prompt.learned]
    asked = random.Random(SAMPLE_SEED).sample(learned, ASKED // 2)
    fresh = [prompt for prompt in everything if not prompt.learned][:: len(new) * 2 // ASKED]
    both = [prompt for pair in zip(fresh, asked, strict=True) for prompt in pair]
    return [prompt for prompt in learned if prompt not in asked], both


def asked_prompts(family: Family, kind: str, count: int) -> list[Prompt]:
    """Prompts of a benchmark: "free", "styled", or what the generator was trained with, "known"."""
    if kind == "free":
        return free_prompts(family)[1][:count]
    return choose_prompts(family, count) if kind == "known" else fresh_prompts(family, count)


def fresh_prompts(family: Family, count: int = 200) -> list[Prompt]:
    """Prompts that no reward model was trained on, half of them unknown to the generator too: see
    `data.kept_aside`.
    """
    return [_prompt(family, *pair) for pair in data.kept_aside(len(family.concepts))][:count]


def _prompt(family: Family, concept: int, style: int) -> Prompt:
    words = {name: synonyms[0] for name, synonyms in read_concepts()}
    return Prompt(f"{words[family.concepts[concept]]}, {STYLES[style]} style", concept)


@torch.no_grad()
def embed(family: Family, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_embeds (B, 20, 256), pooled (B, 256)."""
    return text.embed(family.generator.text_encoder, text.encode_ids(family.tokenizer, captions))


def drm_scorer(
    family: Family, captions: list[str]
) -> Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]:
    """score(candidates, sigma, item_index) for sample_stepwise, in bfloat16, every candidate by itself."""
    embeds, pooled = embed(family, captions)

    def score(candidates: torch.Tensor, sigma: float, item: torch.Tensor) -> torch.Tensor:
        with bfloat16_autocast(candidates.device):
            return family.drm.score(candidates, sigma, embeds[item], pooled[item]).float()

    return score


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
    figures = {
        "drm": scores,
        "judge": probability,
        "judge_first": (rank == 1).float(),
        "judge_rank": rank.float(),
    }
    rows = {name: value.reshape(len(prompts), seeds_each).mean(1).numpy() for name, value in figures.items()}
    rows["judge_rank"] = rank.reshape(len(prompts), seeds_each).float().median(1).values.numpy()
    if seeds_each > 1:
        rows["diversity"] = _diversity(family, pictures, len(prompts))
    return rows


def _diversity(family: Family, pictures: np.ndarray, prompts: int) -> np.ndarray:
    features = torch.cat(
        [family.judge.features(shrink(to_float(pictures[i : i + 128]))) for i in range(0, len(pictures), 128)]
    )
    by_prompt = F.normalize(features, dim=1).reshape(prompts, -1, features.shape[1])
    return 1 - (by_prompt[:, 0] * by_prompt[:, 1]).sum(1).numpy()
