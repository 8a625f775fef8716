"""SD3 transformer weights between ComfyUI's layout (the original MMDiT-X names) and diffusers' layout.

    x_embedder, t_embedder, y_embedder, context_embedder, pos_embed, final_layer
    joint_blocks.{i}.{x_,context_}block.{attn.{qkv, ln_q, ln_k, proj}, adaLN_modulation.1, mlp.fc1, mlp.fc2}
    joint_blocks.{i}.x_block.attn2.*                       the second, image-only attention of MMDiT-X

ComfyUI fuses q, k and v; and where diffusers uses AdaLayerNormContinuous (the output, and the text side of
the last block) the modulation is (shift, scale) here and (scale, shift) there. ComfyUI infers the
architecture from shapes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "model.diffusion_model."

_EMBEDDERS = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_X_BLOCK = {
    "attn.ln_q": "attn.norm_q",
    "attn.ln_k": "attn.norm_k",
    "attn.proj": "attn.to_out.0",
    "attn2.ln_q": "attn2.norm_q",
    "attn2.ln_k": "attn2.norm_k",
    "attn2.proj": "attn2.to_out.0",
    "adaLN_modulation.1": "norm1.linear",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_CONTEXT_BLOCK = {
    "attn.ln_q": "attn.norm_added_q",
    "attn.ln_k": "attn.norm_added_k",
    "attn.proj": "attn.to_add_out",
    "adaLN_modulation.1": "norm1_context.linear",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def _swap_halves(weight: Tensor) -> Tensor:
    first, second = weight.chunk(2)
    return torch.cat((second, first))


def _block_to_comfy(state_dict: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    source, target = f"transformer_blocks.{index}", f"joint_blocks.{index}"
    converted = {}
    for stream, names in (("x_block", _X_BLOCK), ("context_block", _CONTEXT_BLOCK)):
        for name, diffusers_name in names.items():
            for part in ("weight", "bias"):
                key = f"{source}.{diffusers_name}.{part}"
                if key in state_dict:
                    converted[f"{target}.{stream}.{name}.{part}"] = state_dict[key]
    for name, thirds in _FUSED.items():
        for part in ("weight", "bias"):
            keys = [f"{source}.{third}.{part}" for third in thirds]
            if keys[0] in state_dict:
                converted[f"{target}.{name}.{part}"] = torch.cat([state_dict[key] for key in keys])
    return converted


def to_comfy_layout(state_dict: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """A diffusers SD3Transformer2DModel's weights under ComfyUI's bare names (no `model.diffusion_model.`).

    config: the model's config, of which num_layers is used. ComfyUI builds hidden = 64 x blocks when it loads
    the result, so a model of another width than 64 x num_layers is refused with a ValueError.
    """
    num_layers = config["num_layers"]
    width = state_dict["pos_embed.proj.weight"].shape[0]
    if width != 64 * num_layers:
        raise ValueError(
            f"the model has {num_layers} blocks of width {width}: ComfyUI loads only 64 x blocks"
        )
    converted = {}
    for name, diffusers_name in _EMBEDDERS.items():
        for suffix in ("", ".weight", ".bias"):
            if diffusers_name + suffix in state_dict:
                converted[name + suffix] = state_dict[diffusers_name + suffix]
    for index in range(num_layers):
        converted |= _block_to_comfy(state_dict, index)
    for part in ("weight", "bias"):
        converted[f"final_layer.adaLN_modulation.1.{part}"] = _swap_halves(
            state_dict[f"norm_out.linear.{part}"]
        )
        last = f"joint_blocks.{num_layers - 1}.context_block.adaLN_modulation.1.{part}"
        converted[last] = _swap_halves(converted[last])
    expected, got = sum(v.numel() for v in state_dict.values()), sum(v.numel() for v in converted.values())
    if expected != got:
        raise ValueError(
            f"{got} of {expected} weights have a place in ComfyUI's layout: not an SD3 transformer"
        )
    return {key: value.contiguous() for key, value in converted.items()}


def is_kept_in_comfy_layout(
    key: str, num_kept: int, keeps_text_output: bool = False, keeps_output: bool = False
) -> bool:
    """backbone.is_kept for a bare name of ComfyUI's layout."""
    if not key.startswith("joint_blocks."):
        return keeps_output or not key.startswith("final_layer.")
    _, index, part = key.split(".", 2)
    unused = part.startswith(("context_block.attn.proj.", "context_block.mlp."))
    return int(index) < num_kept - 1 or (int(index) == num_kept - 1 and (keeps_text_output or not unused))


def infer_config(state_dict: Mapping[str, Tensor]) -> dict:
    """SD3Transformer2DModel's arguments from the shapes of bare ComfyUI keys."""
    width, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    num_layers = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("joint_blocks."))
    heads_dim = 64
    has_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in state_dict
    if has_norm:
        heads_dim = len(state_dict["joint_blocks.0.x_block.attn.ln_q.weight"])
    dual = [i for i in range(num_layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state_dict]
    return {
        "sample_size": 128,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": state_dict["final_layer.linear.weight"].shape[0] // patch_size**2,
        "num_layers": num_layers,
        "attention_head_dim": heads_dim,
        "num_attention_heads": width // heads_dim,
        "joint_attention_dim": state_dict["context_embedder.weight"].shape[1],
        "caption_projection_dim": state_dict["context_embedder.weight"].shape[0],
        "pooled_projection_dim": state_dict["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(state_dict["pos_embed"].shape[1]),
        "dual_attention_layers": tuple(dual),
        "qk_norm": "rms_norm" if has_norm else None,
    }


def from_comfy_layout(state_dict: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """SD3Transformer2DModel's arguments and weights from a ComfyUI-layout checkpoint.

    Keys may be bare or below `model.diffusion_model.`; others are ignored when the prefix is used. The
    conversion is diffusers' own. Raises ValueError, naming what is missing, when it is not an SD3
    transformer.
    """
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    if any(key.startswith(PREFIX) for key in state_dict):
        state_dict = {k.removeprefix(PREFIX): v for k, v in state_dict.items() if k.startswith(PREFIX)}
    needed = ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed")
    missing = [key for key in (*needed, "joint_blocks.0.x_block.attn.qkv.weight") if key not in state_dict]
    if missing:
        raise ValueError(
            f"no SD3 transformer here, {missing[0]} is missing: wanted an SD3 or SD3.5 checkpoint"
        )
    config = infer_config(state_dict)
    return config, convert_sd3_transformer_checkpoint_to_diffusers(dict(state_dict))
