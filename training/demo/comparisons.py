"""What one step of the demo reward model's training compares: pictures under noise, each with a caption.

Of some pairs it is known which picture is better; they share noise and sigma. Of the others, two drawings of
a caption or two pictures crossed with two captions, the noisy rater says how likely it is, from what it sees
of both under noise of their own at one sigma:

    P(ahead is better) = sigmoid(SHARPNESS * difference of its log p(concept asked for))
"""

from __future__ import annotations

import dataclasses

import torch

from drm import flow
from training.demo import data, text
from training.demo.noisy_rater import NoisyRater, opinions
from training.demo.pairs import Pool, ask, pairs
from training.demo.rated import FREE, SHARPNESS, TWO_OF, crossed

# Of every 22 pairs so many are of each kind.
MIX = {
    "wrong": 2,
    "degraded": 3,
    "generated early": 1,
    "drawn": 1,
    "augmented": 2,
    "mixed": 2,
    "preferred": 2,
    "loose": 5,
    **dict.fromkeys(FREE, 1),
}


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Rows to score: latents (R, ...), a caption each, the concept it names (R,), its noise (R,) and sigma
    (R,) by number, and whether what is better is known (R,). Row `ahead` (P,) is better than row `behind`
    (P,) with probability label (P,).
    """

    latents: torch.Tensor
    captions: list[str]
    concept: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    known: torch.Tensor
    ahead: torch.Tensor
    behind: torch.Tensor
    label: torch.Tensor


def caption_of(demo: data.DemoData, pool: Pool, icon: int, rng: torch.Generator, *, styled: bool) -> str:
    """A caption a person might write for this icon."""
    words, style = demo.words[pool.concept[icon]], int(pool.style[icon])
    return text.random_caption(words, style, rng, empty=0.0, unstyled=float(not styled))


def draw_pairs(demo: data.DemoData, pool: Pool, size: int, rng: torch.Generator) -> Comparisons:
    """Pairs of two pictures under one caption, the kinds in the shares of MIX."""
    chosen, rejected, labels, captions, asked, known = [], [], [], [], [], []
    for kind, share in MIX.items():
        icons, allowed = ask(pool, kind, round(share * size / sum(MIX.values())), rng)
        better, worse, label = pairs(pool, icons, kind, allowed, rng)
        chosen.append(better)
        rejected.append(worse)
        labels.append(label)
        captions += [caption_of(demo, pool, i, rng, styled=kind not in FREE) for i in icons.tolist()]
        asked.append(pool.concept[icons])
        known.append(torch.full((len(icons),), kind not in TWO_OF))
    count = len(captions)
    first, second = torch.arange(count), torch.arange(count, 2 * count)
    sure = torch.cat(known)
    return Comparisons(
        latents=torch.cat([*chosen, *rejected]),
        captions=captions * 2,
        concept=torch.cat(asked).repeat(2),
        noise=torch.cat([first, torch.where(sure, first, second)]),
        sigma=first.repeat(2),
        known=sure.repeat(2),
        ahead=first,
        behind=second,
        label=torch.cat(labels),
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
        latents=pool.rated.latents[places].float().repeat_interleave(2, 1).flatten(0, 1),
        captions=[caption for both in named for caption in both * 2],
        concept=pool.concept[icons].repeat(1, 2).flatten(),
        noise=torch.arange(2 * count).repeat_interleave(2),
        sigma=torch.arange(count).repeat_interleave(4),
        known=torch.zeros(4 * count, dtype=torch.bool),
        ahead=matched,
        behind=crosswise,
        label=(SHARPNESS * gap).sigmoid(),
    )


def together(one: Comparisons, other: Comparisons) -> Comparisons:
    """Both in one batch."""
    rows = len(one.captions)
    moved = dataclasses.replace(
        other,
        noise=other.noise + rows,
        sigma=other.sigma + rows,
        ahead=other.ahead + rows,
        behind=other.behind + rows,
    )
    joined = {
        field.name: torch.cat([getattr(one, field.name), getattr(moved, field.name)])
        for field in dataclasses.fields(Comparisons)
        if field.name != "captions"
    }
    return Comparisons(captions=one.captions + other.captions, **joined)


def noised(batch: Comparisons, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' latents under noise, and sigma (R,), uniform in (0, 1)."""
    noises, levels = int(batch.noise.max()) + 1, int(batch.sigma.max()) + 1
    noise = torch.randn(noises, *batch.latents.shape[1:], generator=rng)[batch.noise]
    sigma = torch.rand(levels, generator=rng)[batch.sigma]
    return flow.add_noise(batch.latents, noise, sigma), sigma


def rated_under_noise(
    batch: Comparisons, noisy: torch.Tensor, sigma: torch.Tensor, rater: NoisyRater
) -> tuple[Comparisons, torch.Tensor]:
    """The batch with labels by the noisy rater where they are not known, and its log p of every concept
    (R, concepts).
    """
    opinion = opinions(rater, noisy, sigma)
    utility = opinion.gather(1, batch.concept[:, None])[:, 0]
    label = (SHARPNESS * (utility[batch.ahead] - utility[batch.behind])).sigmoid()
    return dataclasses.replace(
        batch, label=torch.where(batch.known[batch.ahead], batch.label, label)
    ), opinion
