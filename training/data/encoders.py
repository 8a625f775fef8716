"""SD3's VAE and text encoders, from a diffusers pipeline folder.

Latents are in model space, `(z - shift) * scale` with z the mean of the VAE's posterior, or a sample of it.
A prompt is CLIP-L's and CLIP-G's penultimate states side by side, (77, 2048), filled with zeros to T5's 4096,
then T5's tokens; pooled is the two CLIPs' projections, (2048,). These are the numbers of
StableDiffusion3Pipeline.encode_prompt: every encoder sees the padding too, so T5's 77 tokens are no part of
its 256.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from drm.text_files import read_text

LATENT_CHANNELS = 16
CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
T5 = ("tokenizer_3", "text_encoder_3")
T5_WIDTH = 4096  # what SD3 fills CLIP's states to where the folder has no T5 to ask


class EncoderError(ValueError):
    """The folder's encoders cannot be used; the message says which part and what to do."""


def prepare_picture(image: Image.Image, resolution: int, fit: str = "centre") -> np.ndarray:
    """(resolution, resolution, 3) uint8: the centre square of an RGB picture, Lanczos-resampled; or with fit
    "square" all of it, bicubic.
    """
    if fit == "square":
        return np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC))
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """The model for inference, its weights moved to where tensors usually lie.

    Read through a file map they lie at any address, and MKL's matrix-vector products round differently by
    address: the same prompt would give other last bits in another process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


class SD3Encoders:
    """Encoders of one folder; each is loaded when it is first needed, so latents alone need no T5."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.has_t5 = (folder / T5[1] / "config.json").is_file()
        for part in ("vae", *sum(CLIPS, ()), *(T5 if self.has_t5 else ())):
            if not (folder / part).is_dir():
                raise EncoderError(
                    f"{folder} has no {part}: wanted a diffusers folder of SD3 or SD3.5 with vae, text"
                    " encoders and tokenizers"
                )
        self._vae_config = self._config("vae")
        channels = self._vae_config.get("latent_channels")
        if channels != LATENT_CHANNELS:
            raise EncoderError(
                f"{folder}/vae makes {channels} latent channels, SD3's makes {LATENT_CHANNELS}:"
                " is the folder of another family?"
            )

    @classmethod
    def from_folder(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> SD3Encoders:
        """path: a diffusers SD3 folder, where text_encoder_3 may be missing; or the demo's models/. dtype is
        the text encoders'; the VAE always runs in float32. EncoderError in one sentence when a part is
        missing or damaged.
        """
        from training.data import demo_encoders

        kind = demo_encoders.DemoEncoders if demo_encoders.find_files(Path(path)) else cls
        return kind(Path(path), torch.device(device), dtype)

    def _config(self, part: str) -> dict:
        try:
            return json.loads(read_text(self.folder / part / "config.json"))
        except (OSError, ValueError) as error:
            raise EncoderError(f"{self.folder}/{part}/config.json cannot be read: {error}") from error

    @contextlib.contextmanager
    def _loading(self, part: str) -> Iterator[Path]:
        try:
            yield self.folder / part
        except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError) as error:
            what = " ".join(str(error).split())[:200]
            raise EncoderError(
                f"{self.folder}/{part} cannot be loaded ({what}): download it again"
            ) from error

    @functools.cached_property
    def vae(self) -> torch.nn.Module:
        from diffusers import AutoencoderKL

        with self._loading("vae") as path:
            vae = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
        return frozen(vae.to(self.device))

    @functools.cached_property
    def _clips(self) -> list[tuple]:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        return [self._text(CLIPTokenizer, CLIPTextModelWithProjection, *names) for names in CLIPS]

    @functools.cached_property
    def _t5(self) -> tuple:
        from transformers import T5EncoderModel, T5TokenizerFast

        return self._text(T5TokenizerFast, T5EncoderModel, *T5)

    def _text(self, tokenizer_class: type, model_class: type, tokenizer_name: str, name: str) -> tuple:
        with self._loading(tokenizer_name) as path:
            tokenizer = tokenizer_class.from_pretrained(path, local_files_only=True)
        with self._loading(name) as path:
            model = model_class.from_pretrained(path, dtype=self.dtype, local_files_only=True)
        return tokenizer, frozen(model.to(self.device))

    def load_vae(self) -> None:
        """Loads the VAE now rather than at the first picture."""
        _ = self.vae

    def load_text(self, *, t5: bool) -> None:
        """Loads the text encoders now rather than at the first prompt; T5 only when asked for."""
        _ = self._clips, self._t5 if t5 else None

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square picture's latents; EncoderError when its side is no multiple of the VAE's."""
        factor = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        if resolution % (2 * factor):  # the network takes latents in patches of two
            raise EncoderError(f"resolution is {resolution}: wanted a multiple of {2 * factor}")
        return LATENT_CHANNELS, resolution // factor, resolution // factor

    def prompt_shapes(self, t5_lengths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """What a prompt is stored as: clip (T, D), pooled (P,) and t5_<length> (length, E) each."""
        if t5_lengths and not self.has_t5:
            raise EncoderError(f"{self.folder} has no text_encoder_3 (T5): set t5_lengths to []")
        clips = [self._config(name) for _, name in CLIPS]
        shapes = {
            "clip": (clips[0]["max_position_embeddings"], sum(clip["hidden_size"] for clip in clips)),
            "pooled": (sum(clip["projection_dim"] for clip in clips),),
        }
        return shapes | {f"t5_{length}": (length, self.text_width) for length in t5_lengths}

    @functools.cached_property
    def text_width(self) -> int:
        """How wide the network's text tokens are: T5's width."""
        if self.has_t5:
            return self._config(T5[1])["d_model"]
        if (self.folder / "transformer" / "config.json").is_file():
            return self._config("transformer")["joint_attention_dim"]
        return T5_WIDTH

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor, draws: Sequence[torch.Generator] | None = None) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 16, H/8, W/8) float32 latents in model space: means of the posterior, or
        samples by `draws`, a CPU generator for each.
        """
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mode()
        if draws is not None:
            noise = torch.stack([torch.randn(z.shape[1:], generator=draw) for draw in draws])
            z = z + posterior.std * noise.to(z)
        config = self._vae_config
        return (z - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def encode_pictures(self, pictures: list[Image.Image], resolution: int) -> Tensor:
        """RGB pictures, their centre squares at `resolution` -> (B, 16, r/8, r/8) float32 latents."""
        self.latent_shape(resolution)
        prepared = [prepare_picture(picture, resolution) for picture in pictures]
        return self.encode_pixels(torch.from_numpy(np.stack(prepared)))

    @torch.inference_mode()
    def clip_embeds(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Both CLIPs' states side by side (B, 77, 2048), and their projections (B, 2048)."""
        states, pooled = [], []
        for tokenizer, model in self._clips:
            ids = self._ids(tokenizer, prompts, tokenizer.model_max_length)
            output = model(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)

    @torch.inference_mode()
    def t5_embeds(self, prompts: list[str], length: int) -> Tensor:
        """(B, length, 4096), zeros where the folder has no T5, as the pipeline has it."""
        if not self.has_t5:
            return torch.zeros(len(prompts), length, self.text_width, device=self.device, dtype=self.dtype)
        tokenizer, model = self._t5
        return model(self._ids(tokenizer, prompts, length))[0]

    def _ids(self, tokenizer, prompts: list[str], length: int) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device)

    def encode_prompts(self, prompts: list[str], t5_length: int | None) -> tuple[Tensor, Tensor]:
        """prompt_embeds (B, 77 + t5_length, 4096), 77 alone for None, and pooled_prompt_embeds (B, 2048)."""
        clip, pooled = self.clip_embeds(prompts)
        embeds = torch.nn.functional.pad(clip, (0, self.text_width - clip.shape[-1]))
        if t5_length is not None:
            embeds = torch.cat([embeds, self.t5_embeds(prompts, t5_length)], dim=1)
        return embeds, pooled

    @property
    def text_parts(self) -> tuple[str, ...]:
        return (*sum(CLIPS, ()), *(T5 if self.has_t5 else ()))

    def describe(self, parts: Sequence[str] | None = None) -> dict[str, str]:
        """The folder's name and a hash of the parts' configurations, tokens and samples of their weights.

        parts: subfolders, all of them when not given.
        """
        digest = hashlib.sha256()
        for part in ("vae", *self.text_parts) if parts is None else parts:
            for path in sorted((self.folder / part).iterdir()):
                digest.update(f"{part}/{path.name} {path.stat().st_size}\n".encode() + _sample(path))
        return {"folder": self.folder.resolve().name, "hash": digest.hexdigest()}


def _sample(path: Path) -> bytes:
    """A text file, or 64 pieces of 4 KiB all over a file of weights, which may have 10 GB."""
    if path.suffix in (".json", ".txt"):
        return path.read_bytes()
    last = max(path.stat().st_size - 4096, 0)
    with open(path, "rb") as file:
        return b"".join(file.read(4096) for i in range(64) if file.seek(last * i // 63) >= 0)
