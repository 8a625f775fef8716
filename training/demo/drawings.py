"""The generator's own drawings of every caption, and what the raters think of them.

    python -m training.demo.drawings --generator runs/demo/generator --raters runs/demo/raters

Preference pairs of two drawings for one caption are what a reward model meets in a sampler and in
fine-tuning. So each caption is drawn several times, by the ways samplers draw (Euler, SDE noise, much or no
guidance, few steps) and by half-trained weights, whose mistakes are those of captions hardly known; captions
whose drawings differ most are drawn again. Each LoRA of --policies draws them once more: what a policy does
to please one reward model is what the next one has to see through. Made in parts that resume, beside the
generator:

    drawings_<part>.safetensors         latents (M, 16, 16, 16) float16, icon (M,): whose caption, a row of
                                        the icons' latents
    rated_drawings_<part>.safetensors   utility (M, concepts) float16: the raters' mean log p of every concept
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from drm import flow, stepwise
from drm.lora import load_lora
from training.demo import data
from training.demo.generator import (
    SHIFT,
    Generator,
    decode,
    guided_denoise,
    initial_noise,
    load_generator,
    prepare,
)
from training.demo.raters import load_raters, log_probabilities
from training.shards import replace_atomically

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
BATCH = 64


@torch.no_grad()
def draw_way(
    generator: Generator, tokenizer: Tokenizer, captions: list[str], seeds: list[int], way: tuple
) -> torch.Tensor:
    """Model-space latents (N, 16, 16, 16) of one batch of captions, one seed each."""
    _, steps, cfg, noise_level, end = way
    latents, _ = stepwise.sample_stepwise(
        guided_denoise(generator, tokenizer, captions, cfg),
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
    """Rated drawings: latents (M, 16, 16, 16) float16, icon (M,), whose caption each draws, and utility
    (M, concepts).
    """

    latents: torch.Tensor
    icon: torch.Tensor
    utility: torch.Tensor


def load_drawings(generator_folder: Path) -> Drawings:
    """Every rated part of a folder."""
    parts = sorted(generator_folder.glob("rated_drawings_*.safetensors"))
    if not parts:
        raise FileNotFoundError(
            f"no rated drawings in {generator_folder}: run `python -m training.demo.drawings` first"
        )
    made = [load_file(part.with_name(part.name.removeprefix("rated_"))) for part in parts]
    utility = torch.cat([load_file(part)["utility"] for part in parts]).float()
    return Drawings(
        torch.cat([part["latents"] for part in made]), torch.cat([part["icon"] for part in made]), utility
    )


def captions_of(demo: data.DemoData, icons: list[int]) -> list[str]:
    """The canonical caption of each icon."""
    return [demo.caption(icon) for icon in icons]


def draw_part(
    generator: Generator,
    tokenizer: Tokenizer,
    captions: list[str],
    icons: list[int],
    first_seed: int,
    way: tuple,
    path: Path,
) -> None:
    """One drawing of each of `captions`, kept in `path`; icons: whose they are."""
    if path.exists():
        return
    drawn = []
    for first in tqdm(range(0, len(captions), BATCH), desc=path.stem, mininterval=20):
        seeds = [first_seed + i for i in range(first, min(first + BATCH, len(captions)))]
        drawn.append(draw_way(generator, tokenizer, captions[first : first + BATCH], seeds, way))
    made = {"latents": torch.cat(drawn).half(), "icon": torch.tensor(icons)}
    replace_atomically(path, lambda temporary: save_file(made, temporary))


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

    def make(name: str, which: list[int], seed: int, way: tuple, lora: Path | None = None) -> torch.Tensor:
        path = args.generator / f"drawings_{name}.safetensors"
        if not path.exists():
            generator, tokenizer = load_generator(args.generator, way[0])
            if lora is not None:
                generator.transformer.load_lora_adapter(load_lora(lora)[0], prefix="transformer")
            draw_part(generator, tokenizer, [captions[i] for i in which], which, seed, way, path)
        return rate_part(raters, autoencoder, statistics, path)

    found = [make(str(n), every, 100_000 * (n + 1), way) for n, way in enumerate(WAYS)]
    hard = hardest(found, concept, HARD)
    make("hard", hard * HARD_TIMES, 5_000_000, HARD_WAY)
    for number, lora in enumerate(sorted(args.policies)):
        make(lora.stem, every, 6_000_000 + 100_000 * number, WAYS[0], lora)
    means = [round(part.gather(1, concept[:, None]).mean().item(), 2) for part in found]
    print(f"{len(icons)} captions drawn in {len(WAYS)} ways, mean utility {means}; {len(hard)} drawn again")


if __name__ == "__main__":
    main()
