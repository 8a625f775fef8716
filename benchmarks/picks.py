"""How well DRM Head Trainer learns a taste from picks on the demo model, and how long it takes.

    python -m benchmarks.picks --out runs/picks               # benchmarks/results/picks.json

The demo model draws batches of four pictures of a thing ("heart", 8 steps, CFG 1, 128 x 128), and a
synthetic person picks the best of each:

    red      likes the picture whose coloured pixels are reddest: mean of R - (G + B) / 2
    busy     likes the picture with more edges: mean absolute difference of neighbouring pixels

The node's own code learns from 10, 100 and 1,000 picks, with its defaults. Accuracy is on the three pairs
that a pick implies for each of 80 things of which no picture was ever picked from, at one sigma in each
quarter, averaged; two seeds, each with picks and weights of its own. Intervals: 95 %, bootstrap over things
and seeds. Times are processor time and wall time of one thread, without the loading of the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.personal_taste import busyness
from benchmarks.reward_studies import interval
from drm.picks import Batch, write_batch
from drm.ranges import Count
from tools.comfy_inside import Pack, load_pack
from tools.comfy_server import ROOT
from training.config import argument
from training.demo.taste import redness, things
from training.engine.atomic import replace_atomically

MODELS = ROOT / "models"
SIZES, TEST, PICTURES = (10, 100, 1000), 80, 4
STEPS, RATE = 300, 3e-4
PART = 60


TASTES = {"red": redness, "busy": busyness}


def asked(count: int) -> list[str]:
    """The thing of each of `count` batches: those of the test, then the others in turn."""
    names = things()
    others = names[TEST:]
    return names[:TEST] + [others[i % len(others)] for i in range(count - TEST)]


class Inside:
    """ComfyUI in this process with the demo model."""

    def __init__(self, out: Path) -> None:
        self.pack: Pack = load_pack()
        self.root = out.resolve()
        import comfy.sd
        import comfy.utils
        import folder_paths

        comfy.utils.PROGRESS_BAR_ENABLED = False
        folder_paths.set_output_directory(str(self.root))
        folder_paths.models_dir = str(self.root / "models")
        self.model, _, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(MODELS / "checkpoints/drm_demo_emoji_sd3.safetensors"), output_vae=True, output_clip=False
        )
        text = MODELS / "text_encoders/drm_demo_emoji_clip.safetensors"
        self.clip = self.pack.module("nodes.demo_clip").load_demo_clip(str(text))

    @torch.inference_mode()
    def draw(self, thing: str, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        """Latents (PICTURES, 16, 16, 16) and their pictures, uint8."""
        import nodes

        positive, negative = (
            self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in (thing, "")
        )
        empty = {"samples": torch.zeros(PICTURES, 16, 16, 16)}
        settings = (seed, 8, 1.0, "euler", "simple", positive, negative, empty)
        latents = nodes.common_ksampler(self.model, *settings)[0]["samples"]
        return latents, (255 * self.vae.decode(latents).clamp(0, 1)).byte().numpy()


def pool(out: Path, inside: Inside, count: int) -> dict[str, torch.Tensor]:
    """latents (count, PICTURES, 16, 16, 16), and how each taste likes every picture (count, PICTURES)."""
    parts = []
    for first in range(0, count, PART):
        path = out / f"pool_{first}.safetensors"
        if not path.exists():
            rows = [
                inside.draw(thing, first + i) for i, thing in enumerate(asked(count)[first : first + PART])
            ]
            found = {"latents": torch.stack([latents for latents, _ in rows]).clone()}
            for name, liking in TASTES.items():
                found[name] = torch.from_numpy(np.stack([liking(pictures) for _, pictures in rows]))
            replace_atomically(path, lambda path, found=found: save_file(found, path))
        parts.append(load_file(path))
    return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}


def write_picks(folder: Path, found: dict[str, torch.Tensor], taste: str, rows: list[int]) -> None:
    """The batches of these rows, the one that the person likes best picked."""
    shutil.rmtree(folder, ignore_errors=True)
    names = asked(len(found["latents"]))
    nothing = [torch.zeros(1, dtype=torch.uint8) for _ in range(PICTURES)]
    for row in rows:
        best = int(found[taste][row].argmax())
        batch = Batch(prompt=names[row], batch_index=tuple(range(PICTURES)), picks=(best,))
        write_batch(folder / f"20260101_000000_{row:08x}.safetensors", batch, found["latents"][row], nothing)


def fit(inside: Inside, name: str, seed: int) -> tuple[Any, dict]:
    """DRM Head Trainer's run on picks of this name, and its seconds of wall and of processor time."""
    node, began = inside.pack.module("nodes.head_trainer"), (time.monotonic(), time.process_time())
    settings = {"steps": STEPS, "rate": RATE, "seed": seed}
    with torch.inference_mode(False), torch.enable_grad():
        run, _ = node.prepare(inside.model, inside.clip, name, "", name, None, None, "", **settings)
        run.facts["accuracy"] = run.train()["accuracy"]
    return run, {"wall": time.monotonic() - began[0], "processor": time.process_time() - began[1]}


