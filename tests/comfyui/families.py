"""A tiny random model of every family in nodes/trunk.py that this ComfyUI has, loaded by its own loader.

tiny = load_family("flux"); tiny.model, tiny.positive(2), tiny.latent(batch=2)

ComfyUI's detection fixes some sizes of some families (heads, widths); `_SIZES` puts ours in their place while
a model loads. Networks are ComfyUI's classes, untouched.
"""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.comfy_server import COMFYUI

TEXT, LENGTH = 48, 7
_AXES3, _AXES4 = [8, 12, 12], [8, 8, 8, 8]
_FLUX = {
    "hidden_size": 64,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "depth": 2,
    "depth_single_blocks": 3,
    "context_in_dim": TEXT,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "axes_dim": _AXES3,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
_NEXT = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "qk_norm": True,
    "cap_feat_dim": TEXT,
    "axes_dims": _AXES3,
    "axes_lens": [64, 64, 64],
}


def _file(module: str) -> Path:
    return COMFYUI / "comfy" / "ldm" / f"{module.replace('.', '/')}.py"


# family -> (module and class of the network, its arguments)
_SIZES: dict[str, tuple[str, str, dict]] = {
    "sd3": (
        "modules.diffusionmodules.mmdit",
        "OpenAISignatureMMDITWrapper",
        {
            "input_size": None,
            "in_channels": 16,
            "depth": 3,
            "patch_size": 2,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT, "out_features": 192},
            },
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
            "num_patches": 576,
            "pos_embed_max_size": 24,
            "pos_embed_scaling_factor": None,
        },
    ),
    "flux": ("flux.model", "Flux", {**_FLUX, "vec_in_dim": 32, "guidance_embed": True}),
    "flux2": (
        "flux.model",
        "Flux",
        {
            **_FLUX,
            **{"in_channels": 128, "out_channels": 128, "patch_size": 1, "axes_dim": _AXES4, "theta": 2000},
            **{"vec_in_dim": None, "guidance_embed": True, "global_modulation": True, "mlp_silu_act": True},
            **{
                "qkv_bias": False,
                "ops_bias": False,
                "txt_ids_dims": [3],
                "default_ref_method": "index",
                "ref_index_scale": 10.0,
            },
        },
    ),
    "chroma": (
        "chroma.model",
        "Chroma",
        {
            **_FLUX,
            **{"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64},
            **{"hidden_dim": 64, "n_layers": 2, "vec_in_dim": None},
        },
    ),
    "qwen_image": (
        "qwen_image.model",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": _AXES3,
        },
    ),
    "lumina2": ("lumina.model", "NextDiT", _NEXT),
    "z_image": (
        "lumina.model",
        "NextDiT",
        {
            **_NEXT,
            **{"dim": 256, "n_heads": 8, "n_kv_heads": 8},
            **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        },
    ),
    "wan": (
        "wan.model",
        "WanModel",
        {
            "model_type": "t2v",
            "dim": 128,
            "ffn_dim": 128,
            "num_heads": 1,
            "num_layers": 4,
            "text_dim": 4096,
            "in_dim": 16,
            "out_dim": 16,
        },
    ),
    "hidream": (
        "hidream.model",
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": [TEXT, TEXT],
            "text_emb_dim": 32,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": [16, 8, 8],
            "max_resolution": [32, 32],
            "llama_layers": [0, 1, 2, 3],
        },
    ),
    "krea2": (
        "krea2.model",
        "SingleStreamDiT",
        {
            **{"features": 64, "tdim": 32, "txtdim": 16, "heads": 2, "kvheads": 1, "multiplier": 2},
            **{"layers": 4, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2, "channels": 16},
        },
    ),
    "ernie_image": (
        "ernie.model",
        "ErnieImageModel",
        {
            **{"hidden_size": 64, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 64},
            **{"text_in_dim": TEXT, "rope_axes_dim": _AXES3},
        },
    ),
    "anima": (
        "anima.model",
        "Anima",
        {
            **{"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16},
            **{
                "patch_spatial": 2,
                "patch_temporal": 1,
                "model_channels": 64,
                "num_blocks": 4,
                "num_heads": 2,
            },
            **{"crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True},
            **{"use_adaln_lora": True, "adaln_lora_dim": 16, "extra_per_block_abs_pos_emb": False},
        },
    ),
}
FAMILIES = [name for name, (module, *_) in _SIZES.items() if _file(module).exists()]
# Blocks to read: of the first list, and of the second where there is one.
TAPS = {name: (1, 4) if name in ("flux", "flux2", "chroma", "hidream") else (1, 3) for name in FAMILIES}
POOLED = {"sd3": 32, "flux": 32, "hidream": 32}


@dataclass
class TinyModel:
    """A MODEL, and what its nodes would be given with it."""

    name: str
    model: Any
    text: int = TEXT
    channels: int = 16
    patch: int = 2
    frames: bool = False
    taps: tuple[int, ...] = field(default=())

    def conditioning(self, seed: int, batch: int = 1, length: int = LENGTH, **options: Any) -> list:
        """A CONDITIONING of random embeddings."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        embeds = random(batch, length, self.text)
        pooled = random(batch, POOLED[self.name]) if self.name in POOLED else None
        options = {"pooled_output": pooled, **options}
        if self.name == "hidream":
            options = {"conditioning_llama3": random(batch, 4, length, self.text), **options}
        return [[embeds, options]]

    def latent(self, batch: int = 1, size: tuple[int, int] = (8, 8), seed: int | None = None, **extra: Any):
        """An empty LATENT, or one of noise with a seed, as the model's Empty Latent node makes it."""
        shape = (batch, self.channels, *([1] if self.frames else []), *size)
        if seed is None:
            return {"samples": torch.zeros(shape), **extra}
        return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed)), **extra}


