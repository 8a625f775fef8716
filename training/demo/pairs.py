"""The demo's preference pairs: which pictures there are, and which of two is preferred.

The preferred picture is the real icon of a caption. The other one is
    wrong      another caption's icon: another concept, or the same concept in another style
    degraded   the same icon blurred, recoloured, warped, covered by noise, or with a piece cut out
    generated  what the generator draws for that caption, with early or final weights, few or many steps
"drawn" sets a final picture of the generator's against an early one or one of another caption. In the rated
kinds the raters of training.demo.raters say, by a probability, which is better:
    preferred  two drawings of one caption, what a reward model is asked in a sampler and in fine-tuning;
               captions and pairs on which the raters have an opinion come more often
    confused   a drawing of the caption and one of another caption that the raters take for it most
No pair of a held-out concept, and no held-out icon, is trained on; of the captions of held-out icons, those
for practice give rated drawings.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from training.demo import data
from training.demo.autoencoder import to_float
from training.demo.drawings import load_drawings
from training.demo.generator import draw, load_generator, prepare
from training.loop import bfloat16_autocast

HELD_OUT_CONCEPTS = 48
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
# P(the raters' favourite is the better) = sigmoid(SHARPNESS * difference in utility); the judge of the
# benchmarks agreed with 73 % of the raters' choices and with 89 % where utilities differed by more than 1
SHARPNESS = 2.0
RATED = ("preferred", "confused")
# how often pairs come on which the raters have no opinion: as often as if utilities differed by this
INDIFFERENT = 0.1
CONFUSED_AMONG = 512
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
    """Model-space latents by icon: real (N, ...), degraded (N, 5, ...), drawn (N, 5, ...); labels concept,
    style (N,). Rated drawings (M, ...) with the raters' utility of every concept (M, concepts) and whose
    caption each draws, owner (M,); own (N, most): the places of each icon's drawings, -1 beyond the last.
    Masks (N,): trained, pictures to learn from; prompted, captions whose drawings are learned from; tested.
    """

    real: torch.Tensor
    degraded: torch.Tensor
    drawn: torch.Tensor
    rated: torch.Tensor
    utility: torch.Tensor
    owner: torch.Tensor
    own: torch.Tensor
    concept: torch.Tensor
    style: torch.Tensor
    trained: torch.Tensor
    prompted: torch.Tensor
    tested: torch.Tensor


def held_out_concepts(concepts: int) -> list[int]:
    """The concepts that no reward model learns from."""
    return random.Random(data.SPLIT_SEED + 1).sample(range(concepts), HELD_OUT_CONCEPTS)


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
    held = torch.tensor(held_out_concepts(len(demo.names)))
    tested = torch.isin(concept, held)
    held_out = torch.from_numpy(demo.held_out[icons])
    labels = list(zip(concept.tolist(), style.tolist(), strict=True))
    practised = set(data.practice([labels[i] for i in data.indices(held_out).tolist()]))
    prompted = ~tested & (~held_out | torch.tensor([label in practised for label in labels]))
    drawings = load_drawings(generator_folder)
    return Pool(
        real=cached["latents"],
        degraded=made["degraded"],
        drawn=made["drawn"],
        rated=drawings.latents,
        utility=drawings.utility,
        owner=drawings.icon,
        own=places_of(drawings.icon, len(icons)),
        concept=concept,
        style=style,
        trained=~tested & ~held_out,
        prompted=prompted,
        tested=tested,
    )


def places_of(owner: torch.Tensor, count: int) -> torch.Tensor:
    """Owners (M,) below `count` -> (count, most): the places of each owner's entries, -1 beyond the last."""
    order = owner.argsort(stable=True)
    rows = order.split(torch.bincount(owner, minlength=count).tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


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


def own_utility(pool: Pool, icons: torch.Tensor) -> torch.Tensor:
    """What the raters think of each icon's drawings, (B, most); NaN where it has no more."""
    found = pool.utility[pool.own[icons].clamp_min(0), pool.concept[icons][:, None]]
    return found.masked_fill(pool.own[icons] < 0, torch.nan)


def disputed(pool: Pool, allowed: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """Icons (count,) of `allowed`, those whose drawings differ most in utility most often."""
    candidates = data.indices(allowed)
    found = own_utility(pool, candidates)
    differ = found.nan_to_num(-torch.inf).amax(1) - found.nan_to_num(torch.inf).amin(1)
    return candidates[torch.multinomial(differ + INDIFFERENT, count, replacement=True, generator=rng)]


def rated_pairs(
    pool: Pool, icons: torch.Tensor, kind: str, allowed: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A drawing of each icon's caption and another picture, the one the raters prefer first, and their
    probability that it is the better.
    """
    utility = own_utility(pool, icons)
    there = (~utility.isnan()).float()
    first = torch.multinomial(there, 1, generator=rng)
    mine, own = utility.gather(1, first)[:, 0], pool.own[icons]
    if kind == "preferred":
        weight = (utility - mine[:, None]).abs().nan_to_num(0) + INDIFFERENT
        weight = (weight * there).scatter(1, first, 0.0)
        second = torch.multinomial(weight, 1, generator=rng)
        other, theirs = own.gather(1, second)[:, 0], utility.gather(1, second)[:, 0]
    else:
        other, theirs = _confusing(pool, icons, allowed, rng)
    place = own.gather(1, first)[:, 0]
    gap = mine - theirs
    better, worse = torch.where(gap >= 0, place, other), torch.where(gap >= 0, other, place)
    return pool.rated[better].float(), pool.rated[worse].float(), (SHARPNESS * gap.abs()).sigmoid()


def _confusing(
    pool: Pool, icons: torch.Tensor, allowed: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some drawings of other concepts, the one the raters take most for each icon's: place, utility."""
    sample = data.indices(allowed[pool.owner])
    sample = sample[torch.randint(len(sample), (CONFUSED_AMONG,), generator=rng)]
    table = pool.utility[sample][:, pool.concept[icons]].T
    same = pool.concept[pool.owner[sample]][None] == pool.concept[icons][:, None]
    best = table.masked_fill(same, -torch.inf).max(dim=1)
    return sample[best.indices], best.values


def pairs(
    pool: Pool, icons: torch.Tensor, kind: str, allowed: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(preferred, other) latents of one kind for the captions of `icons`, and P(preferred is better) (B,)."""
    if kind in RATED:
        return rated_pairs(pool, icons, kind, allowed, rng)
    return *_certain_pairs(pool, icons, kind, allowed, rng), torch.ones(len(icons))


def _certain_pairs(
    pool: Pool, icons: torch.Tensor, kind: str, allowed: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
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