def right(inside: Inside, run: Any, found: dict[str, torch.Tensor], taste: str) -> np.ndarray:
    """1, 0.5 or 0 for each pair of the test's things, averaged over the quarters of sigma, (TEST * 3,)."""
    training, tokens = (inside.pack.module(name) for name in ("drm.head_training", "nodes.picked_tokens"))
    batches = [
        training.Compared(
            prompt=asked(TEST)[row],
            picks=(int(found[taste][row].argmax()),),
            count=PICTURES,
            shape=(16, 16, 16),
            latents=lambda rows, row=row: tokens.in_model_space(
                found["latents"][row][list(rows)], inside.model
            ),
        )
        for row in range(TEST)
    ]
    run.trainer.held_out, run.trainer.learned = batches, batches
    judged: list = []
    with torch.inference_mode(False), torch.no_grad():
        run.inside(run.trainer.progress.step, lambda read: judged.extend(run.trainer.judged(read)))
    return np.concatenate([((b.margins > 0) + 0.5 * (b.margins == 0)).mean(0).numpy() for b in judged])


def study(inside: Inside, found: dict[str, torch.Tensor], taste: str, size: int, seeds: int) -> dict:
    """Accuracy on the test's things over the seeds, what the trainer itself said, and times."""
    values, own, times = [], [], []
    for seed in range(seeds):
        name = f"{taste}_{size}_{seed}"
        generator = torch.Generator().manual_seed(seed)
        rows = TEST + torch.randperm(len(found["latents"]) - TEST, generator=generator)[:size]
        write_picks(inside.root / "drm_picks" / name, found, taste, rows.tolist())
        run, took = fit(inside, name, seed)
        own.append(run.facts["accuracy"])
        values.append(right(inside, run, found, taste))
        times.append(took)
    groups = np.repeat(np.arange(TEST), PICTURES - 1)
    return {
        "accuracy": interval(np.stack(values), groups),
        "by_seed": [float(value.mean()) for value in values],
        "said_by_the_trainer": own,
        "seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/picks"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/picks.json"))
    parser.add_argument("--sizes", type=argument(Count), nargs="+", default=SIZES)
    parser.add_argument("--tastes", choices=list(TASTES), nargs="+", default=list(TASTES))
    parser.add_argument("--seeds", type=argument(Count), default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    inside = Inside(args.out)
    found = pool(args.out, inside, TEST + max(args.sizes))
    result = {"test_things": TEST, "pictures_a_batch": PICTURES, "steps": STEPS, "rate": RATE, "tastes": {}}
    for size in args.sizes:
        for taste in args.tastes:
            one = study(inside, found, taste, size, args.seeds)
            result["tastes"].setdefault(taste, {})[str(size)] = one
            print(f"{taste} {size}: {one['accuracy']} in {one['seconds']}", flush=True)
            replace_atomically(args.results, lambda path: path.write_text(json.dumps(result, indent=1)))


if __name__ == "__main__":
    main()
