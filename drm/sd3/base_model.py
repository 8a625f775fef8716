"""The base model people have, an SD3 or SD3.5 transformer: its first blocks for a reward model, or all of it.

    sd3.5_medium.safetensors     one file in ComfyUI's (the original) layout, with or without VAE and encoders
    stable-diffusion-3.5-medium/ a diffusers pipeline: transformer/config.json and one file, or an index of
                                 several; the transformer folder itself will do
All give the same network. Only the kept weights are read from the disk, in whatever dtype they are stored.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import looks_like
from ..text_files import read_text
from .backbone import (
    BackboneConfig,
    TruncatedSD3,
    backbone_from_state_dict,
    coarsened,
    first_difference,
    is_kept,
)
from .comfy_layout import PREFIX, from_comfy_layout, is_kept_in_comfy_layout

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

# What quantised files have beside their weights; the weights mean nothing without it.
_SCALES = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")
_TRANSFORMER_CLASS = "SD3Transformer2DModel"
_FILE_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_INDEX_NAMES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
)


class BaseError(ValueError):
    """The base model cannot be used; the message says what it is and what was wanted."""


def load_backbone(
    base: str | os.PathLike,
    num_kept: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_taps: tuple[int, ...] = (),
    text_taps: tuple[int, ...] = (),
    coarse: int = 1,
    keeps_output: bool = False,
) -> TruncatedSD3:
    """The first num_kept blocks of an SD3-family checkpoint or diffusers folder, in dtype on device. coarse:
    see drm.backbone.coarsened.

    Raises BaseError, in one sentence, when base is missing, damaged, of another family, or has too few
    blocks.
    """
    path = Path(base)
    kept = (num_kept, num_kept in text_taps, keeps_output)
    config, weights = _read_layout(path, kept, device, dtype)
    try:
        config = BackboneConfig.from_diffusers(config, num_kept, image_taps, text_taps, keeps_output)
        if coarse != 1:
            weights, config = coarsened(weights, config, coarse)
        return backbone_from_state_dict(weights, config)
    except ValueError as error:
        raise BaseError(f"{path.name} cannot be the base: {error}") from error


def load_transformer(
    base: str | os.PathLike, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> "SD3Transformer2DModel":
    """The whole transformer of an SD3-family checkpoint or diffusers folder, frozen, in eval mode.

    Raises BaseError, in one sentence, as load_backbone does.
    """
    from diffusers import SD3Transformer2DModel

    path = Path(base)
    config, weights = _read_layout(path, None, device, dtype)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    found, expected = (
        {key: tuple(value.shape) for key, value in tensors.items()}
        for tensors in (weights, transformer.state_dict())
    )
    if message := first_difference(found, expected):
        raise BaseError(f"{path.name} cannot be the base: {message}")
    transformer.load_state_dict(weights, assign=True)
    return transformer.requires_grad_(False).eval()


def transformer_config(base: str | os.PathLike) -> dict:
    """The arguments of SD3Transformer2DModel for an SD3-family checkpoint or diffusers folder; no block is
    read. Raises BaseError as load_backbone does.
    """
    path = Path(base)
    return _read_layout(path, (0, False, False), "cpu", torch.float32)[0]


# (blocks, the last one's text output, the model's last layers) that are kept; None: all of the model
Kept = tuple[int, bool, bool] | None


def _read_layout(
    path: Path, kept: Kept, device: str | torch.device, dtype: torch.dtype
) -> tuple[dict, dict[str, Tensor]]:
    """(config, weights by diffusers' names); what is not kept is on the meta device."""
    return (_read_diffusers if path.is_dir() else _read_single_file)(path, kept, device, dtype)


def _read_single_file(
    path: Path, parts: Kept, device: str | torch.device, dtype: torch.dtype
) -> tuple[dict, dict[str, Tensor]]:
    if path.suffix != ".safetensors" and path.exists():
        raise BaseError(f"{path.name} is not a .safetensors file: give the base in that format")
    with _open(path) as file:
        keys = list(file.keys())
        prefix = PREFIX if any(key.startswith(PREFIX) for key in keys) else ""
        if f"{prefix}joint_blocks.0.x_block.attn.qkv.weight" not in keys:
            raise BaseError(_foreign(path.name, keys))
        if any(key.startswith(prefix) and key.endswith(_SCALES) for key in keys):
            raise BaseError(f"{path.name} holds 8-bit weights with scales: give it in float16 or bfloat16")
        kept = [
            key
            for key in keys
            if key.startswith(prefix)
            and (parts is None or is_kept_in_comfy_layout(key.removeprefix(prefix), *parts))
        ]
        tensors = _read(file, keys, set(kept), device, dtype)
    try:
        return from_comfy_layout(tensors)
    except ValueError as error:
        raise BaseError(f"{path.name} cannot be the base: {error}") from error
    except KeyError as error:
        raise BaseError(
            f"{path.name} is an SD3 checkpoint without {error.args[0]}: download it again"
        ) from error


def _foreign(name: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    message = f"{name} is not an SD3 or SD3.5 checkpoint, {looks_like(keys)}"
    if any(key.startswith("transformer_blocks.") for key in keys):
        return f"{message}: give the folder it lies in, which has the config.json"
    return f"{message}: give sd3.5_medium.safetensors, another file of that family, or a diffusers folder"


def _read_diffusers(
    folder: Path, parts: Kept, device: str | torch.device, dtype: torch.dtype
) -> tuple[dict, dict[str, Tensor]]:
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (transformer / "config.json").is_file():
        instead = ", it has a unet/ (SD1.5 or SDXL)" if (folder / "unet").is_dir() else ""
        raise BaseError(
            f"{folder} has no transformer/config.json{instead}: give the folder of an SD3 or SD3.5 pipeline"
        )
    config = _read_json(transformer / "config.json")
    if config.get("_class_name") != _TRANSFORMER_CLASS:
        raise BaseError(
            f"{transformer / 'config.json'} describes a {config.get('_class_name')}: wanted a"
            f" {_TRANSFORMER_CLASS}, the transformer of SD3 and SD3.5"
        )
    tensors = {}
    for path in _weight_files(transformer):
        with _open(path) as file:
            keys = list(file.keys())
            kept = {key for key in keys if parts is None or is_kept(key, *parts)}
            tensors |= _read(file, keys, kept, device, dtype)
    return config, tensors


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} is damaged or cut short ({error}): download it again") from error
    if not isinstance(content, dict):
        raise BaseError(f"{path} holds no JSON object: download it again")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for name in _INDEX_NAMES:
        if (folder / name).is_file():
            parts = _read_json(folder / name).get("weight_map", {}).values()
            return [folder / part for part in sorted(set(parts))]
    for name in _FILE_NAMES:
        if (folder / name).is_file():
            return [folder / name]
    raise BaseError(f"{folder} has no {_FILE_NAMES[0]} and no index of several: download the weights")


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BaseError(f"{path} is not there: give an SD3 or SD3.5 checkpoint or a diffusers folder")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BaseError(f"{path.name} is damaged or cut short ({error}): download it again") from error


def _read(
    file, keys: list[str], kept: set[str], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The kept tensors; the others as shapes only, on the meta device."""
    return {
        # A copy, because safetensors gives out views of the file.
        key: file.get_tensor(key).to(device, dtype, copy=True)
        if key in kept
        else torch.empty(file.get_slice(key).get_shape(), device="meta")
        for key in keys
    }
