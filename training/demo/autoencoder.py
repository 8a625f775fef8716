"""The demo autoencoder: TAESD's architecture with 16 channels, trained from scratch on the icons.

    python -m training.demo.autoencoder --data runs/demo/data --out runs/demo/autoencoder

Loss: L1 on the pixels, L1 on the finite differences of the picture (edges are what an emoji is), and a pull
of every latent channel's mean and variance towards 0 and 1. The decoder sees slightly noisy latents, because
that is what a sampler will hand it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from drm.ranges import Count
from training.config import argument
from training.demo import data
from training.demo.loop import LoopConfig, bfloat16_autocast, train

LATENT_NOISE = 0.05


def build_autoencoder() -> AutoencoderTiny:
    """TAESD with 16 latent channels: 64 wide, blocks 1/3/3/3 down and 3/3/3/1 up, 2.5 M parameters."""
    return AutoencoderTiny(latent_channels=16)


def to_float(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return pictures.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite differences down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of pixels plus L1 of edges at two scales."""
    loss = F.l1_loss(output, target)
    for scale in (1, 2):
        a, b = (F.avg_pool2d(t, scale) if scale > 1 else t for t in (output, target))
        loss = loss + sum(F.l1_loss(e, f) for e, f in zip(edges(a), edges(b), strict=True))
    return loss


def batch_of(
    images: np.ndarray, pool: np.ndarray, size: int, crop: int, generator: torch.Generator
) -> torch.Tensor:
    """Random icons, random crops of `crop` pixels, half of them mirrored."""
    picked = torch.randint(len(pool), (size,), generator=generator).numpy()
    span = images.shape[1] - crop + 1
    corners = torch.randint(span, (size, 2), generator=generator).tolist()
    pictures = np.stack(
        [images[pool[i]][y : y + crop, x : x + crop] for i, (y, x) in zip(picked, corners, strict=True)]
    )
    batch = to_float(pictures)
    mirrored = torch.rand(size, generator=generator) < 0.5
    batch[mirrored] = batch[mirrored].flip(-1)
    return batch.contiguous(memory_format=torch.channels_last)


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of pictures in [-1, 1]."""
    return (10 * torch.log10(4 / (output.clamp(-1, 1) - target).square().mean((1, 2, 3)))).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/autoencoder"))
    parser.add_argument("--steps", type=argument(Count), default=5000)
    parser.add_argument("--batch", type=argument(Count), default=8)
    parser.add_argument("--crop", type=argument(Count), default=64)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()

    torch.manual_seed(0)
    demo = data.load(args.data)
    images = np.asarray(demo.images)
    pool = np.flatnonzero(~demo.held_out)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    encode, decode = model.encoder, model.decoder
    if args.compile:
        encode, decode = torch.compile(encode), torch.compile(decode)

    def loss_fn(step: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pictures = batch_of(images, pool, args.batch, args.crop, generator)
        with bfloat16_autocast(pictures.device):
            latents = encode(pictures).float()
            noisy = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
            output = decode(noisy).float()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        prior = mean.square().mean() + std.clamp_min(1e-3).log().square().mean()
        loss = reconstruction_loss(output, pictures) + 0.01 * prior
        return loss, {"psnr": psnr(output.detach(), pictures), "std": std.mean().item()}

    held_out = to_float(images[demo.icons(held_out=True)][:64]).contiguous(memory_format=torch.channels_last)

    def on_save(step: int, averaged: torch.nn.Module) -> None:
        with torch.no_grad(), bfloat16_autocast(held_out.device):
            output = averaged.decoder(averaged.encoder(held_out)).float()
        print(f"\nstep {step}: held-out PSNR {psnr(output, held_out):.2f} dB", flush=True)

    config = LoopConfig(
        steps=args.steps, learning_rate=1e-3, decay=0.02, weight_decay=0.0, ema=0.998, save_every=250
    )
    averaged = train(model, loss_fn, config, args.out, name="autoencoder", on_save=on_save)
    averaged.save_pretrained(args.out / "final")
    print(f"autoencoder -> {args.out / 'final'}")


if __name__ == "__main__":
    main()
