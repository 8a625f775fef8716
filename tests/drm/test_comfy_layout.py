"""Weights to ComfyUI's layout and back through diffusers' converter are the same weights."""

import pytest
import torch

from drm.sd3.comfy_layout import PREFIX, from_comfy_layout, to_comfy_layout
from tests.tiny import tiny_transformer

USED = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
)
WIDTHS = (
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
    "qk_norm",
    "caption_projection_dim",
)


@pytest.fixture(scope="module")
def whole():
    return tiny_transformer(
        192, 3, dual_attention_layers=(0, 2), joint_attention_dim=40, pooled_projection_dim=24
    )


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_round_trip(whole, prefix):
    comfy = {prefix + key: value for key, value in to_comfy_layout(whole.state_dict(), whole.config).items()}
    if prefix:
        comfy["first_stage_model.vae_scale"] = torch.tensor(1.0)
    config, state_dict = from_comfy_layout(comfy)
    source = whole.state_dict()
    assert state_dict.keys() == source.keys()
    assert all(torch.equal(state_dict[key], source[key]) for key in source)
    for name in (*USED, *WIDTHS):
        assert config[name] == whole.config[name], name
    assert config["dual_attention_layers"] == (0, 2)


def test_names_and_fused_weights(whole):
    source, comfy = whole.state_dict(), to_comfy_layout(whole.state_dict(), whole.config)
    qkv = comfy["joint_blocks.1.x_block.attn.qkv.weight"]
    assert qkv.shape == (3 * 192, 192)
    assert torch.equal(qkv[192:384], source["transformer_blocks.1.attn.to_k.weight"])
    # The final layer's modulation is (shift, scale) there and (scale, shift) in diffusers.
    scale, shift = source["norm_out.linear.bias"].chunk(2)
    assert torch.equal(comfy["final_layer.adaLN_modulation.1.bias"], torch.cat((shift, scale)))
    assert "joint_blocks.2.context_block.mlp.fc1.weight" not in comfy
    assert all(value.is_contiguous() for value in comfy.values())


def test_what_comfyui_could_not_load_is_refused():
    narrow = tiny_transformer(128, 3)
    with pytest.raises(ValueError, match="3 blocks of width 128"):
        to_comfy_layout(narrow.state_dict(), narrow.config)


def test_weights_without_a_place_are_refused(whole):
    extra = {**whole.state_dict(), "image_proj.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="not an SD3 transformer"):
        to_comfy_layout(extra, whole.config)


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight is missing"):
        from_comfy_layout({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3)})
