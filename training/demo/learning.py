"""How the demo's networks learn from rendered scenes: autoencoder, judge and rater, generator.

Each is made once for a folder, goes on where it was stopped, and ends as OUT/<name>.safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from drm import flow
from training.demo import autoencoder as ae
from training.demo import text
from training.demo.detector import (
    Detector,
    augmented,
    build_judge,
    build_rater,
    detection_loss,
    opinions,
    targets,
)
from training.demo.fit import device, fit, in_bfloat16, once
from training.demo.generator import SHIFT, Generator, decode, draw, grid
from training.demo.rendered import SMALL, Shown, load_set, renderer, save_array
from training.demo.scenes import benchmark_captions, edited, place, random_caption, things

TOKENS = 16
SMALL_EVERY = 3  # every third step of the generator is one of single things
UNCAPTIONED = 0.1
DECODED = 4000  # pictures the detectors also see as the autoencoder hands them on


# --- autoencoder


def make_autoencoder(out: Path, minutes: float, warm: Path | None) -> AutoencoderTiny:
    """Trained; of a warm start the decoder alone, since the latents are what a warm generator knows."""
    path = out / "autoencoder.safetensors"
    network = ae.build_autoencoder()
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.requires_grad_(False).eval().to(device())
    if warm:
        network.load_state_dict({k: v.float() for k, v in load_file(warm / path.name).items()})
        network.encoder.requires_grad_(False)
    network = network.to(device(), memory_format=torch.channels_last)
    pictures, alone = (np.load(out / f"{name}.npy", mmap_mode="r") for name in ("trained", "small"))
    batch = 4 if device().type == "cpu" else 64
    shown = ae.to_float(pictures[-64:]).to(device(), memory_format=torch.channels_last)

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        draws = torch.Generator().manual_seed(rng.initial_seed())
        parts = [ae.batch_of(p, np.arange(len(p)), batch, SMALL, draws) for p in (pictures, alone)]
        seen = torch.cat(parts).to(device(), memory_format=torch.channels_last)
        with in_bfloat16(device()):
            latents = network.encoder(seen).float()
            noise = torch.randn(latents.shape, generator=rng, device=rng.device)
            output = network.decoder(latents + ae.LATENT_NOISE * noise).float()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        prior = mean.square().mean() + std.clamp_min(1e-3).log().square().mean()
        return ae.reconstruction_loss(output, seen) + 0.01 * prior

    def look(step: int, network: AutoencoderTiny) -> None:
        with torch.no_grad(), in_bfloat16(device()):
            output = network.decoder(network.encoder(shown)).float()
        print(f"\nautoencoder, step {step}: {ae.psnr(output, shown):.1f} dB", flush=True)

    rate = 4e-4 if warm else 1e-3
    fit(
        network,
        loss,
        out / "autoencoder",
        name="autoencoder",
        minutes=minutes,
        learning_rate=rate,
        weight_decay=0.0,
        ema=0.995,
        looked_at=look,
    )
    weights = {k: v.float().contiguous().cpu() for k, v in network.state_dict().items()}
    once(path, lambda temporary: save_file(weights, temporary))
    return network.requires_grad_(False)


def on_device(pictures: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], where the networks are."""
    there = torch.from_numpy(np.array(pictures)).to(device())
    return there.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode(network: AutoencoderTiny, pictures: np.ndarray, batch: int = 256) -> torch.Tensor:
    """Raw latents (N, 16, H / 8, W / 8) in half precision."""
    parts = []
    for first in range(0, len(pictures), batch):
        with in_bfloat16(device()):
            parts.append(network.encoder(on_device(pictures[first : first + batch])).half().cpu())
    return torch.cat(parts)


