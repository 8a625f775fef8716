"""An imported DiNa-LRM scores as the published model does."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from drm import load_drm
from drm.checkpoint import read_header
from tests.training.dina_release import (
    ADAPTER,
    CONFIG,
    HEAD,
    SETTINGS,
    change_config,
    small_transformer,
    write_base,
    write_release,
)
from tools.comfy_server import ROOT
from training.import_dina import main


@pytest.fixture(scope="module")
def transformer():
    """3 blocks of width 192, dual attention in the first two."""
    return small_transformer()


@pytest.fixture(scope="module")
def base(transformer, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", transformer)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 16, 8, 12), (3, 9, 40), (3, 24)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def run(base, release, out, *more):
    return main(["--base", str(base), "--release", str(release), "--out", str(out), *more])


def check_scores(out, dina, inputs, atol=1e-4):
    """Raw and shown scores of the file against the release's own model, at two sigmas."""
    drm = load_drm(out)
    for sigma in (0.1, 0.4):
        wanted = dina.raw(inputs[0], sigma, *inputs[1:])
        assert wanted.std() > 1e-2
        with torch.no_grad():
            torch.testing.assert_close(drm(inputs[0], sigma, *inputs[1:]), wanted, atol=atol, rtol=0)
        shown = drm.score(inputs[0], sigma, *inputs[1:])
        torch.testing.assert_close(shown, (wanted + 10) / 10, atol=atol, rtol=0)
    return drm


