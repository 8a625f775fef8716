"""The generator's own drawings of every caption, and what the raters think of them.

    python -m training.demo.drawings --generator runs/demo/generator --raters runs/demo/raters

Preference pairs of two drawings for one caption are what a reward model meets in a sampler and in
fine-tuning; so each caption is drawn several times, by the ways samplers draw (Euler, SDE noise, much or no
guidance, few steps), and rated. Each LoRA of --policies draws them once more: what a policy does to please
one reward model is what the next one has to see through. Made once, in parts that resume, into
drawings.safetensors beside the generator:

    latents (N, ways, 16, 16, 16) float16, utility (N, ways); N icons in the order of the icons' latents
"""

from __future__ import annotations

import argparse
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
from training.demo.raters import load_raters, utility
from training.shards import replace_atomically

# (steps, cfg, noise level, part of the steps with noise)
WAYS = (
    (12, 1.5, 0.0, 0.0),
    (12, 1.5, 0.7, 1.0),
    (12, 1.5, 1.0, 0.5),
    (10, 1.0, 0.7, 0.5),
    (8, 1.5, 0.7, 1.0),
    (12, 2.5, 0.7, 0.5),
)
BATCH = 64


@torch.no_grad()
def draw_way(
    generator: Generator, tokenizer: Tokenizer, captions: list[str], seeds: list[int], way: tuple
) -> torch.Tensor:
    """Model-space latents (N, 16, 16, 16) of one batch of captions, one seed each."""
    steps, cfg, noise_level, end = way
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


def load_drawings(generator_folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Rated drawings: latents (N, ways, 16, 16, 16) float32 and utility (N, ways)."""
    path = generator_folder / "drawings.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python -m training.demo.drawings` first")
    found = load_file(path)
    return found["latents"].float(), found["utility"]


def captions_of(demo: data.DemoData, icons: list[int]) -> list[str]:
    """The canonical caption of each icon."""
    return [demo.caption(icon) for icon in icons]


def draw_all(
    generator: Generator, tokenizer: Tokenizer, captions: list[str], number: int, way: tuple, path: Path
) -> torch.Tensor:
    """One drawing of every caption, float16, kept in `path`."""
    if not path.exists():
        drawn = []
        for first in tqdm(range(0, len(captions), BATCH), desc=path.stem, mininterval=20):
            seeds = [100_000 * (number + 1) + i for i in range(first, min(first + BATCH, len(captions)))]
            drawn.append(draw_way(generator, tokenizer, captions[first : first + BATCH], seeds, way))
        latents = torch.cat(drawn).half()
        replace_atomically(path, lambda temporary: save_file({"latents": latents}, temporary))
    return load_file(path)["latents"]


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
    captions, asked = captions_of(demo, icons), torch.from_numpy(demo.concept[icons])
    generator, tokenizer = load_generator(args.generator)
    parts = [
        draw_all(generator, tokenizer, captions, n, way, args.generator / f"drawings_{n}.safetensors")
        for n, way in enumerate(WAYS)
    ]
    for lora in sorted(args.policies):
        weights, _ = load_lora(lora)
        generator.transformer.load_lora_adapter(weights, prefix="transformer")
        path = args.generator / f"drawings_{lora.stem}.safetensors"
        parts.append(draw_all(generator, tokenizer, captions, len(WAYS), WAYS[0], path))
        generator.transformer.unload_lora()
    autoencoder, raters = AutoencoderTiny.from_pretrained(args.autoencoder), load_raters(args.raters)
    rated = [utility(raters, decode(autoencoder, part.float(), statistics), asked) for part in parts]
    result = {"latents": torch.stack(parts, 1), "utility": torch.stack(rated, 1)}
    replace_atomically(
        args.generator / "drawings.safetensors", lambda temporary: save_file(result, temporary)
    )
    print(
        f"{len(icons)} captions drawn {len(parts)} times, mean utility {result['utility'].mean(0).tolist()}"
    )


if __name__ == "__main__":
    main()