def latents_of(out: Path, network: AutoencoderTiny) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Model-space latents of the sets the generator learns from, and the mean and std taken out of them."""

    def make(path: Path) -> None:
        raw = {
            name: encode(network, np.load(out / f"{name}.npy", mmap_mode="r"))
            for name in ("trained", "small")
        }
        statistics = {
            "mean": raw["trained"].float().mean().item(),
            "std": raw["trained"].float().std().item(),
        }
        scaled = {k: (v.float() - statistics["mean"]) / statistics["std"] for k, v in raw.items()}
        header = {k: repr(v) for k, v in statistics.items()}
        save_file({k: v.half().contiguous() for k, v in scaled.items()}, path, metadata=header)

    path = once(out / "latents.safetensors", make)
    with safe_open(path, "pt") as file:
        statistics = {k: float(v) for k, v in file.metadata().items()}
    return load_file(path), statistics


# --- judge and rater


def make_detector(out: Path, name: str, minutes: float, network: AutoencoderTiny) -> Detector:
    """The judge or the rater, in eval mode."""
    detector = build_judge() if name == "judge" else build_rater()
    path = out / f"{name}.safetensors"
    if not path.exists():
        _train_detector(out, name, detector, minutes, network)
        weights = {k: v.contiguous().cpu() for k, v in detector.state_dict().items()}
        once(path, lambda temporary: save_file(weights, temporary))
    detector.load_state_dict(load_file(path))
    return detector.requires_grad_(False).eval().to(device(), memory_format=torch.channels_last)


def _train_detector(
    out: Path, name: str, detector: Detector, minutes: float, network: AutoencoderTiny
) -> None:
    shown = load_set(out, "any")
    kept_back = 512
    count = len(shown.pictures) - kept_back
    handed_on = _decoded(out, network, shown.pictures[: min(DECODED, count)])
    detector.to(device(), memory_format=torch.channels_last)
    batch = 64 if device().type == "cpu" else 256
    # on a GPU compiling costs as long as the run
    forward = torch.compile(detector) if device().type == "cpu" else detector

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        real = torch.randint(count, (batch // 2,), generator=rng, device=rng.device).tolist()
        decoded = torch.randint(len(handed_on), (batch - len(real),), generator=rng, device=rng.device)
        decoded = decoded.tolist()
        pixels = np.concatenate([shown.pictures[sorted(real)], handed_on[sorted(decoded)]])
        scenes = [shown.scenes[i] for i in (*sorted(real), *sorted(decoded))]
        seen = augmented(on_device(pixels), rng).contiguous(memory_format=torch.channels_last)
        with in_bfloat16(device()):
            logits = forward(seen)
        return detection_loss(logits.float(), targets(scenes))

    def look(step: int, detector: Detector) -> None:
        figures = sureness(detector, shown, range(count, count + kept_back), out / "source", network)
        print(f"\n{name}, step {step}: {figures}", flush=True)
        once(out / name / f"figures_{step:06d}.json", lambda path: path.write_text(json.dumps(figures)))

    seed = 11 if name == "judge" else 12
    fit(
        detector,
        loss,
        out / name,
        name=name,
        minutes=minutes,
        learning_rate=2e-3,
        seed=seed,
        weight_decay=0.05,
        ema=0.99,
        looked_at=look,
    )


def _decoded(out: Path, network: AutoencoderTiny, pictures: np.ndarray) -> np.ndarray:
    """The pictures as the autoencoder hands them on, kept in OUT."""

    def make(path: Path) -> None:
        raw = encode(network, pictures).float()
        save_array(path, decode(network, raw.to(device()), {"mean": 0.0, "std": 1.0}))

    return np.load(once(out / "handed_on.npy", make), mmap_mode="r")


def sureness(
    detector: Detector, shown: Shown, which: range, source: Path, network: AutoencoderTiny
) -> dict[str, float]:
    """The share of scenes a detector calls right: real ones, those the autoencoder hands on, and those
    that are wrong by one edit.
    """
    captions = [shown.captions[n] for n in which]
    real = np.stack([shown.pictures[n] for n in which])
    handed_on = decode(network, encode(network, real).float().to(device()), {"mean": 0.0, "std": 1.0})
    rng = np.random.default_rng(7)
    wrong = np.stack([renderer(source).picture(place(edited(caption, rng), rng)) for caption in captions])
    found = {"real": real, "handed_on": handed_on, "wrong_by_one": wrong}
    return {
        name: round(float(np.mean([o.errors == 0 for o in opinions(detector, pictures, captions)])), 4)
        for name, pictures in found.items()
    }


# --- generator


def tokenizer_for(warm: Path | None) -> Tokenizer:
    """The warm start's tokenizer, or one of this world's words."""
    if warm:
        with safe_open(warm / "generator.safetensors", "pt") as file:
            return text.of_length(Tokenizer.from_str(file.metadata()["tokenizer"]), TOKENS)
    rng = np.random.default_rng(0)
    named = [f"{thing.word} {thing.plural}" for thing in things()] * 10
    return text.tokenizer_of([*named, *(str(random_caption(rng)) for _ in range(4000))], TOKENS)


def make_generator(
    out: Path, minutes: float, warm: Path | None, network: AutoencoderTiny
) -> tuple[Generator, Tokenizer, dict[str, float]]:
    """Transformer and text encoder, their tokenizer, and the statistics of their latents."""
    path = out / "generator.safetensors"
    latents, statistics = latents_of(out, network)
    tokenizer = tokenizer_for(warm)
    torch.manual_seed(0)
    model = Generator(tokenizer)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.requires_grad_(False).eval().to(device()), tokenizer, statistics
    if warm:
        model.load_state_dict(_fitting(load_file(warm / path.name), model))
    _train_generator(out, model.to(device()), tokenizer, latents, statistics, minutes, warm, network)
    weights = {k: v.float().contiguous().cpu() for k, v in model.state_dict().items()}
    once(path, lambda temporary: save_file(weights, temporary, metadata={"tokenizer": tokenizer.to_str()}))
    return model.requires_grad_(False), tokenizer, statistics


def _fitting(weights: dict[str, torch.Tensor], model: Generator) -> dict[str, torch.Tensor]:
    """The weights in float32, of the position embeddings as many as the model has."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    return {k: (v[: shapes[k][0]] if "position_embedding" in k else v).float() for k, v in weights.items()}


