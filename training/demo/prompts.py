"""Prompts for the demo family's fine-tuning.

    python -m training.demo.prompts --models models

A quarter of the concepts is held out: none of their prompts is trained on. Training prompts name a concept
and a style, "cat face, noto style"; so do the held-out ones, one style a concept in turn. The text files are
kept in training/configs/prompts, so that runs and figures name the same prompts; this makes them anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.demo.data import STYLES, read_concepts
from training.demo.export import load_family

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    args = parser.parse_args()
    for path, prompts in zip((TRAIN, HELD_OUT), split(load_family(args.models).concepts), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(prompts) + "\n")
        print(f"{len(prompts)} prompts -> {path}")


if __name__ == "__main__":
    main()
