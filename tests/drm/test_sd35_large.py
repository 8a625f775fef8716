"""SD3.5-Large at its exact shape, in both layouts people have it in, without its weights.

The files are sparse: their headers are whole and their 16 GB of zeros take no room.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from drm.backbone import (
    BackboneConfig,
    TruncatedSD3,
    backbone_from_state_dict,
    sd35_large_config,
    truncate_state_dict,
)
from drm.head import ConvGNHead
from drm.model import DRM
from drm.sd3.base_model import transformer_config
from drm.sd3.comfy_layout import PREFIX, from_comfy_layout, to_comfy_layout

WIDTH, DEPTH, KEPT = 2432, 38, 33
ARGUMENTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": DEPTH,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
    "qk_norm": "rms_norm",
}


@pytest.fixture(scope="module")
def large() -> SD3Transformer2DModel:
    with torch.device("meta"):
        return SD3Transformer2DModel(**ARGUMENTS)


def linear(before: int, after: int) -> int:
    return before * after + after


def block() -> int:
    """Modulation, attention and feed-forward of both streams."""
    stream = linear(WIDTH, 6 * WIDTH) + 4 * linear(WIDTH, WIDTH) + 2 * 64
    return 2 * (stream + linear(WIDTH, 4 * WIDTH) + linear(4 * WIDTH, WIDTH))


def without_text_output(block: int) -> int:
    """Two parts of six of the text's modulation, no text projection, no text feed-forward."""
    feed_forward = linear(WIDTH, 4 * WIDTH) + linear(4 * WIDTH, WIDTH)
    return block - linear(WIDTH, 4 * WIDTH) - linear(WIDTH, WIDTH) - feed_forward


def outside_the_blocks() -> int:
    """Patches, time, pooled text, text; then norm_out and proj_out."""
    embedders = linear(64, WIDTH) + linear(256, WIDTH) + linear(2048, WIDTH) + 2 * linear(WIDTH, WIDTH)
    return embedders + linear(4096, WIDTH) + linear(WIDTH, 2 * WIDTH) + linear(WIDTH, 64)


def weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_whole_model_and_the_reward_model_have_the_weights_worked_out_by_hand(large):
    assert block() == 36 * 2432**2 + 30 * 2432 + 2 * 2 * 64 == 212_999_680
    assert weights(large) == 37 * block() + without_text_output(block()) + outside_the_blocks()
    assert weights(large) == 8_056_627_520
    config = BackboneConfig.from_diffusers(large.config, KEPT, keeps_output=True)
    with torch.device("meta"):
        drm = DRM(TruncatedSD3(config), ConvGNHead())
    assert weights(drm.backbone) == 32 * block() + without_text_output(block()) + outside_the_blocks()
    down = linear(9 * 16, 256) + linear(9 * 256, 512) + linear(9 * 512, 512)
    assert weights(drm.head) == down + 2 * (256 + 512 + 512) + linear(512, 512) + linear(512, 1)


def test_its_config_is_the_one_of_the_base(large):
    own = BackboneConfig.from_diffusers(large.config, KEPT)
    assert own == sd35_large_config()
    assert (own.width, own.num_kept, own.num_layers) == (WIDTH, KEPT, DEPTH)


@pytest.mark.parametrize("keeps_output", [False, True])
def test_the_truncated_weights_are_those_of_the_base(large, keeps_output):
    config = BackboneConfig.from_diffusers(large.config, KEPT, keeps_output=keeps_output)
    backbone = backbone_from_state_dict(large.state_dict(), config)
    assert weights(backbone) == sum(
        tensor.numel()
        for name, tensor in truncate_state_dict(large.state_dict(), config).items()
        if name != "pos_embed.pos_embed"
    )
    assert not any(name.startswith(f"transformer_blocks.{KEPT}.") for name in backbone.state_dict())
    assert ("proj_out.weight" in backbone.state_dict()) == keeps_output


def test_comfyui_s_layout_of_it_is_told_by_its_shapes(large):
    layout = to_comfy_layout(large.state_dict(), large.config)
    assert layout["joint_blocks.0.x_block.attn.qkv.weight"].shape == (3 * WIDTH, WIDTH)
    assert not any("attn2" in name for name in layout)
    config, converted = from_comfy_layout({PREFIX + name: tensor for name, tensor in layout.items()})
    assert config == ARGUMENTS
    assert shapes(converted) == shapes(large.state_dict())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_sparse(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file of zeros in bfloat16."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_one_file_of_it_says_what_it_is(large, tmp_path, prefix):
    layout = to_comfy_layout(large.state_dict(), large.config)
    write_sparse({prefix + name: tensor for name, tensor in layout.items()}, tmp_path / "large.safetensors")
    assert transformer_config(tmp_path / "large.safetensors") == ARGUMENTS


def test_a_diffusers_folder_of_it_says_what_it_is(large, tmp_path):
    folder = tmp_path / "stable-diffusion-3.5-large" / "transformer"
    folder.mkdir(parents=True)
    large.save_config(folder)
    write_sparse(large.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = transformer_config(folder.parent)
    own = BackboneConfig.from_diffusers(config, KEPT, keeps_output=True)
    assert own == BackboneConfig.from_diffusers(ARGUMENTS, KEPT, keeps_output=True)
