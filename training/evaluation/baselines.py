"""Other people's scorers in the same table, each a callable under a name.

    score(prompt: str, pictures: list[PIL.Image.Image]) -> list[float]            one each, higher is better

    clip:FOLDER, pickscore:FOLDER, imagereward:FOLDER    what lies in the folder, see drm/picture_scorers
    module:function                                      anyone's own function of that form, imported by name

Everything is read from local folders; nothing is downloaded, unpickled or run from a model folder. HPSv3,
from its own package and a local file, would be a module of five lines in the folder the command is run from:

    # hpsv3_baseline.py, used as HPSv3=hpsv3_baseline:score
    from hpsv3 import HPSv3RewardInferencer
    inferencer = HPSv3RewardInferencer(checkpoint_path="models/HPSv3.safetensors", device="cuda")
    def score(prompt, pictures):
        return inferencer.reward(prompts=[prompt] * len(pictures), image_paths=pictures)[:, 0].tolist()
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from drm.picture_scorers import folder_facts, load_picture_scorer

Score = Callable[[str, list[Image.Image]], list[float]]
FOLDER_KINDS = ("clip", "pickscore", "imagereward")


class BaselineError(ValueError):
    """The scorer cannot be loaded or used; the message names it and says what to do."""


def load_baseline(spec: str, device: str = "cpu") -> Score:
    """The callable a spec names (see above); BaselineError otherwise."""
    kind, _, place = spec.partition(":")
    if not kind or not place:
        raise BaselineError(
            f"{spec!r} names no scorer: write {':FOLDER, '.join(FOLDER_KINDS)}:FOLDER or module:function"
        )
    return folder_scorer(place, device) if kind in FOLDER_KINDS else _imported(kind, place)


def folder_scorer(folder: str | Path, device: str = "cpu") -> Score:
    """The scorer of a folder, on the device."""
    try:
        scorer = load_picture_scorer(folder).to(device)
    except ValueError as error:
        raise BaselineError(str(error)) from error
    return lambda prompt, pictures: scorer(prompt, pictures).tolist()


def _imported(module: str, function: str) -> Score:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's own module does on import
        raise BaselineError(
            f"cannot import {module}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not callable(found):
        raise BaselineError(f"{module} has no function {function}: write module:function")
    return found


def fingerprint(spec: str) -> str:
    """Changes when the model's files (by names, sizes and times) or the function's source do: scores kept
    under it are then taken anew.
    """
    kind, _, place = spec.partition(":")
    if kind in FOLDER_KINDS:
        facts = folder_facts(place)
    else:
        facts = _source(kind)
    return hashlib.sha256(json.dumps([spec, facts]).encode()).hexdigest()


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
