"""DiNa-LRM's adapter, merged into a truncated backbone in float32, and the reading of a release's files.

    W = W + (alpha / r) B A          for every adapted layer; alpha / sqrt(r) where the rank is stabilised

Names and shapes are checked against the backbone before anything changes; the first that differs is named.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from drm.backbone import TruncatedSD3, first_difference
from drm.text_files import read_text

_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", *_ADDED)
_PREFIX = "base_model.model."
# Kinds of LoRA that are not W + scale B A on the base as it is.
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
)


class ReleaseError(ValueError):
    """The release cannot be imported; the message names the first thing that does not fit."""


def merge_adapter(backbone: TruncatedSD3, folder: Path, lora: Mapping, text_output_trained: bool) -> int:
    """Adds the adapter's (alpha / r) B A to the backbone's weights in place; returns how many it changed.

    lora: r and lora_alpha where the release's config repeats them. text_output_trained: whether the release's
    code also adapts the text side of the last block.
    """
    settings = _read_settings(folder / "adapter_config.json", lora)
    weights = _read_adapter(folder)
    expected = _expected(backbone, settings, text_output_trained, weights)
    message = first_difference(shapes_of(weights), expected)
    if message:
        raise ReleaseError(
            f"the adapter does not fit: {message} (rank {settings['r']}, {backbone.config.num_kept} blocks of"
            f" width {backbone.config.width}; look at the base and at config.json)"
        )
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])
    layers = dict(backbone.named_modules())
    names = [name for name in _modules(expected) if name in layers]
    with torch.no_grad():
        for name in names:
            down, up = (weights[f"{_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
            layers[name].weight += scale * (up @ down)
    return len(names)


def _read_settings(path: Path, lora: Mapping) -> dict:
    try:
        settings = dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseError(f"{path} cannot be read ({error}): the release is incomplete") from error
    unsupported = [name for name in _UNSUPPORTED if settings.get(name)]
    if str(settings.get("init_lora_weights")).split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        unsupported.append("init_lora_weights")
    if settings.get("bias", "none") != "none":
        unsupported.append("bias")
    if settings.get("peft_type", "LORA") != "LORA" or unsupported:
        raise ReleaseError(
            f"{path.name} has {', '.join(unsupported) or 'peft_type'} set: only plain LoRA is imported"
        )
    for name in ("r", "lora_alpha"):
        values = [source[name] for source in (settings, lora) if name in source]
        if not values or any(value != values[0] for value in values):
            raise ReleaseError(
                f"{name} is {settings.get(name)} in {path.name} and {lora.get(name)} in config.json:"
                " wanted one number"
            )
        settings[name] = values[0]
    whole_number("r", settings["r"])
    if not isinstance(settings["lora_alpha"], int | float):
        raise ReleaseError(f"{path.name}: lora_alpha is {settings['lora_alpha']!r}, wanted a number")
    return {
        "r": settings["r"],
        "lora_alpha": settings["lora_alpha"],
        "use_rslora": settings.get("use_rslora", False),
        "target_modules": settings.get("target_modules") or _TARGETS,
        "exclude_modules": settings.get("exclude_modules"),
    }


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        path = folder / "adapter_model.bin"
        return tensors_of(load_pickle(path), path.name)
    try:
        return tensors_of(load_file(path), path.name)
    except (SafetensorError, OSError) as error:
        raise ReleaseError(f"{path} is damaged or cut short ({error}): download it again") from error


def _expected(
    backbone: TruncatedSD3, settings: Mapping, text_output_trained: bool, found: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """Names and shapes of the adapter's weights on this backbone, in the order of its layers.

    Two kinds of layer count only when they are found: the second attention, when the adapter has it nowhere,
    and the last block's text side, which feeds nothing and is excluded unless its text is read.
    """
    last = f"transformer_blocks.{backbone.config.num_kept - 1}.attn"
    shapes = {
        name: (layer.in_features, layer.out_features)
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Linear)
    }
    # A layer the adapter may have and the cut backbone lacks.
    shapes.setdefault(f"{last}.to_add_out", (backbone.config.width, backbone.config.width))
    optional = set()
    if settings["exclude_modules"] is None and not text_output_trained:
        optional = {f"{last}.{name}" for name in _ADDED}
    present = _modules(found)
    if not any(".attn2." in name for name in present):
        optional |= {name for name in shapes if ".attn2." in name}
    rank, expected = settings["r"], {}
    for name, (n_in, n_out) in shapes.items():
        if not _matches(name, settings["target_modules"]) or _matches(name, settings["exclude_modules"]):
            continue
        if name in present or name not in optional:
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, n_in)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (n_out, rank)
    return expected


def _modules(names: Mapping[str, object]) -> list[str]:
    """The layers that an adapter's weights belong to, each once."""
    return list(
        dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", name.removeprefix(_PREFIX)) for name in names)
    )


def _matches(name: str, patterns: list[str] | str | None) -> bool:
    """PEFT's rule: a regular expression for the whole name, or a list of names and their tails."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns or ())


def load_pickle(path: Path) -> object:
    """What torch.save wrote there, plain tensors and containers only."""
    if not path.is_file():
        raise ReleaseError(f"{path} is not there: give the folder of a DiNa-LRM release")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged pickles raise all kinds.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReleaseError(f"{path} is damaged or holds more than weights ({reason})") from error


def tensors_of(content: object, name: str) -> dict[str, Tensor]:
    """A state dict that holds nothing but finite tensors."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ReleaseError(f"{name} is not a state dict: wanted names and tensors only")
    for key, value in content.items():
        if not bool(torch.isfinite(value).all()):
            raise ReleaseError(f"{name}: {key} holds NaN or infinity, download it again")
    return dict(content)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape, for first_difference."""
    return {key: tuple(value.shape) for key, value in weights.items()}


def whole_number(name: str, value: object) -> int:
    """The value, when it is a count."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ReleaseError(f"{name} is {value!r}: wanted a whole number above 0")
    return value
