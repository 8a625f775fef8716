"""The demo family's independent judge as a rival scorer, for `evaluate.rivals` and `--rival`:

    judge: training.demo.rival:score        probability of the concept that the prompt names

It shares nothing with the reward model that is optimised, so it shows when that one is being fooled. A prompt
is read as the concept whose word is the longest in it; the judge is the one in the folder `models`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.demo.data import read_concepts
from training.demo.judge import Judge, judge_pictures, load_judge

MODELS = Path("models")
JUDGE = "judge/drm_demo_judge.safetensors"


@functools.cache
def _judge() -> tuple[Judge, dict[str, int]]:
    """The judge, and the number of each word's concept."""
    judge, concepts = load_judge(MODELS / JUDGE)
    words = {word: name for name, synonyms in read_concepts() for word in synonyms}
    return judge, {word: concepts.index(name) for word, name in words.items() if name in concepts}


def asked(prompt: str, words: dict[str, int]) -> int:
    """The concept a prompt names; ValueError when it names none."""
    padded = f" {prompt.lower().replace(',', ' ')} "
    found = [word for word in words if f" {word} " in padded]
    if not found:
        raise ValueError(f"{prompt!r} names none of the judge's concepts (training/demo/concepts.txt)")
    return words[max(found, key=len)]


def score(prompt: str, pictures: list[Image.Image]) -> list[float]:
    """One probability a picture."""
    judge, words = _judge()
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    concept = torch.full((len(pictures),), asked(prompt, words))
    return judge_pictures(judge, pixels, concept)[0].tolist()
