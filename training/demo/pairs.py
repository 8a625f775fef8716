"""The demo's preference pairs: which pictures there are, and which of two is preferred.

The preferred picture is the real icon of a caption. The other one is
    wrong      another caption's icon: another concept, or the same concept in another style
    degraded   the same icon blurred, recoloured, warped, covered by noise, or with a piece cut out
    generated  what the generator draws for that caption, with early or final weights, few or many steps
"drawn" sets a final picture of the generator's against an early one or one of another caption. The kinds of
training.demo.rated are two drawings or two augmented icons, and raters say which is better.
Nothing of training.demo.data.kept_aside and no held-out icon is trained on; of the captions of the other
held-out icons there are drawings.
"""

from __future__ import annotations

import dataclasses
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
from training.demo.loop import bfloat16_autocast
from training.demo.rated import FREE, TWO_OF, RatedPictures, askable, rated_pairs

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
    """Model-space latents by icon: real (N, ...), degraded (N, 5, ...), drawn (N, 5, ...); labels concept,
    style (N,); what the raters rated. Masks (N,): trained, pictures to learn from; prompted, captions whose
    drawings are learned from; tested.
    """

    real: torch.Tensor
    degraded: torch.Tensor
    drawn: torch.Tensor
    rated: RatedPictures
    concept: torch.Tensor
    style: torch.Tensor
    trained: torch.Tensor
    prompted: torch.Tensor
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
    roles = data.roles(demo, icons)
    return Pool(
        real=cached["latents"],
        degraded=made["degraded"],
        drawn=made["drawn"],
        rated=RatedPictures.of(load_drawings(generator_folder), len(icons)),
        concept=torch.from_numpy(demo.concept[icons]),
        style=torch.from_numpy(demo.style[icons]),
        trained=~roles.aside & ~roles.held_out,
        prompted=~roles.aside,
        tested=roles.aside,
    )


def without_concepts(pool: Pool, held: list[int]) -> Pool:
    """The pool with nothing of the concepts `held` in training, and all of them for tests."""
    foreign = torch.isin(pool.concept, torch.tensor(held))
    return dataclasses.replace(
        pool, trained=pool.trained & ~foreign, prompted=pool.prompted & ~foreign, tested=foreign
    )


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


def ask(pool: Pool, kind: str, count: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Icons (count,) to ask a kind of pair of in training, and the icons (N,) its pictures may be of."""
    if kind in FREE:
        named = torch.isin(pool.concept, pool.concept[pool.prompted])
        return askable(pool.rated, pool.concept, kind, named, count, rng), named
    if kind in TWO_OF:
        return askable(pool.rated, pool.concept, kind, pool.prompted, count, rng), pool.prompted
    choice = data.indices(pool.trained)
    return choice[torch.randint(len(choice), (count,), generator=rng)], pool.trained


def pairs(
    pool: Pool, icons: torch.Tensor, kind: str, allowed: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(preferred, other) latents of one kind for the captions of `icons`, and P(preferred is better) (B,)."""
    if kind in TWO_OF:
        return rated_pairs(pool.rated, pool.concept, icons, kind, rng)
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
