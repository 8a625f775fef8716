"""The demo text encoder inside ComfyUI's CLIP against transformers' own output."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

TEXTS = ["red heart, flat style", "smiling cat face, noto style", ""]


@pytest.fixture(scope="module")
def reference(inside):
    """text -> (prompt_embeds, pooled), computed with transformers and tokenizers alone."""
    from safetensors import safe_open
    from tokenizers import Tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    with safe_open(inside.files.text_encoder, framework="pt") as file:
        header = file.metadata()
    config = CLIPTextConfig(**json.loads(header["config"]))
    model = CLIPTextModel(config)
    weights = load_file(inside.files.text_encoder)
    if not any(key.startswith("text_model.") for key in model.state_dict()):
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    model.load_state_dict(weights)
    tokenizer = Tokenizer.from_str(header["tokenizer"])

    @torch.no_grad()
    def encode(text):
        ids = [config.bos_token_id, *tokenizer.encode(text, add_special_tokens=False).ids]
        ids = [*ids[: config.max_position_embeddings - 1], config.eos_token_id]
        ids += [config.pad_token_id] * (config.max_position_embeddings - len(ids))
        output = model.eval()(input_ids=torch.tensor([ids]))
        return output.last_hidden_state, output.pooler_output

    return encode


@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(inside, reference, text):
    ((embeds, options),) = inside.encode(text)
    wanted, pooled = reference(text)
    assert embeds.shape == (1, 20, 256)
    torch.testing.assert_close(embeds, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(options["pooled_output"], pooled, atol=1e-5, rtol=0)


def test_weights_scale_the_distance_from_the_empty_prompt(inside):
    plain, heavy = inside.encode("red heart")[0][0], inside.encode("(red:1.5) heart")[0][0]
    empty = inside.encode("")[0][0]
    red = slice(1, 1 + len(inside.clip.tokenizer.clip_l.tokenizer.encode("red").ids))
    torch.testing.assert_close(
        heavy[:, red] - empty[:, red], 1.5 * (plain[:, red] - empty[:, red]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(heavy[:, red.stop :], plain[:, red.stop :])


def test_escaped_parentheses_are_text(inside):
    tokens = inside.clip.tokenize(r"heart \(red\)")["l"][0]
    assert {weight for _, weight in tokens} == {1.0}
    assert (
        inside.clip.tokenizer.clip_l.tokenizer.decode([token for token, _ in tokens]).strip() == "heart (red)"
    )


def test_long_prompt_is_cut_with_a_warning(inside, caplog):
    with caplog.at_level(logging.WARNING):
        ((embeds, _),) = inside.encode("red heart " * 30)
    assert embeds.shape == (1, 20, 256)
    assert "18 tokens, the prompt has" in caplog.text


def test_stock_text_encode_node(inside):
    import nodes

    (conditioning,) = nodes.CLIPTextEncode().encode(inside.clip, TEXTS[0])
    assert torch.equal(conditioning[0][0], inside.positive[0][0])


def test_lora_changes_the_encoder_and_is_undone(inside):
    import comfy.sd

    key = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{key}.lora_A.weight": torch.randn(4, 256, generator=generator),
        f"{key}.lora_B.weight": torch.randn(256, 4, generator=generator),
    }
    _, patched = comfy.sd.load_lora_for_models(None, inside.clip, lora, 0.0, 1.0)
    before = inside.encode(TEXTS[0])[0][0]
    assert (inside.encode(TEXTS[0], patched)[0][0] - before).abs().max() > 1e-3
    assert torch.equal(inside.encode(TEXTS[0])[0][0], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pt"}, "is not a text encoder of the demo family"),
        ({"version": "9"}, "version '9'; wanted 'drm-demo-clip', '1'"),
        ({"config": "{"}, "damaged or cut off"),
    ],
)
def test_wrong_headers_are_refused(inside, tmp_path, change, message):
    from safetensors import safe_open

    with safe_open(inside.files.text_encoder, framework="pt") as file:
        header = file.metadata()
    path = tmp_path / "encoder.safetensors"
    save_file(load_file(inside.files.text_encoder), path, metadata=header | change)
    with pytest.raises(ValueError, match=message):
        inside.pack.module("nodes.demo_clip").load_demo_clip(str(path))


def test_weights_that_do_not_belong_are_refused(inside, tmp_path):
    from safetensors import safe_open

    with safe_open(inside.files.text_encoder, framework="pt") as file:
        header = file.metadata()
    weights = load_file(inside.files.text_encoder)
    weights.pop("text_model.final_layer_norm.weight")
    path = tmp_path / "encoder.safetensors"
    save_file(weights, path, metadata=header)
    with pytest.raises(ValueError, match="does not hold the weights its header describes"):
        inside.pack.module("nodes.demo_clip").load_demo_clip(str(path))


@pytest.mark.parametrize("node", ["CLIPSave", "CheckpointSave"])
def test_stock_saving_nodes_are_refused_before_they_write(inside, tmp_path, monkeypatch, node):
    """Nothing would load what they write, a clone of the encoder (as Load LoRA makes) included."""
    import comfy_extras.nodes_model_merging as stock

    saver = getattr(stock, node)()
    saver.output_dir = str(tmp_path)
    models = {"model": inside.model, "vae": inside.vae} if node == "CheckpointSave" else {}
    with pytest.raises(ValueError, match=r"cannot be saved by ComfyUI.*ModelSave"):
        saver.save(clip=inside.clip.clone(), filename_prefix="x", **models)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "told"), [("南瓜", True), ("かぼちゃ", True), ("café, 2 stars ☆", False)])
def test_another_script_is_told_that_it_reads_english(inside, caplog, text, told):
    with caplog.at_level(logging.WARNING):
        inside.clip.tokenize(text)
    assert ("The demo model reads English alone" in caplog.text) is told
