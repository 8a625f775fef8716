"""Other people's scorers in the same table, each a callable under a name.

    score(prompt: str, pictures: list[PIL.Image.Image]) -> list[float]            one each, higher is better

    clip:FOLDER         a transformers CLIP model with its processor:   exp(logit_scale) * cos(image, text)
    pickscore:FOLDER    the same formula (PickScore is a CLIP ViT-H/14; Kirstain et al. 2023)
    module:function     anyone's own function of that form, imported by name

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

import torch
from PIL import Image

from drm.text_files import read_text

Score = Callable[[str, list[Image.Image]], list[float]]
CLIP_KINDS = ("clip", "pickscore")


class BaselineError(ValueError):
    """The scorer cannot be loaded or used; the message names it and says what to do."""


def load_baseline(spec: str, device: str = "cpu") -> Score:
    """The callable a spec names (see above); BaselineError otherwise."""
    kind, _, place = spec.partition(":")
    if not kind or not place:
        raise BaselineError(
            f"{spec!r} names no scorer: write clip:FOLDER, pickscore:FOLDER or module:function"
        )
    return clip_scorer(place, device) if kind in CLIP_KINDS else _imported(kind, place)


def clip_scorer(folder: str | Path, device: str = "cpu") -> Score:
    """exp(logit_scale) * cosine of the picture's and the prompt's embedding, in float32; prompts are cut to
    the text encoder's length.
    """
    model, processor = _load_clip(Path(folder))
    model = model.to(device)
    length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(prompt: str, pictures: list[Image.Image]) -> list[float]:
        inputs = processor(
            text=[prompt],
            images=pictures,
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return model(**inputs.to(device)).logits_per_image[:, 0].tolist()

    return score


def _load_clip(folder: Path) -> tuple[torch.nn.Module, Callable]:
    from transformers import AutoProcessor, CLIPModel

    config = folder / "config.json"
    if not config.is_file():
        raise BaselineError(f"{folder} holds no config.json: give the folder of a downloaded CLIP model")
    kind = _json_field(config, "model_type")
    if kind != "clip":
        raise BaselineError(
            f"{folder} holds a model of type {kind!r}: wanted 'clip'; others go by module:function"
        )
    if (
        not (folder / "preprocessor_config.json").is_file()
        and not (folder / "processor_config.json").is_file()
    ):
        raise BaselineError(
            f"{folder} holds no preprocessor_config.json: put it and the tokenizer's files beside the weights"
            " (PickScore's are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
        )
    if not list(folder.glob("*.safetensors")):
        raise BaselineError(
            f"{folder} holds no .safetensors: other formats are not opened, since they can run code"
        )
    try:
        model, loading = CLIPModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, and all mean the folder is not usable
        raise BaselineError(f"cannot load a CLIP model from {folder}: {_first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random weights in their place
        raise BaselineError(
            f"the weights in {folder} lack {missing[0]} ({len(missing)} in all): download them again"
        )
    return model.eval(), processor


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
    if kind in CLIP_KINDS:
        files = sorted(path for path in Path(place).glob("*") if path.is_file())
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    else:
        facts = _source(kind)
    return hashlib.sha256(json.dumps([spec, facts]).encode()).hexdigest()


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def _json_field(path: Path, name: str) -> object:
    try:
        return json.loads(read_text(path)).get(name)
    except (OSError, ValueError, AttributeError) as error:
        raise BaselineError(f"{path} is no JSON: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
