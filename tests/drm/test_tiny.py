"""The random demo family is what its loaders expect."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from drm import load_drm
from drm.checkpoint import read_header


def test_checkpoint_has_the_shapes_comfyui_infers_from(family):
    state_dict = load_file(family.checkpoint)
    network = "model.diffusion_model."
    assert state_dict[network + "x_embedder.proj.weight"].shape == (256, 16, 2, 2)
    assert state_dict[network + "pos_embed"].shape == (1, 24 * 24, 256)
    assert state_dict[network + "joint_blocks.1.x_block.attn2.qkv.weight"].shape == (768, 256)
    assert network + "joint_blocks.2.x_block.attn2.qkv.weight" not in state_dict
    assert state_dict["first_stage_model.taesd_decoder.1.weight"].shape == (64, 16, 3, 3)
    assert state_dict["first_stage_model.taesd_encoder.14.weight"].shape == (16, 64, 3, 3)
    assert {value.dtype for value in state_dict.values()} == {torch.float16}


def test_text_encoder_rebuilds_from_its_header(family):
    with safe_open(family.text_encoder, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    tokenizer = Tokenizer.from_str(metadata["tokenizer"])
    model = CLIPTextModel(CLIPTextConfig(**config))
    weights = load_file(family.text_encoder)
    own = {key.removeprefix("text_model.") for key in model.state_dict() if not key.endswith("position_ids")}
    assert {key.removeprefix("text_model.") for key in weights} == own
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    ids = tokenizer.encode("A red Heart").ids
    assert tokenizer.decode(ids).strip() == "a red heart"
    assert config["max_position_embeddings"] == 20
    assert config["bos_token_id"] != config["eos_token_id"]


def test_reward_model_scores_what_the_checkpoint_draws(family):
    drm = load_drm(family.drm)
    assert read_header(family.drm)["text_length"] == 20
    scores = drm.score(torch.randn(3, 16, 16, 16), 0.5, torch.randn(3, 20, 256), torch.randn(3, 256))
    assert scores.std() > 0.01