def _known(name: str) -> dict:
    """The network's arguments, of those that newer versions ask for what this one does."""
    module, kind, config = _SIZES[name]
    params = getattr(importlib.import_module(f"comfy.ldm.{module}"), f"{kind}Params", None)
    return {key: value for key, value in config.items() if params is None or key in params.__annotations__}


def _text_width(config: dict) -> int:
    if "txtlayers" in config:
        return config["txtlayers"] * config["txtdim"]
    return config.get("text_dim", config.get("crossattn_emb_channels", TEXT))


def _network(name: str, config: dict) -> torch.nn.Module:
    import comfy.ops

    module, kind, _ = _SIZES[name]
    build = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)
    return build(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)


def _weights(network: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights of a size that keeps signals as they are, none of them zero."""
    around_zero = ("bias", "scale") if type(network).__name__ == "SingleStreamDiT" else ("bias",)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            fan_in = max(value[0].numel(), 1)
            found[key] = noise / fan_in**0.5
        else:
            found[key] = 0.1 * noise + (0.0 if key.endswith(around_zero) else 1.0)
    return found


@contextmanager
def _detected_as(config: dict):
    """ComfyUI's detection of a network, with the sizes that it fixes replaced by ours."""
    import comfy.model_detection as detection
    import comfy.supported_models as supported

    own, dim = detection.detect_unet_config, supported.ZImage.unet_config["dim"]

    def detect(*args: Any, **named: Any) -> dict:
        return {**(own(*args, **named) or {}), **config}

    detection.detect_unet_config = detect
    if config.get("z_image_modulation"):
        supported.ZImage.unet_config["dim"] = config["dim"]
    try:
        yield
    finally:
        detection.detect_unet_config = own
        supported.ZImage.unet_config["dim"] = dim


def load_family(name: str, seed: int = 0, options: dict | None = None, change: Callable | None = None):
    """The family's TinyModel. options: the loader's; change: of the arguments of the network."""
    import comfy.sd

    config = _known(name)
    if change is not None:
        change(config)
    state_dict = _weights(_network(name, config), seed)
    with torch.inference_mode(), _detected_as(config):
        model = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options or {})
    assert model is not None, f"ComfyUI does not recognise the tiny {name}"
    latent_format = model.get_model_object("latent_format")
    return TinyModel(
        name,
        model,
        text=_text_width(config),
        channels=latent_format.latent_channels,
        patch=1 if name in ("flux2", "ernie_image") else 2,
        frames=latent_format.latent_dimensions == 3,
        taps=TAPS[name],
    )
