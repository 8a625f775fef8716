"""Prompts for the demo family's fine-tuning, and their embeddings by its own text encoder.

    python -m training.demo.prompts --models models --out runs/demo/prompts

A quarter of the concepts is held out: none of their prompts is trained on. Training prompts name a concept
and a style, "cat face, noto style"; so do the held-out ones, one style a concept in turn. The text files are
kept in training/configs/prompts, so that runs and figures name the same prompts; --write makes them anew.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch

from training.data.prompt_cache import Encode, read_prompts, write_prompts
from training.demo import text
from training.demo.data import STYLES, read_concepts
from training.demo.export import CLIP, Family, load_family

FILES = Path(__file__).parent.parent / "configs" / "prompts"
TRAIN, HELD_OUT = FILES / "demo_train.txt", FILES / "demo_held_out.txt"
EVERY = 4


def split(concepts: list[str]) -> tuple[list[str], list[str]]:
    """Training prompts (every style of three quarters of the concepts) and held-out ones (one style of
    each other concept).
    """
    words = {name: synonyms[0] for name, synonyms in read_concepts()}
    train, held_out = [], []
    for index, name in enumerate(concepts):
        captions = [f"{words[name]}, {style} style" for style in STYLES]
        if index % EVERY == EVERY - 1:
            held_out.append(captions[index // EVERY % len(STYLES)])
        else:
            train += captions
    return train, held_out


def demo_encode(family: Family) -> Encode:
    """Captions -> prompt_embeds (B, 20, 256), pooled (B, 256)."""

    @torch.no_grad()
    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return text.embed(family.generator.text_encoder, text.encode_ids(family.tokenizer, captions))

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo/prompts"))
    parser.add_argument("--write", action="store_true", help="write the two prompt files anew")
    args = parser.parse_args()
    family = load_family(args.models)
    if args.write:
        for path, prompts in zip((TRAIN, HELD_OUT), split(family.concepts), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(prompts) + "\n")
    prompts = read_prompts(TRAIN) + read_prompts(HELD_OUT)
    fingerprint = hashlib.sha256((args.models / CLIP).read_bytes()).hexdigest()
    write_prompts(args.out, prompts, demo_encode(family), {"encoders": fingerprint})
    print(f"{len(prompts)} prompts -> {args.out}")


if __name__ == "__main__":
    main()