CASES = {
    "as published": {},
    "one block": {"num_transformer_layers": 1, "visual_head_idx": [1], "text_head_idx": [1]},
    "whole depth, text before the end": {
        "num_transformer_layers": 3,
        "visual_head_idx": [1, 2, 3],
        "text_head_idx": [1, 2],
    },
    "embeddings tapped": {"visual_head_idx": [0, 2], "text_head_idx": [0, 1, 2]},
    "only embeddings of the text": {"visual_head_idx": [1], "text_head_idx": [0]},
    "taps before the end": {"visual_head_idx": [1], "text_head_idx": [1]},
    "taps in another order": {"visual_head_idx": [2, 1], "text_head_idx": [2, 1]},
    "image only": {"text_head_idx": [], "use_text_features": False},
    "text features off, text tapped": {"use_text_features": False},
    "projected": {"reward_head": {"use_proj_in": True}},
    "wider": {"reward_head": {"width": 256}},
    "narrower, not a multiple of 4": {"reward_head": {"width": 66, "num_attn_heads": 6}},
    "other queries and heads": {"reward_head": {"num_queries": 7, "num_attn_heads": 3, "dropout": 0.1}},
    "other rank and alpha": {"lora_config": {"r": 6, "lora_alpha": 5, "init_lora_weights": True}},
    "rank-stabilised": {"lora_config": {"r": 9, "lora_alpha": 6, "use_rslora": True}},
    "frozen backbone": {"freeze_backbone": True},
    "logistic": {"use_logistic": True},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_published_models(transformer, base, inputs, tmp_path, name):
    dina = write_release(tmp_path / "release", transformer, **CASES[name])
    out = tmp_path / "dina.safetensors"
    assert run(base, dina.folder, out) == 0
    drm = check_scores(out, dina, inputs)
    assert drm.num_blocks == dina.model["num_transformer_layers"]


@pytest.mark.parametrize("dual", [(), (1,)])
def test_bases_with_other_dual_attention(inputs, tmp_path, dual):
    transformer = small_transformer(dual_attention_layers=dual)
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    dina = write_release(tmp_path / "release", transformer)
    assert run(tmp_path / "pipeline", dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_a_base_in_half_precision(transformer, inputs, tmp_path):
    """The adapter is added in float32 to the rounded weights."""
    half = write_base(tmp_path / "half.safetensors", transformer, torch.float16)
    rounded = small_transformer().half().float()
    dina = write_release(tmp_path / "release", rounded)
    assert run(half, dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_merging_matters_and_is_peft_s_own(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer)
    frozen = write_release(tmp_path / "frozen", transformer, freeze_backbone=True)
    difference = dina.raw(inputs[0], 0.4, *inputs[1:]) - frozen.raw(inputs[0], 0.4, *inputs[1:])
    assert difference.abs().min() > 1e-2
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    merged = dina.blocks.merge_and_unload().state_dict()
    for key, value in load_drm(tmp_path / "dina.safetensors").backbone.state_dict().items():
        torch.testing.assert_close(value, merged[key], atol=1e-5, rtol=1e-5, msg=key)


def test_an_adapter_saved_as_bin(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer)
    torch.save(load_file(dina.folder / ADAPTER), (dina.folder / ADAPTER).with_suffix(".bin"))
    (dina.folder / ADAPTER).unlink()
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_a_config_in_yaml_and_weights_in_bfloat16(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer)
    content = json.loads((dina.folder / CONFIG).read_text())
    (dina.folder / CONFIG).write_text("# as people write it\n" + yaml.safe_dump(content))
    head = {key: value.bfloat16() for key, value in dina.head.items()}
    torch.save(head, dina.folder / HEAD)
    dina.head = {key: value.float() for key, value in head.items()}
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_a_learned_logistic_is_used(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer, use_logistic=True)
    torch.save({**dina.head, "eta3": torch.tensor(0.5), "eta4": torch.tensor(-2.0)}, dina.folder / HEAD)
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    dina.model["use_logistic"] = False
    wanted = 4 / (1 + torch.exp(-(dina.raw(inputs[0], 0.3, *inputs[1:]) - 0.5) / 2.0)) - 2
    with torch.no_grad():
        got = load_drm(tmp_path / "dina.safetensors")(inputs[0], 0.3, *inputs[1:])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_an_adapter_of_older_peft(transformer, base, inputs, tmp_path):
    """Settings that later versions write are not needed, nor that the release's config repeats the rank."""
    dina = write_release(tmp_path / "release", transformer, text_head_idx=[1])
    settings = json.loads((dina.folder / SETTINGS).read_text())
    kept = {name: settings[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")}
    (dina.folder / SETTINGS).write_text(json.dumps(kept))
    change_config(dina.folder, lora_config=None)
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_a_config_without_text(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer, text_head_idx=[])
    change_config(dina.folder, text_head_idx=None, use_text_features=None)
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_target_modules_as_an_expression(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer)
    settings = json.loads((dina.folder / SETTINGS).read_text())
    settings["target_modules"] = r".*\.(attn|attn2)\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    (dina.folder / SETTINGS).write_text(json.dumps(settings))
    assert run(base, dina.folder, tmp_path / "dina.safetensors") == 0
    check_scores(tmp_path / "dina.safetensors", dina, inputs)


def test_the_command_line_and_the_header(transformer, base, inputs, tmp_path):
    dina = write_release(tmp_path / "release", transformer)
    out = tmp_path / "models" / "dina.safetensors"
    command = [sys.executable, "-m", "training.import_dina", "--base", base, "--release", dina.folder]
    done = subprocess.run([*command, "--out", out], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 blocks of width 192, image tokens after (1, 2) and text after (1, 2)" in done.stdout
    check_scores(out, dina, inputs)
    header = read_header(out)
    assert header["architecture"]["head"]["kind"] == "query"
    assert header["architecture"]["backbone"]["text_taps"] == [1, 2]
    assert (header["shown"], header["text_length"]) == ({"scale": 0.1, "offset": 1.0}, 256)
    assert (header["metadata"]["licence"], header["metadata"]["name"]) == ("Apache-2.0", "DiNa-LRM")
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_in_half_precision(transformer, base, inputs, tmp_path, dtype):
    dina = write_release(tmp_path / "release", transformer)
    assert run(base, dina.folder, tmp_path / "dina.safetensors", "--dtype", dtype) == 0
    stored = load_file(tmp_path / "dina.safetensors")
    assert {str(v.dtype)[6:] for k, v in stored.items() if k.startswith("backbone.")} == {dtype}
    check_scores(tmp_path / "dina.safetensors", dina, inputs, atol=0.1)