def _train_generator(
    out: Path,
    model: Generator,
    tokenizer: Tokenizer,
    latents: dict[str, torch.Tensor],
    statistics: dict[str, float],
    minutes: float,
    warm: Path | None,
    network: AutoencoderTiny,
) -> None:
    where = device()
    captions = {name: (out / f"{name}.txt").read_text().split("\n") for name in latents}
    ids = {name: text.encode_ids(tokenizer, captions[name]).to(where) for name in latents}
    latents = {name: values.to(where) for name, values in latents.items()}
    nothing = text.encode_ids(tokenizer, [""])[0].to(where)
    forward = torch.compile(model, dynamic=False)
    batch = {"trained": 64, "small": 160} if where.type == "cpu" else {"trained": 1024, "small": 2048}

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        name = "small" if step % SMALL_EVERY == SMALL_EVERY - 1 else "trained"
        size = batch[name]
        picked = torch.randint(len(latents[name]), (size,), generator=rng, device=where)
        asked = ids[name][picked]
        asked[torch.rand(size, generator=rng, device=where) < UNCAPTIONED] = nothing
        x0 = latents[name][picked].float()
        noise = torch.randn(x0.shape, generator=rng, device=where)
        # stratified over the batch: the same sigmas a uniform draw gives, with less variance in the loss
        spread = torch.arange(size, device=where) + torch.rand(size, generator=rng, device=where)
        sigma = flow.shift_sigmas(spread / size, SHIFT)
        with in_bfloat16(where):
            output = forward(flow.add_noise(x0, noise, sigma), sigma, asked).float()
        return (output - (noise - x0)).square().mean()

    asked = [str(caption) for caption in benchmark_captions(40)]

    def look(step: int, model: Generator) -> None:
        drawn = draw(model, tokenizer, asked, list(range(len(asked))))
        image = grid(decode(network, drawn.to(where), statistics), 8)
        once(out / "generator" / f"grid_{step:06d}.png", lambda path: image.save(path, "PNG"))

    fit(
        model,
        loss,
        out / "generator",
        name="generator",
        minutes=minutes,
        learning_rate=8e-4 if where.type == "cpu" else 2e-3,
        seed=3,
        looked_at=look,
    )
