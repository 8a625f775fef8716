"""Latents in model space to pictures, by the VAE people have.

stable-diffusion-3.5-medium/   a diffusers pipeline (its vae/), or the folder of a VAE itself:
                               AutoencoderKL, z = latent / scaling_factor + shift_factor; AutoencoderTiny
drm_demo_emoji_sd3.safetensors the demo family's checkpoint, with a TAESD of its own inside
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drm.text_files import read_text

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

Decode = Callable[[Tensor], list[Image.Image]]
_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
PREFIX_VAE = "first_stage_model."


class DecoderError(ValueError):
    """The VAE cannot be used; the message says what it is and what was wanted."""


def load_decoder(path: str | Path, device: str | torch.device = "cpu") -> Decode:
    """latents (B, C, H, W) -> B pictures; DecoderError in one sentence when there is no VAE in that place."""
    path = Path(path)
    pixels = _from_folder(path, device) if path.is_dir() else _from_demo(path, device)

    @torch.no_grad()
    def decode(latents: Tensor) -> list[Image.Image]:
        found = [pixels(latent.to(device).float()) for latent in latents.split(1)]
        return [Image.fromarray(_to_uint8(one[0])) for one in found]

    return decode


def _to_uint8(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3)."""
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def _from_folder(folder: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    import diffusers

    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        kind = json.loads(read_text(folder / "config.json")).get("_class_name")
        if kind not in _CLASSES:
            raise DecoderError(f"{folder} holds {kind}: wanted {' or '.join(_CLASSES)}")
        loaded = getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True
        )
    except (OSError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        what = " ".join(str(error).split())[:200]
        raise DecoderError(f"no VAE can be loaded from {folder} ({what})") from error
    vae = loaded.requires_grad_(False).eval().to(device)
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    if kind == "AutoencoderTiny":  # it decodes model space itself
        scale, shift = 1.0, 0.0
    return lambda latents: vae.decode(latents / scale + shift).sample


def autoencoder_from_taesd(tensors: Mapping[str, Tensor]) -> tuple[AutoencoderTiny, dict[str, float]]:
    """TAESD's names as ComfyUI reads them -> the demo family's autoencoder, and its latents' mean and std.

    ComfyUI's decoder counts the clamp in front as layer 0. KeyError or RuntimeError for other weights.
    """
    from diffusers import AutoencoderTiny

    autoencoder, weights = AutoencoderTiny(latent_channels=16), {}
    for key, value in tensors.items():
        if key.startswith("taesd_"):
            side, index, rest = key.removeprefix("taesd_").split(".", 2)
            weights[f"{side}.layers.{int(index) - (side == 'decoder')}.{rest}"] = value.float()
    autoencoder.load_state_dict(weights)
    scale, shift = tensors["vae_scale"].item(), tensors["vae_shift"].item()
    return autoencoder.requires_grad_(False).eval(), {
        "std": scale / SD3_SCALE,
        "mean": (SD3_SHIFT - shift) * scale,
    }


def autoencoder_in(checkpoint: Mapping[str, Tensor]) -> tuple[AutoencoderTiny, dict[str, float]]:
    """The same of a whole checkpoint of the demo family."""
    return autoencoder_from_taesd(
        {key.removeprefix(PREFIX_VAE): v for key, v in checkpoint.items() if key.startswith(PREFIX_VAE)}
    )


def _from_demo(path: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    try:
        vae, statistics = autoencoder_in(load_file(path))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise DecoderError(
            f"{path} is no VAE folder and no checkpoint of the demo family: give the diffusers folder"
        ) from error
    vae = vae.to(device)
    return lambda latents: vae.decoder(latents * statistics["std"] + statistics["mean"])
