"""DiNa-LRM's published weights as one DRM file.

    python -m training.import_dina --base sd3.5_medium.safetensors --release FOLDER \\
        --out models/drm/dina.safetensors

A release folder (DiNa-LRM, ICML 2026, Apache-2.0) holds
    config.json                  YAML or JSON; its model section gives depth, taps and the head's sizes
    checkpoint/backbone_lora/    a PEFT adapter: adapter_config.json and adapter_model.safetensors or .bin
    checkpoint/rm_head.pt        the head's state dict
The adapter is merged in float32, W + (alpha / r) B A. A base, rank, name or shape that does not fit is an
error that names the first mismatch, and nothing is written. The raw score is the published code's; the shown
one is (raw + 10) / 10.
"""

import argparse
import json
import math
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from drm import DRM, DRMFileError, save_drm
from drm.backbone import TruncatedSD3, first_difference
from drm.head import QueryHead
from training.base import BaseError, load_backbone

SHOWN = {"scale": 0.1, "offset": 1.0}
FACTS = {
    "name": "DiNa-LRM",
    "licence": "Apache-2.0",
    "source": "https://github.com/HKUST-C4G/diffusion-rm",
    "text_length": 256,
    "training_text_length": 128,
    "sigma_hint": {"generated picture": 0.4, "real picture": 0.1},
    "shown": SHOWN,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", *_ADDED)
_PREFIX = "base_model.model."
# What the published model starts its logistic output from; rm_head.pt has no place for what it learned.
_LOGISTIC = (0.0, 0.15)
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


@dataclass(frozen=True, kw_only=True)
class Release:
    """What config.json says. lora: its rank and alpha where given; None when the backbone was frozen."""

    num_kept: int
    image_taps: tuple[int, ...]
    text_taps: tuple[int, ...]
    text_output_trained: bool
    lora: dict | None
    head: dict
    logistic: bool


def import_dina(base: Path, release: Path, out: Path, dtype: torch.dtype = torch.float32) -> DRM:
    """Writes the imported model to out, its backbone in dtype, and returns it in float32.

    Raises ReleaseError, training.base.BaseError or drm.DRMFileError; then out is as it was.
    """
    if out.suffix != ".safetensors":
        raise ReleaseError(f"{out.name}: reward models are saved as .safetensors, choose such a name")
    weights = _tensors(_load_pickle(release / "checkpoint" / "rm_head.pt"), "rm_head.pt")
    facts = read_release(
        release / "config.json", has_text=any("layer_adapters_text" in key for key in weights)
    )
    backbone = load_backbone(
        base, facts.num_kept, image_taps=facts.image_taps, text_taps=facts.text_taps
    ).requires_grad_(False)
    if facts.lora is not None:
        merge_adapter(backbone, release / "checkpoint" / "backbone_lora", facts)
    drm = DRM(backbone, build_head(weights, backbone.config.width, facts), FACTS).eval()
    save_drm(drm, out, dtype=dtype)
    return drm


def read_release(path: Path, has_text: bool = True) -> Release:
    """The model section of a release's config.json; has_text: whether its head has text adapters."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = content["model"]
        depth, visual, text = (
            model["num_transformer_layers"],
            list(model["visual_head_idx"]),
            list(model.get("text_head_idx") or []),
        )
        head = dict(model.get("reward_head") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReleaseError(
            f"{path} cannot be read ({error}): give the folder of a DiNa-LRM release"
        ) from error
    except KeyError as error:
        raise ReleaseError(f"{path} has no {error.args[0]} in its model section") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ReleaseError(f"{path} has no model section as DiNa-LRM writes it ({error})") from error
    use_text = model.get("use_text_features", True)
    if not use_text and not has_text:
        text = []
    frozen = bool(model.get("freeze_backbone", False))
    if not frozen and not model.get("use_lora", True):
        raise ReleaseError(
            f"{path} describes a fully trained backbone: only adapters (use_lora) are imported"
        )
    if head.get("out_dim", 1) != 1:
        raise ReleaseError(f"{path} has out_dim {head['out_dim']}: wanted 1, one score a picture")
    return Release(
        num_kept=_whole_number("num_transformer_layers", depth),
        image_taps=_taps("visual_head_idx", visual, depth),
        text_taps=_taps("text_head_idx", text, depth),
        text_output_trained=bool(use_text and text[-1:] == [depth]),
        lora=None if frozen else dict(model.get("lora_config") or {}),
        head=head,
        logistic=bool(model.get("use_logistic", False)),
    )


def _whole_number(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ReleaseError(f"config.json: {name} is {value!r}, wanted a whole number above 0")
    return value


def _taps(name: str, taps: list, depth: int) -> tuple[int, ...]:
    """In ascending order, as the published code collects them; 0 counts only where it is listed first."""
    good = all(isinstance(tap, int) and 0 <= tap <= depth for tap in taps)
    if not good or len(set(taps)) != len(taps) or 0 in taps[1:] or (not taps and name == "visual_head_idx"):
        raise ReleaseError(
            f"config.json: {name} is {taps}, wanted different numbers from 0 (first) to {depth}"
        )
    return tuple(sorted(taps))


def build_head(weights: Mapping[str, Tensor], dim: int, release: Release) -> QueryHead:
    """The query head that config.json describes, holding the weights of rm_head.pt."""
    width = release.head.get("width", -1)
    logistic = None
    if release.logistic:
        weights = dict(weights)
        logistic = tuple(
            float(weights.pop(name, start)) for name, start in zip(("eta3", "eta4"), _LOGISTIC, strict=True)
        )
    try:
        head = QueryHead(
            dim,
            len(release.image_taps),
            len(release.text_taps),
            width=None if width == -1 else _whole_number("width", width),
            num_queries=_whole_number("num_queries", release.head.get("num_queries", 4)),
            num_heads=_whole_number("num_attn_heads", release.head.get("num_attn_heads", 8)),
            use_proj_in=bool(release.head.get("use_proj_in", False)),
            logistic=logistic,
        )
    except ValueError as error:
        raise ReleaseError(f"config.json: {error}") from error
    message = first_difference(_shapes(weights), _shapes(head.state_dict()))
    if message:
        raise ReleaseError(f"rm_head.pt is not the head of config.json on this base: {message}")
    head.load_state_dict({key: value.float() for key, value in weights.items()})
    return head


def merge_adapter(backbone: TruncatedSD3, folder: Path, release: Release) -> int:
    """Adds the adapter's (alpha / r) B A to the backbone's weights in place; how many it changed."""
    settings = _adapter_settings(folder / "adapter_config.json", release)
    weights = _read_adapter(folder)
    expected = expected_adapter(backbone, settings, release, weights)
    message = first_difference(_shapes(weights), expected)
    if message:
        raise ReleaseError(
            f"the adapter does not fit: {message} (rank {settings['r']}, {backbone.config.num_kept} blocks of"
            f" width {backbone.config.width}; look at the base and at config.json)"
        )
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])
    layers = dict(backbone.named_modules())
    names = [name for name in _modules(expected) if name in layers]
    for name in names:
        down, up = (weights[f"{_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        layers[name].weight += scale * (up @ down)
    return len(names)


def _adapter_settings(path: Path, release: Release) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
        values = [source[name] for source in (settings, release.lora) if name in source]
        if not values or any(value != values[0] for value in values):
            raise ReleaseError(
                f"{name} is {settings.get(name)} in {path.name} and {release.lora.get(name)} in config.json:"
                " wanted one number"
            )
        settings[name] = values[0]
    _whole_number("r", settings["r"])
    return {"use_rslora": False, "target_modules": _TARGETS, "exclude_modules": None, **settings}


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        path = folder / "adapter_model.bin"
        return _tensors(_load_pickle(path), path.name)
    try:
        return _tensors(load_file(path), path.name)
    except (SafetensorError, OSError) as error:
        raise ReleaseError(f"{path} is damaged or cut short ({error}): download it again") from error


def expected_adapter(
    backbone: TruncatedSD3, settings: Mapping, release: Release, found: Mapping[str, Tensor]
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
    if settings["exclude_modules"] is None and not release.text_output_trained:
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


def _load_pickle(path: Path) -> object:
    if not path.is_file():
        raise ReleaseError(f"{path} is not there: give the folder of a DiNa-LRM release")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReleaseError(f"{path} is damaged or holds more than weights ({reason})") from error


def _tensors(content: object, name: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ReleaseError(f"{name} is not a state dict: wanted names and tensors only")
    for key, value in content.items():
        if not bool(torch.isfinite(value).all()):
            raise ReleaseError(f"{name}: {key} holds NaN or infinity, download it again")
    return dict(content)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in weights.items()}


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="training.import_dina", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="SD3.5-Medium: a file or a diffusers folder")
    parser.add_argument("--release", type=Path, required=True, help="the release's folder")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the backbone is stored in")
    options = parser.parse_args(arguments)
    try:
        drm = import_dina(options.base, options.release, options.out, DTYPES[options.dtype])
    except (ReleaseError, BaseError, DRMFileError, OSError) as error:
        print("import_dina:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    config = drm.backbone.config
    print(
        f"{options.out}: {config.num_kept} blocks of width {config.width}, image tokens after"
        f" {config.image_taps} and text after {config.text_taps}, {options.out.stat().st_size / 1e9:.2f} GB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
