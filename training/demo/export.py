"""The trained demo family as the files that ship, and back.

    python -m training.demo.export --runs runs/demo --out models

writes checkpoints/drm_demo_emoji_sd3.safetensors (ComfyUI's layout, VAE inside),
text_encoders/drm_demo_emoji_clip.safetensors, drm/drm_demo_emoji.safetensors,
judge/drm_demo_judge.safetensors and samples.jpg, all weights in half precision.

The autoencoder's statistics go into vae_scale and vae_shift, so that what the stock SD3 latent format makes
of an encoded picture, (z - 0.0609) * 1.5305, is the standardised latent the generator was trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from drm import DRM, load_drm
from drm.sd3 import comfy_layout
from training.data.decoders import PREFIX_VAE, SD3_SCALE, SD3_SHIFT, autoencoder_in
from training.data.demo_encoders import load_text_encoder
from training.demo import data, text
from training.demo.generator import Generator, decode, draw, grid, load_generator
from training.demo.judge import Judge, load_judge

CHECKPOINT = "checkpoints/drm_demo_emoji_sd3.safetensors"
CLIP = "text_encoders/drm_demo_emoji_clip.safetensors"
REWARD = "drm/drm_demo_emoji.safetensors"
JUDGE = "judge/drm_demo_judge.safetensors"
PREFIX_MODEL = "model.diffusion_model."
SAMPLE_WORDS = (
    "heart, sun, slice of pizza, cat, pumpkin, soccer ball, tree, clock, key, fish, apple, rocket, car, "
    "guitar, house, ghost, "
    "strawberry, butterfly, umbrella, owl, cactus, crown, robot, snowman"
).split(", ")


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Half precision, contiguous, written to a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()},
        temporary,
        metadata=metadata,
    )
    temporary.chmod(0o644)  # safetensors makes files only their owner can read
    os.replace(temporary, path)


def taesd_layout(autoencoder: AutoencoderTiny, statistics: dict[str, float]) -> dict[str, torch.Tensor]:
    """TAESD's names as ComfyUI reads them; its decoder counts the clamp in front as layer 0."""
    tensors = {}
    for key, value in autoencoder.state_dict().items():
        side, _, index, rest = key.split(".", 3)
        tensors[f"taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value
    scale = statistics["std"] * SD3_SCALE
    tensors["vae_scale"] = torch.tensor(scale)
    tensors["vae_shift"] = torch.tensor(SD3_SHIFT - statistics["mean"] / scale)
    return tensors


@dataclasses.dataclass(frozen=True)
class Family:
    """The shipped models, ready to use outside ComfyUI."""

    generator: Generator
    tokenizer: Tokenizer
    autoencoder: AutoencoderTiny
    statistics: dict[str, float]
    drm: DRM
    judge: Judge
    concepts: list[str]

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Model-space latents -> (N, H, W, 3) uint8."""
        return decode(self.autoencoder, latents, self.statistics)


def load_family(models: Path) -> Family:
    """Read the four files; the transformer goes through diffusers' own converter."""
    tokenizer, text_encoder = load_text_encoder(models / CLIP)
    generator = Generator(tokenizer)
    generator.text_encoder = text_encoder
    checkpoint = {k: v.float() for k, v in load_file(models / CHECKPOINT).items()}
    _, weights = comfy_layout.from_comfy_layout(checkpoint)
    generator.transformer.load_state_dict(weights)
    autoencoder, statistics = autoencoder_in(checkpoint)
    judge, concepts = load_judge(models / JUDGE)
    drm = load_drm(models / REWARD).requires_grad_(False)
    return Family(
        generator.requires_grad_(False).eval(), tokenizer, autoencoder, statistics, drm, judge, concepts
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("models"))
    args = parser.parse_args()

    generator, tokenizer = load_generator(args.runs / "generator")
    autoencoder = AutoencoderTiny.from_pretrained(args.runs / "autoencoder/final")
    statistics = json.loads((args.runs / "generator/statistics.json").read_text())
    transformer = comfy_layout.to_comfy_layout(
        generator.transformer.state_dict(), generator.transformer.config
    )
    tensors = {PREFIX_MODEL + key: value for key, value in transformer.items()}
    tensors |= {PREFIX_VAE + key: value for key, value in taesd_layout(autoencoder, statistics).items()}
    save(
        tensors,
        args.out / CHECKPOINT,
        {"format": "pt", "modelspec.title": "DRM demo, emoji", "license": data.LICENCE},
    )
    config = generator.text_encoder.config.to_diff_dict()
    header = {
        "format": "drm-demo-clip",
        "version": "1",
        "config": json.dumps(config),
        "tokenizer": tokenizer.to_str(),
        "license": data.LICENCE,
    }
    save(text.with_prefix(generator.text_encoder.state_dict()), args.out / CLIP, header)
    for source, name in (("reward/reward.safetensors", REWARD), ("judge/judge.safetensors", JUDGE)):
        if (args.runs / source).exists():
            (args.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.runs / source, args.out / name)
    captions = [f"{word}, {style} style" for style in data.STYLES for word in SAMPLE_WORDS]
    pictures = decode(
        autoencoder, draw(generator, tokenizer, captions, list(range(len(captions)))), statistics
    )
    grid(pictures, len(SAMPLE_WORDS)).save(args.out / "samples.jpg", quality=90)
    total = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(f"{total / 2**20:.1f} MiB of weights -> {args.out}")


if __name__ == "__main__":
    main()
