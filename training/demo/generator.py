"""The demo generator: a small MMDiT-X of exactly SD3.5's kind and its text encoder, trained together by flow
matching.

    python -m training.demo.generator --data runs/demo/data --autoencoder runs/demo/autoencoder/final --out
    runs/demo/generator

Loss: mean squared error of the velocity, sigma uniform and then shifted by 3 as the stock loader samples it;
a tenth of the captions are dropped so that CFG works. Averaged weights from after 6, 20 and 50 % of the steps
are kept: they draw the reward model's bad examples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from drm import flow, stepwise
from drm.ranges import Count
from training.config import LearningRate, argument
from training.demo import data, text
from training.demo.autoencoder import to_float, to_uint8
from training.demo.loop import LoopConfig, bfloat16_autocast, train

SHIFT = 3.0
SNAPSHOTS = (0.06, 0.2, 0.5)
SAVE_EVERY = 500
PREVIEW = (
    "heart, sun, slice of pizza, cat, pumpkin, soccer ball, tree, clock, key, fish, apple, "
    "rocket, car, guitar, house, ghost"
).split(", ")


def build_transformer() -> SD3Transformer2DModel:
    """MMDiT-X, depth 4, width 256 (ComfyUI reads depth from the width), dual attention in the first two
    blocks.

    adaLN and output projections start at zero, as in DiT.
    """
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        zeroed = (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out"
        )
        if zeroed:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


class Generator(nn.Module):
    """Text encoder and transformer as one module; returns the velocity."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = text.build_text_encoder(tokenizer)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(B, 16, H, W), (B,), (B, 20) -> velocity (B, 16, H, W)."""
        prompt_embeds, pooled = text.embed(self.text_encoder, ids)
        return self.velocity(latents, sigma, prompt_embeds, pooled)

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, prompt_embeds: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """The transformer alone, for samplers that encode a caption once."""
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


