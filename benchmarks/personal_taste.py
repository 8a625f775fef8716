"""How fast a reward model's head learns a new taste: 10, 100 and 1,000 personal pairs.

    python -m benchmarks.personal_taste --out runs/tastes      # after the demo recipe, see models/README.md

Two pictures of the same thing in two styles, "which do you like?", answered by a synthetic person:

    cold     likes the picture whose coloured pixels have less red and more blue: lower mean of R - B
    busy     likes the picture with more edges: higher mean absolute difference of neighbouring pixels

The shipped demo reward model goes on with the head alone (training/configs/drm_own_taste.yaml's recipe, 200
steps of 16 pairs). Accuracy is on all pairs of 48 things none of whose pictures were answered for, at one
sigma in each quarter; three seeds, each with pairs of its own; intervals resample things and seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.reward_studies import CONFIG, QUARTERS, interval, margins
from drm import load_drm
from training.config import LearningRate, argument
from training.data import shards
from training.data.shards import EncodedPairs
from training.demo import data, text
from training.demo.generator import load_generator
from training.demo.pairs import Pool, make_pool, without_concepts
from training.engine.atomic import replace_atomically

SIZES, SEEDS = (10, 100, 1000), (0, 1, 2)
BASE = "models/drm/drm_demo_emoji.safetensors"


def coldness(pictures: np.ndarray) -> np.ndarray:
    """-(mean R - B) over pixels that are not white, of (N, H, W, 3) uint8."""
    red_blue = pictures[..., 0].astype(np.float32) - pictures[..., 2]
    inked = pictures.min(axis=-1) < 240
    return -(red_blue * inked).sum(axis=(1, 2)) / np.maximum(inked.sum(axis=(1, 2)), 1)


def busyness(pictures: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels of (N, H, W, 3) uint8."""
    values = pictures.astype(np.float32)
    return sum(np.abs(np.diff(values, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2))


TASTES = {"cold": coldness, "busy": busyness}


def write_taste(folder: Path, liking: np.ndarray, pool: Pool, embeds, pooled) -> None:
    """The encoded folder of one person: every two styles of every thing, the liked one chosen."""
    columns: dict[str, list] = {name: [] for name in shards.COLUMNS}
    for concept in pool.concept.unique().tolist():
        icons = data.indices(pool.concept == concept).tolist()
        for one, two in itertools.combinations(icons, 2):
            chosen, rejected = (one, two) if liking[one] > liking[two] else (two, one)
            values = (concept, chosen, rejected, 1.0, 1.0, "taste", bool(pool.tested[one]), f"{one} {two}")
            for name, value in zip(shards.COLUMNS, values, strict=True):
                columns[name].append(value)
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_image_shard(folder, 0, pool.real.half())
    shards.write_prompt_shard(folder, 0, {"clip": embeds.half(), "pooled": pooled.half()})
    shards.write_pairs(folder, columns)
    shards.write_meta(
        folder, {"latent": list(pool.real.shape[1:]), "t5_lengths": [], "text_length": text.LENGTH}
    )


@torch.no_grad()
def prepare(out: Path) -> None:
    """Both persons' answers."""
    demo, runs = data.load(Path("runs/demo/data")), Path("runs/demo")
    pool = make_pool(runs / "generator", runs / "data", runs / "autoencoder/final")
    pool = without_concepts(pool, data.held_out_concepts(len(demo.names)))
    generator, tokenizer = load_generator(runs / "generator")
    captions = [f"a {words[0]}" for words in demo.words]
    embeds, pooled = text.embed(generator.text_encoder, text.encode_ids(tokenizer, captions))
    icons = np.flatnonzero(demo.concept >= 0)
    for name, liking in TASTES.items():
        scores = np.concatenate([liking(demo.images[part]) for part in np.array_split(icons, 16)])
        write_taste(out / name, scores, pool, embeds, pooled)


def accuracy(model: Path | str, pairs: EncodedPairs) -> np.ndarray:
    """1, 0.5 or 0 for each held-out pair, averaged over the quarters of sigma."""
    rows = torch.argwhere(pairs.columns["held_out"]).flatten()
    margin = margins(load_drm(model), pairs, rows)
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(dim=1).numpy()


def fit(out: Path, taste: str, size: int, seed: int, rate: float) -> Path:
    """The head trained on `size` answers."""
    folder = out / f"{taste}_{size}_{seed}"
    settings = {
        "model.base": BASE,
        "model.train": "head",
        "data.encoded": out / taste,
        "data.limit": size,
        "train.out": folder,
        "train.steps": 200,
        "train.global_batch": 16,
        "train.micro_batch": 16,
        "train.learning_rate": rate,
        "train.warmup": 20,
        "train.ema": 0.95,
        "train.save_every": 200,
        "train.evaluate_every": "null",
        "train.held_out_pairs": 16,
        "train.seed": seed,
    }
    if not (folder / "reward.safetensors").exists():
        print(f"fitting {folder.name}", flush=True)
        arguments = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "training.train_drm", "--config", CONFIG, *arguments]
        with open(out / f"{folder.name}.log", "w") as log:
            subprocess.run(command, check=True, stderr=log)
    return folder / "reward.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tastes"))
    parser.add_argument("--rate", type=argument(LearningRate), default=3e-4)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/personal_taste.json"))
    args = parser.parse_args()
    if not all((args.out / name / "meta.json").exists() for name in TASTES):
        prepare(args.out)
    table: dict[str, dict] = {}
    for taste in TASTES:
        pairs = EncodedPairs(args.out / taste)
        groups = pairs.columns["prompt"][pairs.columns["held_out"]].numpy()
        table[taste] = {"0": interval(accuracy(BASE, pairs)[None], groups)}
        for size in SIZES:
            models = [fit(args.out, taste, size, seed, args.rate) for seed in SEEDS]
            values = np.stack([accuracy(model, pairs) for model in models])
            table[taste][str(size)] = interval(values, groups)
        cells = "  ".join(f"{size}: {m:.3f} ({a:.3f} to {b:.3f})" for size, (m, a, b) in table[taste].items())
        print(f"{taste:6s} {cells}", flush=True)
    result = {
        "tastes": table,
        "held_out_pairs": len(groups),
        "sigmas": QUARTERS,
        "learning_rate": args.rate,
        "steps": 200,
        "batch": 16,
    }
    replace_atomically(args.results, lambda path: path.write_text(json.dumps(result, indent=1)))


if __name__ == "__main__":
    main()
