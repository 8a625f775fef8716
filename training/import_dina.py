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
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from drm import DRM, DRMFileError, save_drm
from drm.backbone import first_difference
from drm.head import QueryHead
from drm.sd3.base_model import BaseError, load_backbone
from drm.text_files import EncodingError, read_text
from training.reward.dina_adapter import (
    ReleaseError,
    load_pickle,
    merge_adapter,
    shapes_of,
    tensors_of,
    whole_number,
)

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

# What the published model starts its logistic output from; rm_head.pt has no place for what it learned.
_LOGISTIC = (0.0, 0.15)


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

    Raises ReleaseError, drm.sd3.base_model.BaseError or drm.DRMFileError; then out is as it was.
    """
    if out.suffix != ".safetensors":
        raise ReleaseError(f"{out.name}: reward models are saved as .safetensors, choose such a name")
    weights = tensors_of(load_pickle(release / "checkpoint" / "rm_head.pt"), "rm_head.pt")
    facts = read_release(
        release / "config.json", has_text=any("layer_adapters_text" in key for key in weights)
    )
    backbone = load_backbone(base, facts.num_kept, image_taps=facts.image_taps, text_taps=facts.text_taps)
    if facts.lora is not None:
        merge_adapter(
            backbone, release / "checkpoint" / "backbone_lora", facts.lora, facts.text_output_trained
        )
    drm = DRM(backbone, build_head(weights, backbone.config.width, facts), FACTS).eval()
    save_drm(drm, out, dtype=dtype)
    return drm


def read_release(path: Path, has_text: bool = True) -> Release:
    """The model section of a release's config.json; has_text: whether its head has text adapters."""
    try:
        model = _json_or_yaml(read_text(path))["model"]
        depth, visual, text = (
            model["num_transformer_layers"],
            list(model["visual_head_idx"]),
            list(model.get("text_head_idx") or []),
        )
        head = dict(model.get("reward_head") or {})
    except (OSError, EncodingError, yaml.YAMLError) as error:
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
        num_kept=whole_number("num_transformer_layers", depth),
        image_taps=_taps("visual_head_idx", visual, depth),
        text_taps=_taps("text_head_idx", text, depth),
        text_output_trained=bool(use_text and text[-1:] == [depth]),
        lora=None if frozen else dict(model.get("lora_config") or {}),
        head=head,
        logistic=bool(model.get("use_logistic", False)),
    )


def _json_or_yaml(text: str) -> dict:
    # YAML reads nearly all JSON, but not what is indented by tabs.
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


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
            width=None if width == -1 else whole_number("width", width),
            num_queries=whole_number("num_queries", release.head.get("num_queries", 4)),
            num_heads=whole_number("num_attn_heads", release.head.get("num_attn_heads", 8)),
            use_proj_in=bool(release.head.get("use_proj_in", False)),
            logistic=logistic,
        )
    except ValueError as error:
        raise ReleaseError(f"config.json: {error}") from error
    message = first_difference(shapes_of(weights), shapes_of(head.state_dict()))
    if message:
        raise ReleaseError(f"rm_head.pt is not the head of config.json on this base: {message}")
    head.load_state_dict({key: value.float() for key, value in weights.items()})
    return head


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
