"""ComfyUI in this process with the demo family loaded, for tests that compare numbers.

ours = inside.stepwise(num_branches=1, noise_level=0.0, steps=4)
stock = inside.ksampler(steps=4)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULTS = {"seed": 11, "steps": 4, "cfg": 2.0, "scheduler": "simple", "denoise": 1.0}


class Inside:
    """model, clip, vae and drm as ComfyUI's loaders give them, and short ways to sample with them."""

    def __init__(self, pack: Any, files: Any) -> None:
        import comfy.sd
        import folder_paths
        import utils.install_util  # noqa: F401 - ComfyUI's nodes.py puts another `utils` in front of this one

        self.pack = pack
        self.files = files
        folder_paths.add_model_folder_path("drm", str(files.drm.parent))
        with torch.inference_mode():
            self.model, _, self.vae, _ = comfy.sd.load_checkpoint_guess_config(
                str(files.checkpoint), output_vae=True, output_clip=False
            )
            self.clip = pack.module("nodes.demo_clip").load_demo_clip(str(files.text_encoder))
            self.drm = pack.module("nodes.adapters").load_drm_patcher("drm", files.drm.name, "float32")
            self.positive = self.encode("red heart, flat style")
            self.negative = self.encode("")

    def encode(self, text: str, clip: Any = None) -> list:
        clip = clip or self.clip
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    def latent(self, batch: int = 1, size: int = 8, seed: int | None = None, **extra: Any) -> dict:
        """An empty LATENT, or one of noise with a seed."""
        shape = (batch, 16, size, size)
        if seed is None:
            return {"samples": torch.zeros(shape), **extra}
        return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed)), **extra}

    def run(self, latent: dict | None = None, model: Any = None, **settings: Any) -> Any:
        """(LATENT, trace) of Step-wise KSampler's own execute."""
        node = self.pack.module("nodes.sampler").StepwiseKSampler
        inputs = {
            "drm": self.drm,
            "positive": self.positive,
            "negative": self.negative,
            "num_branches": 2,
            "noise_level": 0.7,
            "kind": "sde",
            "branch_start": 0.0,
            "branch_end": 1.0,
        }
        with torch.inference_mode():
            return node.execute(
                model=model or self.model,
                latent_image=latent or self.latent(),
                **{**DEFAULTS, **inputs, **settings},
            ).result

    def stepwise(self, latent: dict | None = None, **settings: Any) -> Tensor:
        return self.run(latent, **settings)[0]["samples"]

    def ksampler(self, latent: dict | None = None, model: Any = None, **settings: Any) -> Tensor:
        """Stock KSampler, euler unless another sampler_name is given."""
        import nodes

        inputs = {
            "sampler_name": "euler",
            **DEFAULTS,
            "positive": self.positive,
            "negative": self.negative,
            **settings,
        }
        with torch.inference_mode():
            out = nodes.common_ksampler(
                model or self.model,
                inputs["seed"],
                inputs["steps"],
                inputs["cfg"],
                inputs["sampler_name"],
                inputs["scheduler"],
                inputs["positive"],
                inputs["negative"],
                latent or self.latent(),
                denoise=inputs["denoise"],
            )
        return out[0]["samples"]


def write_lora(path: Path, hidden: int, seed: int = 0) -> Path:
    """A small random LoRA on the first block's attention, with keys that diffusers and ComfyUI both read."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        key = f"transformer.transformer_blocks.0.attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, hidden, generator=generator) / 4
        tensors[f"{key}.lora_B.weight"] = torch.randn(hidden, 4, generator=generator) / 4
    save_file(tensors, path)
    return path
