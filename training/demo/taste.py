"""A few hundred choices to try the training commands on, made by the demo model and a made-up person.

    python -m training.demo.taste                                    # pictures, pairs.jsonl, and both encoded
    python -m training.train_drm --config training/configs/drm_taste_demo.yaml

Somebody who likes red looks at several drawings of each thing and prefers the redder of two. What is written
is what you would prepare from pictures of your own: data/demo_taste/pairs.jsonl with its pictures beside it,
which `training.encode` then makes data/demo_taste/encoded of, by the same configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from drm.ranges import Count
from training import encode
from training.config import argument
from training.demo.export import Family, load_family
from training.demo.generator import draw
from training.demo.prompts import HELD_OUT, TRAIN
from training.engine.atomic import replace_atomically

CONFIG = Path(__file__).parent.parent / "configs" / "drm_taste_demo.yaml"
PICTURES, STEPS, CFG, BATCH = 4, 8, 1.0, 64


def things() -> list[str]:
    """The demo's things, in a random order that is always the same."""
    lines = (TRAIN.read_text() + HELD_OUT.read_text()).splitlines()
    names = sorted({line.rsplit(",", 1)[0] for line in lines})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(7)).tolist()
    return [names[i] for i in order]


def redness(pictures: np.ndarray) -> np.ndarray:
    """Mean R - (G + B) / 2 over pixels that are not white, of (N, H, W, 3) uint8."""
    values = pictures.astype(np.float32)
    red = values[..., 0] - values[..., 1:].mean(axis=-1)
    inked = pictures.min(axis=-1) < 240
    return (red * inked).sum(axis=(1, 2)) / np.maximum(inked.sum(axis=(1, 2)), 1)


def draw_things(out: Path, family: Family, names: list[str]) -> list[list[str]]:
    """PICTURES files of each thing in OUT, those that are there left as they are; their paths by thing."""
    paths = [[f"pictures/{n:04d}_{place}.png" for place in range(PICTURES)] for n in range(len(names))]
    seeds = {path: seed for seed, path in enumerate(itertools.chain.from_iterable(paths))}
    missing = [path for path in seeds if not (out / path).exists()]
    for first in tqdm(range(0, len(missing), BATCH), "drawing", unit_scale=BATCH):
        part = missing[first : first + BATCH]
        captions = [names[seeds[path] // PICTURES] for path in part]
        latents = draw(
            family.generator,
            family.tokenizer,
            captions,
            [seeds[path] for path in part],
            steps=STEPS,
            cfg=CFG,
        )
        for path, picture in zip(part, family.decode(latents), strict=True):
            image = Image.fromarray(picture)
            replace_atomically(out / path, lambda file, image=image: image.save(file, "PNG"))
    return paths


def choose(out: Path, family: Family, names: list[str]) -> int:
    """OUT/pairs.jsonl with every two pictures of each thing, the redder one chosen; how many pairs."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for thing, paths in zip(names, draw_things(out, family, names), strict=True):
        liking = redness(np.stack([np.asarray(Image.open(out / path)) for path in paths]))
        order = np.argsort(-liking, kind="stable")
        for better, worse in itertools.combinations(order, 2):
            rows.append({"prompt": thing, "chosen": paths[better], "rejected": paths[worse]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    replace_atomically(out / "pairs.jsonl", lambda path: path.write_text(text))
    return len(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, default=Path("data/demo_taste"))
    parser.add_argument("--things", type=argument(Count), default=60, help="with four pictures each")
    args = parser.parse_args(arguments)
    count = choose(args.out, load_family(args.models), things()[: args.things])
    print(f"{count} pairs -> {args.out / 'pairs.jsonl'}")
    source = [{"format": "jsonl", "path": str(args.out / "pairs.jsonl")}]
    encode.main(
        [
            *("--config", str(CONFIG)),
            f"encode.encoders={args.models}",
            f"encode.out={args.out / 'encoded'}",
            f"encode.sources={json.dumps(source)}",
        ]
    )


if __name__ == "__main__":
    main()
