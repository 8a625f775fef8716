"""The reward model at small scale: what the backbone, its depth and what is trained are worth.

    python -m training.demo.shards --out runs/demo/encoded     # the demo's pairs, after its recipe
    python -m benchmarks.reward_studies --out runs/studies     # trains what is not there yet

Every model is trained by `training.train_drm` on the same demo pairs and judged from its exported file, on
all held-out pairs (48 concepts no model saw), each at the four quarters of sigma. Intervals are 95 %, by
resampling concepts and, where a row has several, seeds.

    ablation   backbone from the generator against fresh weights, equal steps, three seeds
    depth      1 to all blocks kept
    part       all weights, LoRA, head alone: accuracy against pairs seen
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from drm import DRM, load_drm
from drm.ranges import Count
from training.config import argument
from training.data.batches import HeldOutBatches
from training.data.shards import EncodedPairs
from training.engine.atomic import replace_atomically

CONFIG = "training/configs/drm_demo.yaml"
QUARTERS = 4
SEEDS = (0, 1, 2)
BASE = "runs/demo/encoded"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its folder's name and what differs from drm_demo.yaml."""

    name: str
    settings: tuple[str, ...]


def runs(steps: int) -> list[Run]:
    """All trainings, the most wanted first."""
    short = (f"train.steps={steps}", f"train.save_every={steps}", "train.held_out_pairs=192")
    found = []
    for seed in SEEDS:
        for start, random_backbone in (("generator", "false"), ("random", "true")):
            found.append(
                Run(
                    f"{start}_{seed}",
                    (*short, f"train.seed={seed}", f"model.random_backbone={random_backbone}"),
                )
            )
    found += [Run(f"depth_{kept}", (*short, f"model.num_kept={kept}")) for kept in (1, 2, 4)]
    found += [
        Run("lora", (*short, "model.train=lora", "model.lora_rank=32", "model.lora_alpha=64")),
        Run("head", (*short, "model.train=head", "train.learning_rate=1.0e-3")),
    ]
    return found


def train(run: Run, out: Path) -> Path:
    """The exported model of a run, trained unless it is there."""
    folder = out / run.name
    if not (folder / "reward.safetensors").exists():
        settings = (*run.settings, f"train.out={folder}", "train.evaluate_every=100")
        print(f"training {run.name}", flush=True)
        with open(out / f"{run.name}.log", "w") as log:
            subprocess.run(
                [sys.executable, "-m", "training.train_drm", "--config", CONFIG, *settings],
                check=True,
                stderr=log,
            )
    return folder / "reward.safetensors"


@torch.no_grad()
def margins(drm: DRM, pairs: EncodedPairs, rows: torch.Tensor) -> torch.Tensor:
    """s(chosen) - s(rejected) of every held-out pair at one sigma in each quarter, (pairs, QUARTERS)."""
    data = HeldOutBatches(
        pairs,
        rows,
        rank=0,
        world=1,
        micro_batch=64,
        sigmas_each=QUARTERS,
        t5_length=None,
        text_width=drm.prompt_dim,
        seed=7,
    )
    found = []
    for index in range(len(data)):
        batch = data[index]
        with torch.autocast("cpu", torch.bfloat16):
            win, lose = drm(
                batch.noisy,
                batch.sigma.repeat(2),
                batch.prompt_embeds.repeat(2, 1, 1),
                batch.pooled.repeat(2, 1),
            ).chunk(2)
        found.append((win - lose).float())
    return torch.cat(found)[: data.views].reshape(len(rows), QUARTERS)


def right(path: Path, pairs: EncodedPairs) -> np.ndarray:
    """1, 0.5 or 0 for every held-out pair and quarter; kept beside the model."""
    cache = path.with_name("held_out.npy")
    if not cache.exists():
        rows = torch.argwhere(pairs.columns["held_out"]).flatten()
        margin = margins(load_drm(path), pairs, rows)
        values = (margin > 0).float() + 0.5 * (margin == 0).float()
        np.save(cache, values.numpy())
    return np.load(cache)


def interval(values: np.ndarray, groups: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of values (models, pairs) and its 95 % interval, resampling models and groups of pairs."""
    rng, names = np.random.default_rng(0), np.unique(groups)
    sums = np.stack([values[:, groups == name].sum(axis=1) for name in names], axis=1)
    sizes = np.array([(groups == name).sum() for name in names])
    picked = rng.integers(len(names), size=(draws, len(names)))
    models = rng.integers(len(values), size=(draws, len(values)))
    means = [
        sums[np.ix_(m, g)].sum() / (len(m) * sizes[g].sum()) for m, g in zip(models, picked, strict=True)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def row(values: list[np.ndarray], pairs: EncodedPairs, groups: np.ndarray) -> dict:
    """Accuracy with intervals: overall, by quarter of sigma, by source."""
    stack = np.stack(values)
    rows = torch.argwhere(pairs.columns["held_out"]).flatten().tolist()
    sources = np.array([pairs.columns["source"][r] for r in rows])
    return {
        "accuracy": interval(stack.mean(axis=2), groups),
        "by_sigma": [interval(stack[:, :, quarter], groups) for quarter in range(QUARTERS)],
        "by_source": {
            str(source): interval(stack[:, sources == source].mean(axis=2), groups[sources == source])
            for source in np.unique(sources)
        },
    }


def concepts(pairs: EncodedPairs) -> np.ndarray:
    """Which concept each held-out pair is about, (pairs,)."""
    rows = torch.argwhere(pairs.columns["held_out"]).flatten()
    concept_of = np.array(pairs.meta["concepts"])
    return concept_of[pairs.columns["prompt"][rows].numpy()]


def curve(folder: Path) -> list[list[float]]:
    """[pairs seen, held-out accuracy] along the training of a run."""
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    return [[line["step"] * 32, line["accuracy"]] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--steps", type=argument(Count), default=600)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/reward_studies.json"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = EncodedPairs(BASE)
    groups = concepts(pairs)
    found = {run.name: right(train(run, args.out), pairs) for run in runs(args.steps)}
    rows = {
        "generator": row([found[f"generator_{seed}"] for seed in SEEDS], pairs, groups),
        "random": row([found[f"random_{seed}"] for seed in SEEDS], pairs, groups),
        "generator minus random": row(
            [found[f"generator_{seed}"] - found[f"random_{seed}"] for seed in SEEDS], pairs, groups
        ),
        **{
            f"{kept} blocks": row([found["generator_0" if kept == 3 else f"depth_{kept}"]], pairs, groups)
            for kept in (1, 2, 3, 4)
        },
        **{part: row([found[part]], pairs, groups) for part in ("lora", "head")},
    }
    curves = {
        name: curve(args.out / folder)
        for name, folder in (("full", "generator_0"), ("lora", "lora"), ("head", "head"))
    }
    result = {"steps": args.steps, "batch": 32, "held_out_pairs": len(groups), "rows": rows, "curves": curves}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(args.results, lambda path: path.write_text(json.dumps(result, indent=1)))
    for name, values in rows.items():
        mean, low, high = values["accuracy"]
        quarters = " / ".join(f"{q[0]:.3f}" for q in values["by_sigma"])
        print(f"{name:24s} {mean:.3f} ({low:.3f} to {high:.3f})   by sigma {quarters}")


if __name__ == "__main__":
    main()
