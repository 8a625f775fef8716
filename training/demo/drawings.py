"""The generator's own drawings of every caption, and what the raters think of them.

    python -m training.demo.drawings --generator runs/demo/generator --raters runs/demo/raters

Preference pairs of two drawings for one caption are what a reward model meets in a sampler and in
fine-tuning. So each caption is drawn several times, by the ways samplers draw (Euler, SDE noise, much or no
guidance, few steps) and by half-trained weights, whose mistakes are those of captions hardly known; captions
whose drawings differ most are drawn again. Each LoRA of --policies draws them once more: what a policy does
to please one reward model is what the next one has to see through. Where a caption names no style, or without
guidance, drawings differ most: "free" and "loose" parts. Two kinds of pictures are meant to keep it from
learning icons by heart: drawings of two captions mixed, and real icons turned, recoloured, blurred and
covered. Made in parts that resume, beside the generator:

    drawings_<part>.safetensors         latents (M, 16, 16, 16) float16, icon (M,): whose caption, a row of
                                        the icons' latents
    rated_drawings_<part>.safetensors   utility (M, concepts) float16: the raters' mean log p of every concept
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from drm import flow, stepwise
from drm.lora import load_lora
from training.demo import data, text
from training.demo.autoencoder import to_float
from training.demo.classifier import augment
from training.demo.generator import (
    SHIFT,
    Generator,
    decode,
    guided_by,
    guided_denoise,
    initial_noise,
    load_generator,
    prepare,
)
from training.demo.loop import bfloat16_autocast
from training.demo.raters import load_raters, log_probabilities
from training.engine.atomic import replace_atomically

# (weights, steps, cfg, noise level, part of the steps with noise)
WAYS = (
    ("final", 12, 1.5, 0.0, 0.0),
    ("final", 12, 1.5, 0.7, 1.0),
    ("final", 12, 1.5, 1.0, 0.5),
    ("final", 10, 1.0, 0.7, 0.5),
    ("final", 8, 1.5, 0.7, 1.0),
    ("final", 12, 2.5, 0.7, 0.5),
    ("snapshot_050", 12, 1.5, 0.0, 0.0),
    ("snapshot_050", 12, 1.5, 0.7, 1.0),
)
HARD, HARD_TIMES, HARD_WAY = 320, 6, ("final", 12, 1.5, 0.7, 0.75)
AGAIN_WAY = ("final", 12, 1.5, 0.7, 0.5)
# parts of so many drawings; a caption's embedding is moved up to so far towards another's
MIXED_PARTS, MIXED, MIXED_WAY, MIXED_UP_TO = 3, 2000, ("final", 8, 1.5, 0.7, 0.5), 0.5
AUGMENTED_PARTS, AUGMENTED_TIMES = 9, 3
# parts of captions that name no style, each caption drawn so many times in one way
FREE_WAYS = (
    ("final", 14, 1.5, 0.0, 0.0),
    ("final", 14, 1.5, 0.7, 0.9),
    ("final", 14, 1.0, 0.0, 0.0),
    ("final", 14, 1.0, 0.7, 0.9),
)
FREE_TIMES = 16
# each caption of a style so many times without guidance, where drawings differ more
LOOSE_TIMES, LOOSE_WAY = 4, ("final", 14, 1.0, 0.7, 0.5)
# parts made by samplers as people set them, so that two of their drawings differ by luck alone
ALIKE = ("0", "1", "2", "5", "hard", "again")
BATCH = 64


@torch.no_grad()
def draw_way(
    generator: Generator, tokenizer: Tokenizer, captions: list[str], seeds: list[int], way: tuple
) -> torch.Tensor:
    """Model-space latents (N, 16, 16, 16) of one batch of captions, one seed each."""
    return _draw(guided_denoise(generator, tokenizer, captions, way[2]), seeds, way)


@torch.no_grad()
def draw_mixed(
    generator: Generator,
    tokenizer: Tokenizer,
    captions: list[str],
    others: list[str],
    share: torch.Tensor,
    seeds: list[int],
    way: tuple,
) -> torch.Tensor:
    """The same of captions whose embeddings are moved towards others' by a share (N,)."""

    def embedded(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return text.embed(generator.text_encoder, text.encode_ids(tokenizer, texts))

    (embeds, pooled), (other_embeds, other_pooled) = embedded(captions), embedded(others)
    no_embeds, no_pooled = embedded([""] * len(captions))
    embeds = torch.cat([torch.lerp(embeds, other_embeds, share[:, None, None]), no_embeds])
    pooled = torch.cat([torch.lerp(pooled, other_pooled, share[:, None]), no_pooled])
    return _draw(guided_by(generator, embeds, pooled, len(captions), way[2]), seeds, way)


def _draw(denoise: Callable, seeds: list[int], way: tuple) -> torch.Tensor:
    _, steps, _, noise_level, end = way
    latents, _ = stepwise.sample_stepwise(
        denoise,
        None,
        initial_noise(seeds),
        flow.schedule(steps, SHIFT),
        num_branches=1,
        noise_level=noise_level,
        end=end,
        item_ids=seeds,
    )
    return latents


@dataclasses.dataclass(frozen=True)
class Drawings:
    """Rated drawings: latents (M, 16, 16, 16) float16, icon (M,), whose caption each draws, utility
    (M, concepts), and the name of the part each is from.
    """

    latents: torch.Tensor
    icon: torch.Tensor
    utility: torch.Tensor
    part: list[str]


def load_drawings(generator_folder: Path) -> Drawings:
    """Every rated part of a folder."""
    parts = sorted(generator_folder.glob("rated_drawings_*.safetensors"))
    if not parts:
        raise FileNotFoundError(
            f"no rated drawings in {generator_folder}: run `python -m training.demo.drawings` first"
        )
    made = [load_file(part.with_name(part.name.removeprefix("rated_"))) for part in parts]
    names = [part.stem.removeprefix("rated_drawings_") for part in parts]
    return Drawings(
        latents=torch.cat([part["latents"] for part in made]),
        icon=torch.cat([part["icon"] for part in made]),
        utility=torch.cat([load_file(part)["utility"] for part in parts]).float(),
        part=[name for name, part in zip(names, made, strict=True) for _ in part["icon"]],
    )


def captions_of(demo: data.DemoData, icons: list[int]) -> list[str]:
    """The canonical caption of each icon."""
    return [demo.caption(icon) for icon in icons]


def free_icons(concept: torch.Tensor) -> list[int]:
    """The first icon of each concept whose caption without a style may be learned from; concept (N,)."""
    asked = set(data.asked_freely(int(concept.max()) + 1))
    first = {int(c): i for i, c in reversed(list(enumerate(concept)))}
    return [first[c] for c in sorted(first) if c not in asked]


def free_captions(demo: data.DemoData, concepts: list[int], seed: int) -> list[str]:
    """A caption that names no style for each of these concepts."""
    rng = torch.Generator().manual_seed(seed)
    return [text.random_caption(demo.words[c], 0, rng, empty=0.0, unstyled=1.0) for c in concepts]


def in_batches(make: Callable[[int, int], torch.Tensor], count: int, name: str) -> torch.Tensor:
    """make(first, last) of `count` pictures, a batch at a time."""
    starts = tqdm(range(0, count, BATCH), desc=name, mininterval=20)
    return torch.cat([make(first, min(first + BATCH, count)) for first in starts])


@torch.no_grad()
def augmented(
    demo: data.DemoData,
    icons: list[int],
    autoencoder: AutoencoderTiny,
    statistics: dict[str, float],
    seed: int,
) -> torch.Tensor:
    """Model-space latents (N, 16, 16, 16) of real icons, each augmented as the judge's and raters' were."""
    rng = torch.Generator().manual_seed(seed)

    def make(first: int, last: int) -> torch.Tensor:
        pictures = augment(to_float(demo.images[icons[first:last]]), rng).clamp(-1, 1)
        with bfloat16_autocast("cpu"):
            raw = autoencoder.encoder(pictures.contiguous(memory_format=torch.channels_last)).float()
        return (raw - statistics["mean"]) / statistics["std"]

    return in_batches(make, len(icons), "augmented")


def rate_part(
    raters: list[torch.nn.Module], autoencoder: AutoencoderTiny, statistics: dict[str, float], path: Path
) -> torch.Tensor:
    """Utility (M, concepts) of the drawings in `path`, kept beside it."""
    rated = path.with_name(f"rated_{path.name}")
    if not rated.exists():
        pictures = decode(autoencoder, load_file(path)["latents"].float(), statistics)
        found = {"utility": log_probabilities(raters, pictures).half()}
        replace_atomically(rated, lambda temporary: save_file(found, temporary))
    return load_file(rated)["utility"].float()


def hardest(utilities: list[torch.Tensor], concept: torch.Tensor, count: int) -> list[int]:
    """The icons whose drawings the raters find most unlike one another: utilities, one drawing of each icon a
    part (N, concepts); concept (N,).
    """
    own = torch.stack([part.gather(1, concept[:, None])[:, 0] for part in utilities])
    return (own.amax(0) - own.amin(0)).topk(min(count, len(concept))).indices.tolist()


def mixtures(icons: torch.Tensor, seed: int) -> tuple[list[int], list[int], torch.Tensor]:
    """What one part mixes: whose caption, with whose, and how far it is moved there (MIXED,)."""
    rng = torch.Generator().manual_seed(seed)
    mine, theirs = (icons[torch.randint(len(icons), (MIXED,), generator=rng)] for _ in range(2))
    return mine.tolist(), theirs.tolist(), MIXED_UP_TO * torch.rand(MIXED, generator=rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--raters", type=Path, default=Path("runs/demo/raters"))
    parser.add_argument("--policies", type=Path, nargs="*", default=[], help="LoRA files of Step-GRPO")
    args = parser.parse_args()

    demo = data.load(args.data)
    cached, statistics = prepare(args.generator, args.data, args.autoencoder)
    icons = cached["icon"].tolist()
    captions, concept = captions_of(demo, icons), torch.from_numpy(demo.concept[icons])
    raters, autoencoder = load_raters(args.raters), AutoencoderTiny.from_pretrained(args.autoencoder)
    every = list(range(len(icons)))

    def make(name: str, which: list[int], work: Callable[[], torch.Tensor]) -> torch.Tensor:
        path = args.generator / f"drawings_{name}.safetensors"
        if not path.exists():
            found = {"latents": work().half().contiguous(), "icon": torch.tensor(which)}
            replace_atomically(path, lambda temporary: save_file(found, temporary))
        return rate_part(raters, autoencoder, statistics, path)

    def draw(
        name: str,
        which: list[int],
        seed: int,
        way: tuple,
        *,
        lora: Path | None = None,
        captions: list[str] | None = None,
    ) -> torch.Tensor:
        named = captions or captions_of(demo, [icons[i] for i in which])

        def work() -> torch.Tensor:
            generator, tokenizer = load_generator(args.generator, way[0])
            if lora is not None:
                generator.transformer.load_lora_adapter(load_lora(lora)[0], prefix="transformer")
            return in_batches(
                lambda first, last: draw_way(
                    generator,
                    tokenizer,
                    named[first:last],
                    [seed + i for i in range(first, last)],
                    way,
                ),
                len(which),
                name,
            )

        return make(name, which, work)

    found = [draw(str(n), every, 100_000 * (n + 1), way) for n, way in enumerate(WAYS)]
    hard = hardest(found, concept, HARD)
    draw("hard", hard * HARD_TIMES, 5_000_000, HARD_WAY)
    for number, lora in enumerate(sorted(args.policies)):
        draw(lora.stem, every, 6_000_000 + 100_000 * number, WAYS[0], lora=lora)

    roles = data.roles(demo, np.array(icons))
    known = ~roles.foreign & (~roles.held_out | roles.practice)
    draw("again", data.indices(known).tolist(), 8_500_000, AGAIN_WAY)
    for number in range(MIXED_PARTS):
        seed = 8_000_000 + 10_000 * number
        mine, theirs, share = mixtures(data.indices(known), seed)

        def mix(mine: list[int] = mine, theirs: list[int] = theirs, share=share, seed=seed) -> torch.Tensor:
            generator, tokenizer = load_generator(args.generator, MIXED_WAY[0])
            return in_batches(
                lambda first, last: draw_mixed(
                    generator,
                    tokenizer,
                    [captions[i] for i in mine[first:last]],
                    [captions[i] for i in theirs[first:last]],
                    share[first:last],
                    [seed + i for i in range(first, last)],
                    MIXED_WAY,
                ),
                len(mine),
                "mixed",
            )

        make(f"mixed_{number}", mine, mix)
    free = free_icons(concept)
    for number, way in enumerate(FREE_WAYS):
        seed = 9_500_000 + 10_000 * number
        named = free_captions(demo, concept[free * FREE_TIMES].tolist(), seed)
        draw(f"free_{number}", free * FREE_TIMES, seed, way, captions=named)
    draw("loose", data.indices(~roles.aside).tolist() * LOOSE_TIMES, 9_900_000, LOOSE_WAY)
    shown = data.indices(~roles.aside & ~roles.held_out).tolist() * AUGMENTED_TIMES
    for number in range(AUGMENTED_PARTS):

        def augment_icons(number: int = number) -> torch.Tensor:
            return augmented(demo, [icons[i] for i in shown], autoencoder, statistics, 5 + number)

        make(f"augmented_{number}", shown, augment_icons)
    means = [round(part.gather(1, concept[:, None]).mean().item(), 2) for part in found]
    print(f"{len(icons)} captions drawn in {len(WAYS)} ways, mean utility {means}; {len(hard)} drawn again")


if __name__ == "__main__":
    main()