@torch.no_grad()
def encode_icons(demo: data.DemoData, autoencoder: AutoencoderTiny, icons: np.ndarray) -> torch.Tensor:
    """Raw autoencoder latents (N, 16, 16, 16) in float32 of the icons given."""
    batches = np.array_split(icons, max(1, len(icons) // 64))
    with bfloat16_autocast("cpu"):
        return torch.cat([autoencoder.encoder(to_float(demo.images[batch])).float() for batch in batches])


@torch.no_grad()
def guided_denoise(
    generator: Generator, tokenizer: Tokenizer, captions: list[str], cfg: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The (x, sigma) -> x0 that a sampler calls for these captions; one network pass a step when cfg is
    1, else two in one batch.
    """
    empty = [""] * len(captions) * (cfg != 1)
    ids = text.encode_ids(tokenizer, captions + empty).to(generator.transformer.device)
    embeds, pooled = text.embed(generator.text_encoder, ids)
    return guided_by(generator, embeds, pooled, len(captions), cfg)


def guided_by(
    generator: Generator, embeds: torch.Tensor, pooled: torch.Tensor, size: int, cfg: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same for `size` prompts by their embeddings, behind them those of empty captions unless cfg is
    1.
    """

    @torch.no_grad()
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        both = x.repeat(len(embeds) // size, 1, 1, 1)
        with bfloat16_autocast(x.device):
            velocity = generator.velocity(both, sigma.expand(len(both)), embeds, pooled).float()
        positive, negative = velocity[:size], velocity[-size:]
        return flow.denoised_from_velocity(x, negative + cfg * (positive - negative), sigma)

    return denoise


def initial_noise(seeds: list[int]) -> torch.Tensor:
    """The starting latents (N, 16, 16, 16) of 128 x 128 pictures, as ComfyUI draws them for a batch of
    one.
    """
    return torch.cat(
        [torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def draw(
    generator: Generator,
    tokenizer: Tokenizer,
    captions: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    cfg: float = 3.0,
    noise_level: float = 0.0,
    batch: int = 64,
) -> torch.Tensor:
    """One picture a caption, by Euler's method or with SDE noise: model-space latents (N, 16, 16, 16)."""
    results = []
    for first in range(0, len(captions), batch):
        denoise = guided_denoise(generator, tokenizer, captions[first : first + batch], cfg)
        some = seeds[first : first + batch]
        latents, _ = stepwise.sample_stepwise(
            denoise,
            None,
            initial_noise(some).to(generator.transformer.device),
            flow.schedule(steps, SHIFT),
            num_branches=1,
            noise_level=noise_level,
            item_ids=some,
        )
        results.append(latents)
    return torch.cat(results)


@torch.no_grad()
def decode(
    autoencoder: AutoencoderTiny, latents: torch.Tensor, statistics: dict[str, float], batch: int = 64
) -> np.ndarray:
    """Model-space latents -> (N, H, W, 3) uint8 pictures."""
    raw = latents * statistics["std"] + statistics["mean"]
    with bfloat16_autocast(latents.device):
        return np.concatenate([to_uint8(autoencoder.decoder(part)) for part in raw.split(batch)])


def grid(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures (N, H, W, 3) row by row into one image."""
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows, 0))


def prepare(
    folder: Path, data_folder: Path, autoencoder_folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Latents of all captioned icons in model space (mean 0, std 1 over the training icons), cached in
    `folder`.
    """
    path = folder / "latents.safetensors"
    statistics_path = folder / "statistics.json"
    if not path.exists():
        demo = data.load(data_folder)
        autoencoder = AutoencoderTiny.from_pretrained(autoencoder_folder)
        icons = np.flatnonzero(demo.concept >= 0)
        raw = encode_icons(demo, autoencoder, icons)
        seen = torch.from_numpy(~demo.held_out[icons])
        statistics = {"mean": raw[seen].mean().item(), "std": raw[seen].std().item()}
        latents = (raw - statistics["mean"]) / statistics["std"]
        statistics_path.write_text(json.dumps(statistics))
        save_file({"icon": torch.from_numpy(icons), "latents": latents.contiguous()}, path)
    return load_file(path), json.loads(statistics_path.read_text())


def load_generator(folder: Path, snapshot: str = "final") -> tuple[Generator, Tokenizer]:
    """A trained generator and its tokenizer, in eval mode."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    generator = Generator(tokenizer)
    generator.load_state_dict(load_file(folder / f"{snapshot}.safetensors"))
    return generator.requires_grad_(False).eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--steps", type=argument(Count), default=6000)
    parser.add_argument("--batch", type=argument(Count), default=64)
    parser.add_argument("--learning-rate", type=argument(LearningRate), default=1.5e-3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    demo = data.load(args.data)
    cached, statistics = prepare(args.out, args.data, args.autoencoder)
    autoencoder = AutoencoderTiny.from_pretrained(args.autoencoder)
    tokenizer = text.train_tokenizer(demo)
    tokenizer.save(str(args.out / "tokenizer.json"))
    model = Generator(tokenizer)
    seen = ~torch.from_numpy(demo.held_out[cached["icon"].numpy()])
    latents, icons = cached["latents"][seen], cached["icon"][seen].tolist()
    velocity = torch.compile(model) if args.compile else model

    def loss_fn(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        picked = torch.randint(len(icons), (args.batch,), generator=rng)
        captions = [
            text.random_caption(demo.words[demo.concept[icons[i]]], demo.style[icons[i]], rng) for i in picked
        ]
        x0 = latents[picked]
        noise = torch.randn(x0.shape, generator=rng)
        # stratified over the batch: the same sigmas a uniform draw gives, with less variance in the loss
        uniform = (torch.arange(args.batch) + torch.rand(args.batch, generator=rng)) / args.batch
        sigma = flow.shift_sigmas(uniform, SHIFT)
        with bfloat16_autocast(x0.device):
            output = velocity(
                flow.add_noise(x0, noise, sigma), sigma, text.encode_ids(tokenizer, captions)
            ).float()
        return (output - (noise - x0)).square().mean(), {}

    marks = {max(1, round(share * args.steps / SAVE_EVERY)) * SAVE_EVERY: share for share in SNAPSHOTS}

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        captions = [f"{word}, {style} style" for style in data.STYLES for word in PREVIEW]
        pictures = decode(
            autoencoder, draw(averaged, tokenizer, captions, list(range(len(captions)))), statistics
        )
        grid(pictures, len(PREVIEW)).save(args.out / f"grid_{step:05d}.png")
        if step in marks:
            save_file(averaged.state_dict(), args.out / f"snapshot_{int(marks[step] * 100):03d}.safetensors")

    config = LoopConfig(
        steps=args.steps,
        learning_rate=args.learning_rate,
        warmup=200,
        decay=0.01,
        weight_decay=0.01,
        ema=0.998,
        save_every=SAVE_EVERY,
    )
    averaged = train(model, loss_fn, config, args.out, name="generator", on_save=on_save)
    temporary = args.out / "final.tmp"
    save_file(averaged.state_dict(), temporary)
    temporary.replace(args.out / "final.safetensors")
    print(f"generator -> {args.out / 'final.safetensors'}")


if __name__ == "__main__":
    main()
