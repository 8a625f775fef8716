"""The demo's preference pairs as encoded shards, the format `training.train_drm` learns from.

    python -m training.demo.shards --out runs/demo/encoded

One table of pairs drawn once (the demo recipe draws new ones every step): each source is a loser type of
training.demo.reward. Pairs of held-out concepts are the held-out ones; no training pair names such a concept
or a held-out icon.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from drm.ranges import Count
from training.config import argument
from training.data import shards
from training.demo import data, text
from training.demo.comparisons import MIX
from training.demo.generator import load_generator
from training.demo.pairs import Pool, ask, make_pool, pairs, without_concepts
from training.demo.reward import REPORTED

PHRASINGS = 3  # captions of an icon: the canonical one first


def flatten(pool: Pool) -> tuple[torch.Tensor, Pool]:
    """All latents of the pool in one list (M, C, H, W), and a pool that holds their places in it instead."""
    kinds = (pool.real, pool.degraded, pool.drawn, pool.rated.latents)
    parts = [
        pool.real,
        pool.degraded.flatten(0, 1),
        pool.drawn.flatten(0, 1),
        pool.rated.latents.float(),
    ]
    places, start = [], 0
    for part, like in zip(parts, kinds, strict=True):
        count = len(part)
        shape = (*like.shape[:-3], 1, 1, 1)
        places.append(torch.arange(start, start + count).reshape(shape))
        start += count
    real, degraded, drawn, rated = places
    moved = dataclasses.replace(pool, real=real, degraded=degraded, drawn=drawn)
    moved = dataclasses.replace(moved, rated=dataclasses.replace(pool.rated, latents=rated))
    return torch.cat(parts), moved


def table(pool: Pool, *, train_pairs: int, rounds: int, rng: torch.Generator) -> dict[str, list]:
    """Columns of pairs.parquet: train_pairs in the shares of MIX, and `rounds` times every held-out icon for
    each of REPORTED.
    """
    columns: dict[str, list] = {name: [] for name in shards.COLUMNS}

    def add(
        icons: torch.Tensor, kind: str, allowed: torch.Tensor, phrasing: torch.Tensor, held: bool
    ) -> None:
        chosen, rejected, label = pairs(pool, icons, kind, allowed, rng)
        columns["chosen"] += chosen.flatten().tolist()
        columns["rejected"] += rejected.flatten().tolist()
        columns["prompt"] += (icons * PHRASINGS + phrasing).tolist()
        columns["weight"] += [1.0] * len(icons)
        columns["label"] += label.tolist()
        columns["source"] += [kind] * len(icons)
        columns["held_out"] += [held] * len(icons)
        columns["row"] += [f"{kind} {icon}" for icon in icons.tolist()]

    tested = data.indices(pool.tested)
    for kind, share in MIX.items():
        icons, allowed = ask(pool, kind, round(share * train_pairs), rng)
        add(icons, kind, allowed, torch.randint(PHRASINGS, icons.shape, generator=rng), False)
    for kind in REPORTED:
        for _ in range(rounds):
            add(tested, kind, pool.tested, torch.zeros_like(tested), True)
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/demo/autoencoder/final"))
    parser.add_argument("--generator", type=Path, default=Path("runs/demo/generator"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/encoded"))
    parser.add_argument("--pairs", type=argument(Count), default=65536)
    parser.add_argument("--rounds", type=argument(Count), default=1)
    args = parser.parse_args()

    demo = data.load(args.data)
    pool = make_pool(args.generator, args.data, args.autoencoder)
    pool = without_concepts(pool, data.held_out_concepts(len(demo.names)))
    latents, places = flatten(pool)
    columns = table(places, train_pairs=args.pairs, rounds=args.rounds, rng=torch.Generator().manual_seed(0))
    generator, tokenizer = load_generator(args.generator)
    rng = torch.Generator().manual_seed(1)
    captions = []
    for concept, style in zip(pool.concept.tolist(), pool.style.tolist(), strict=True):
        words = demo.words[concept]
        captions.append(f"{words[0]}, {data.STYLES[style]} style")
        captions += [
            text.random_caption(words, style, rng, empty=0.0, unstyled=0.0) for _ in range(PHRASINGS - 1)
        ]
    with torch.no_grad():
        embeds, pooled = text.embed(generator.text_encoder, text.encode_ids(tokenizer, captions))
    args.out.mkdir(parents=True, exist_ok=True)
    shards.write_image_shard(args.out, 0, latents.half())
    shards.write_prompt_shard(args.out, 0, {"clip": embeds.half(), "pooled": pooled.half()})
    shards.write_pairs(args.out, columns)
    meta = {"latent": list(latents.shape[1:]), "t5_lengths": [], "dtype": "float16", "resolution": data.SIZE}
    meta |= {"encoders": {"name": "demo"}, "text_length": text.LENGTH}
    # whose prompt each is, so that studies can resample concepts
    meta["concepts"] = pool.concept.repeat_interleave(PHRASINGS).tolist()
    shards.write_meta(args.out, meta)
    print(
        f"{len(columns['prompt'])} pairs of {len(latents)} pictures, {len(captions)} captions -> {args.out}"
    )


if __name__ == "__main__":
    main()
