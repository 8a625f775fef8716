"""A head that rides on its base: trained here on the base's first blocks, saved without them.

    model:
      base: models/checkpoints/sd3.5_medium.safetensors
      train: head
      backbone: shared

What is saved is the file of DRM Head Trainer: in ComfyUI the MODEL in the graph is the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from drm import DRM, SharedDRM
from drm.backbone import TruncatedSD3
from drm.head import ConvHead
from drm.shared import Taps, TrunkFacts, fingerprint

WIDTH = 256
# layout: what the names of its blocks start with
_BLOCKS = {"comfyui": "joint_blocks.", "diffusers": "transformer_blocks."}


class OnTrunk(DRM):
    """The last kept block's tokens through a shared head; in all else a reward model."""

    def forward(self, latents: Tensor, sigma: float | Tensor, *prompts: Tensor) -> Tensor:
        """Raw scores (B,) in float32, with gradients for the head; arguments as DRM.score's."""
        features = self.features(latents, sigma, *prompts)
        grid = self.backbone.token_grid(*latents.shape[-2:])
        return self.head(Taps([features.tokens], *grid), sigma)


def build(base: str, backbone: TruncatedSD3, hidden: int, *, seed: int) -> OnTrunk:
    """A fresh head, told sigma, behind the last block that is kept."""
    config = backbone.config
    facts = TrunkFacts(
        family="sd3",
        width=config.width,
        num_blocks=config.num_layers,
        taps=(config.num_kept,),
        latent_channels=config.in_channels,
        fingerprint=_fingerprint(Path(base)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OnTrunk(backbone, SharedDRM(facts, ConvHead(WIDTH, hidden)))


def _fingerprint(base: Path) -> dict | None:
    """Of a single file's or a diffusers folder's blocks; None where they lie in another way."""
    files = [base] if base.is_file() else sorted((base / "transformer").glob("*.safetensors"))
    weights: dict[str, Tensor] = {}
    for path in files:
        weights |= load_file(path)
    for layout, start in _BLOCKS.items():
        if found := _named(weights, start):
            return fingerprint(found, layout)
    return None


def _named(weights: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Those whose names have `start` in them, named from there."""
    return {key[key.index(start) :]: value for key, value in weights.items() if start in key}
