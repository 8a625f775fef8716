"""The demo family's encoders, from ComfyUI's single files: a TAESD in the checkpoint, a small text encoder.

    models/checkpoints/drm_demo_*.safetensors      first_stage_model.taesd_*
    models/text_encoders/drm_demo_*.safetensors    a CLIPTextModel; its header has configuration and tokenizer

So the commands that encode pictures and prompts work on what ships. There is no T5 and no posterior.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from training.data.decoders import autoencoder_in
from training.data.encoders import LATENT_CHANNELS, EncoderError, SD3Encoders, frozen

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from tokenizers import Tokenizer
    from transformers import CLIPTextModel

PREFIX_TEXT = "text_model."
FORMAT = "drm-demo-clip"
FACTOR = 8
KINDS = ("checkpoints", "text_encoders")


def find_files(folder: Path) -> list[Path]:
    """Checkpoint and text encoder of a demo family in `folder`; none where there is not one of each."""
    found = [sorted(folder.glob(f"{kind}/drm_demo_*.safetensors")) for kind in KINDS]
    return [paths[0] for paths in found] if all(len(paths) == 1 for paths in found) else []


class DemoEncoders(SD3Encoders):
    """SD3Encoders' interface over two files of the demo family."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype, self.has_t5 = folder, device, dtype, False
        self.checkpoint, self.clip = find_files(folder)

    @functools.cached_property
    def _autoencoder(self) -> tuple[AutoencoderTiny, dict[str, float]]:
        with self._loading(str(self.checkpoint.relative_to(self.folder))) as path:
            autoencoder, statistics = autoencoder_in(load_file(path))
        return frozen(autoencoder.to(self.device)), statistics

    @functools.cached_property
    def _text_encoder(self) -> tuple[Tokenizer, CLIPTextModel]:
        with self._loading(str(self.clip.relative_to(self.folder))) as path:
            tokenizer, model = load_text_encoder(path)
        return tokenizer, frozen(model.to(self.device, self.dtype))

    @functools.cached_property
    def _text_config(self) -> dict:
        with self._loading(str(self.clip.relative_to(self.folder))) as path, safe_open(path, "pt") as file:
            return json.loads(file.metadata()["config"])

    def load_vae(self) -> None:
        _ = self._autoencoder

    def load_text(self, *, t5: bool) -> None:
        _ = self._text_encoder

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        if resolution % (2 * FACTOR):
            raise EncoderError(f"resolution is {resolution}: wanted a multiple of {2 * FACTOR}")
        return LATENT_CHANNELS, resolution // FACTOR, resolution // FACTOR

    def prompt_shapes(self, t5_lengths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if t5_lengths:
            raise EncoderError(f"the demo's encoders in {self.folder} have no T5: set t5_lengths to []")
        width = self.text_width
        return {"clip": (self._text_config["max_position_embeddings"], width), "pooled": (width,)}

    @functools.cached_property
    def text_width(self) -> int:
        return self._text_config["hidden_size"]

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor, draws: Sequence[torch.Generator] | None = None) -> Tensor:
        if draws is not None:
            raise EncoderError("the demo's VAE has no posterior to sample from: set posterior to mean")
        autoencoder, statistics = self._autoencoder
        images = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return (autoencoder.encoder(images) - statistics["mean"]) / statistics["std"]

    @torch.inference_mode()
    def clip_embeds(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer, model = self._text_encoder
        return embed(model, encode_ids(tokenizer, prompts).to(self.device))

    def t5_embeds(self, prompts: list[str], length: int) -> Tensor:
        raise EncoderError(f"the demo's encoders in {self.folder} have no T5: set t5_length to null")

    @property
    def text_parts(self) -> tuple[str, ...]:
        return (KINDS[1],)

    def describe(self, parts: Sequence[str] | None = None) -> dict[str, str]:
        files = [path for path in (self.checkpoint, self.clip) if parts is None or path.parent.name in parts]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
        return {"folder": self.folder.resolve().name, "hash": digest.hexdigest()}


def load_text_encoder(path: Path) -> tuple[Tokenizer, CLIPTextModel]:
    """Tokenizer and encoder in float32. Raises EncoderError for a file of another kind, and what reading a
    damaged one raises.
    """
    from tokenizers import Tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise EncoderError(f"{path} is no text encoder of the demo family: its header says no {FORMAT}")
    model = CLIPTextModel(CLIPTextConfig(**json.loads(header["config"])))
    load_weights(model, load_file(path))
    return Tokenizer.from_str(header["tokenizer"]), model


def load_weights(text_encoder: CLIPTextModel, weights: dict[str, Tensor]) -> None:
    """Weights under their published names into the module of any transformers version."""
    prefixed = any(key.startswith(PREFIX_TEXT) for key in text_encoder.state_dict())
    text_encoder.load_state_dict(
        {key if prefixed else key.removeprefix(PREFIX_TEXT): value.float() for key, value in weights.items()}
    )


def encode_ids(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """Captions -> (B, T) int64, cut and filled to the tokenizer's length."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(captions)])


def embed(text_encoder: CLIPTextModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) ids -> prompt_embeds (B, T, D) and pooled_prompt_embeds (B, D)."""
    output = text_encoder(input_ids=ids)
    return output.last_hidden_state, output.pooler_output
