"""What the demo's reward model learns from: the generator's drawings of captions, rated by the rater, and
scenes that answer a caption beside scenes that are wrong by one edit.

Each caption is drawn once in every way samplers draw (Euler and SDE, little and much guidance, fewer
steps). Two drawings of a caption that differ in errors are a pair, the one with fewer preferred. Made in
parts that resume; then written as encoded shards, which training.train_drm reads. Pairs of the captions kept
back are its held-out ones.

    drawings/00000.safetensors   latents (captions, ways, 16, 16, 16) float16, errors (captions, ways)
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.data import shards
from training.demo import text
from training.demo.detector import Detector, opinions
from training.demo.fit import once
from training.demo.generator import Generator, decode, draw
from training.demo.rendered import in_processes, renderer
from training.demo.scenes import SIZE, Caption, Placed, edited, place, trained_caption

# (steps, guidance, noise level)
WAYS = ((16, 3.0, 0.0), (16, 3.0, 0.7), (12, 1.5, 0.0), (12, 1.5, 0.7), (14, 4.0, 0.7), (12, 2.0, 1.0))
SHARES = (0.08, 0.34, 0.17, 0.26, 0.15)  # of the kinds, between what is trained on and what is asked
CAPTIONS = 1024 if torch.cuda.is_available() else 64  # of one part
KEPT_BACK = 20  # every so many-th caption is held out
EDITS = 2  # pairs of scenes a caption gets
CHUNK = 64  # captions whose scenes are rendered and encoded at a time


def captions_of(part: int) -> list[Caption]:
    """What one part draws."""
    rng = np.random.default_rng([4, part])
    return [trained_caption(rng, SHARES) for _ in range(CAPTIONS)]


def draw_part(
    part: int,
    generator: Generator,
    tokenizer: Tokenizer,
    autoencoder: AutoencoderTiny,
    statistics: dict[str, float],
    rater: Detector,
) -> dict[str, torch.Tensor]:
    """Latents and errors of one part."""
    captions = captions_of(part)
    asked, found = [str(caption) for caption in captions], []
    for number, (steps, cfg, noise) in enumerate(WAYS):
        first = 1_000_000 + (part * len(WAYS) + number) * CAPTIONS
        seeds = list(range(first, first + CAPTIONS))
        found.append(
            draw(generator, tokenizer, asked, seeds, steps=steps, cfg=cfg, noise_level=noise, batch=CAPTIONS)
        )
    latents = torch.stack(found, 1)
    pictures = decode(autoencoder, latents.flatten(0, 1), statistics)
    rated = opinions(rater, pictures, [caption for caption in captions for _ in WAYS])
    errors = torch.tensor([opinion.errors for opinion in rated]).reshape(CAPTIONS, len(WAYS))
    return {"latents": latents.half().cpu().contiguous(), "errors": errors}


def draw_all(
    out: Path,
    minutes: float,
    generator: Generator,
    tokenizer: Tokenizer,
    autoencoder: AutoencoderTiny,
    statistics: dict[str, float],
    rater: Detector,
) -> int:
    """As many parts as fit into the minutes; how many that is."""
    counted, family = out / "drawings.json", (generator, tokenizer, autoencoder, statistics, rater)

    def made(part: int) -> None:
        path = out / "drawings" / f"{part:05d}.safetensors"
        once(path, lambda temporary: save_file(draw_part(part, *family), temporary))

    if not counted.exists():
        made(0)
        begun = time.monotonic()
        made(1)
        parts = max(2, round(60 * minutes / max(1e-3, time.monotonic() - begun)))
        once(counted, lambda path: path.write_text(json.dumps({"parts": parts})))
    parts = json.loads(counted.read_text())["parts"]
    for part in range(parts):
        made(part)
    return parts


def ranked_pairs(errors: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(better, worse) of all drawings of a caption that differ in errors (ways,)."""
    for a, b in itertools.combinations(range(len(errors)), 2):
        if errors[a] != errors[b]:
            yield (a, b) if errors[a] < errors[b] else (b, a)


def edits(source: Path, captions: Sequence[Caption], seed: int) -> np.ndarray:
    """Of each caption in turn, EDITS times a scene that answers it and one that is wrong by one edit, (N, H,
    W, 3) uint8.
    """
    rng, draw_scene = np.random.default_rng([5, seed]), renderer(source).picture
    scenes: list[Sequence[Placed]] = []
    for caption in captions:
        for _ in range(EDITS):
            scenes += [place(caption, rng), place(edited(caption, rng), rng)]
    return np.stack([draw_scene(scene) for scene in scenes])


def write_encoded(
    out: Path,
    parts: int,
    encode: Callable[[np.ndarray], torch.Tensor],
    generator: Generator,
    tokenizer: Tokenizer,
) -> Path:
    """OUT/encoded, for training.train_drm. encode(pictures) -> model-space latents."""
    folder = out / "encoded"
    if (folder / "meta.json").exists():
        return folder
    columns: dict[str, list] = {name: [] for name in shards.COLUMNS}
    captions = [caption for part in range(parts) for caption in captions_of(part)]
    pictures = 0

    def add(prompt: int, pairs: list[tuple[int, int]], source: str, weight: float) -> None:
        held_out = str(captions[prompt]) in kept_back
        for chosen, rejected in pairs:
            row = (prompt, pictures + chosen, pictures + rejected, weight, 1.0, source, held_out)
            for name, value in zip(shards.COLUMNS, (*row, f"{source}: {captions[prompt]}"), strict=True):
                columns[name].append(value)

    kept_back = {str(caption) for caption in captions[::KEPT_BACK]}
    for part in range(parts):
        found = load_file(out / "drawings" / f"{part:05d}.safetensors")
        for number, errors in enumerate(found["errors"]):
            pairs = list(ranked_pairs(errors))
            add(part * CAPTIONS + number, pairs, "drawings", 1 / max(1, len(pairs)))
            pictures += len(WAYS)
        shards.write_image_shard(folder, part, found["latents"].flatten(0, 1))
    chunks = [captions[first : first + CHUNK] for first in range(0, len(captions), CHUNK)]
    with in_processes() as pool:
        made = pool.map(edits, itertools.repeat(out / "source"), chunks, range(len(chunks)))
        for number, scenes in enumerate(made):
            shards.write_image_shard(folder, parts + number, encode(scenes).half())
    for prompt in range(len(captions)):
        for _ in range(EDITS):
            add(prompt, [(0, 1)], "edited", 1 / EDITS)
            pictures += 2
    with torch.no_grad():
        ids = text.encode_ids(tokenizer, [str(caption) for caption in captions])
        where = next(generator.parameters()).device
        embeds, pooled = text.embed(generator.text_encoder, ids.to(where))
    shards.write_prompt_shard(folder, 0, {"clip": embeds.half().cpu(), "pooled": pooled.half().cpu()})
    shards.write_pairs(folder, columns)
    meta = {"latent": [16, SIZE // 8, SIZE // 8], "t5_lengths": [], "dtype": "float16", "resolution": SIZE}
    length = tokenizer.padding["length"]
    shards.write_meta(folder, {**meta, "encoders": {"name": "demo"}, "text_length": length})
    return folder
