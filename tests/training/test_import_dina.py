"""An imported DiNa-LRM scores as the published model does; what does not fit is named and leaves no file."""

import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from drm import load_drm
from drm.checkpoint import read_header
from drm.comfy_layout import to_comfy_layout
from tests.tiny import tiny_transformer
from tests.training.dina_release import write_release
from tools.comfy_server import ROOT
from training.import_dina import main

CONFIG, HEAD = "config.json", "checkpoint/rm_head.pt"
ADAPTER, SETTINGS = (
    "checkpoint/backbone_lora/adapter_model.safetensors",
    "checkpoint/backbone_lora/adapter_config.json",
)
LORA = "base_model.model.transformer_blocks"


def small_transformer(dual_attention_layers=(0, 1), **changes):
    sizes = {"joint_attention_dim": 40, "pooled_projection_dim": 24, **changes}
    return tiny_transformer(
        **{"hidden": 192, "depth": 3, **sizes}, dual_attention_layers=dual_attention_layers
    )


@pytest.fixture(scope="module")
def transformer():
    """3 blocks of width 192, dual attention in the first two."""
    return small_transformer()


@pytest.fixture(scope="module")
def base(transformer, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(to_comfy_layout(transformer.state_dict(), transformer.config), path)
    return path


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
    state_dict = {k: v.half() for k, v in transformer.state_dict().items()}
    save_file(to_comfy_layout(state_dict, transformer.config), tmp_path / "half.safetensors")
    rounded = copy.deepcopy(transformer)
    rounded.load_state_dict(state_dict)
    dina = write_release(tmp_path / "release", rounded)
    assert run(tmp_path / "half.safetensors", dina.folder, tmp_path / "dina.safetensors") == 0
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


# What does not fit: the change to a good release, and what the message names.


def change_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    for name, value in changes.items():
        if value is None:
            content["model"].pop(name)
        elif isinstance(value, dict):
            content["model"][name] |= value
        else:
            content["model"][name] = value
    (folder / CONFIG).write_text(json.dumps(content))


def change_settings(folder, **changes):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | changes))


def change_adapter(folder, change):
    weights = load_file(folder / ADAPTER)
    change(weights)
    save_file(weights, folder / ADAPTER)


def change_head(folder, change):
    weights = torch.load(folder / HEAD, weights_only=True)
    change(weights)
    torch.save(weights, folder / HEAD)


def rename(old, new):
    return lambda weights: weights.update({new: weights.pop(old)})


UNFIT = {
    "adapter key renamed": (
        lambda f: change_adapter(
            f, rename(f"{LORA}.0.attn.to_k.lora_A.weight", f"{LORA}.0.attn.key.lora_A.weight")
        ),
        r"transformer_blocks.0.attn.to_k.lora_A.weight is missing",
    ),
    "adapter key missing": (
        lambda f: change_adapter(f, lambda w: w.pop(f"{LORA}.1.attn2.to_v.lora_B.weight")),
        r"transformer_blocks.1.attn2.to_v.lora_B.weight is missing",
    ),
    "adapter layer missing": (
        lambda f: change_adapter(f, lambda w: [w.pop(k) for k in list(w) if "1.attn.to_add_out" in k]),
        r"transformer_blocks.1.attn.to_add_out.lora_A.weight is missing",
    ),
    "adapter deeper than its config": (
        lambda f: change_adapter(
            f, lambda w: w.update({f"{LORA}.2.attn.to_q.lora_A.weight": torch.ones(4, 192)})
        ),
        r"transformer_blocks.2.attn.to_q.lora_A.weight has no place",
    ),
    "adapter of another rank": (
        lambda f: change_adapter(
            f, lambda w: w.update({f"{LORA}.0.attn.to_v.lora_A.weight": torch.ones(8, 192)})
        ),
        r"transformer_blocks.0.attn.to_v.lora_A.weight has shape \(8, 192\), wanted \(4, 192\) .*rank 4",
    ),
    "rank said differently in both": (
        lambda f: change_settings(f, r=8),
        r"^import_dina: r is 8 in adapter_config.json and 4 in config.json",
    ),
    "alpha said differently in both": (
        lambda f: change_config(f, lora_config={"lora_alpha": 16}),
        r"lora_alpha is 8 in adapter_config.json and 16 in config.json",
    ),
    "both ranks wrong": (
        lambda f: (change_settings(f, r=8), change_config(f, lora_config={"r": 8})),
        r"transformer_blocks.0.attn.to_q.lora_A.weight has shape \(4, 192\), wanted \(8, 192\)",
    ),
    "DoRA": (lambda f: change_settings(f, use_dora=True), "use_dora set: only plain LoRA"),
    "ranks by pattern": (lambda f: change_settings(f, rank_pattern={"to_q": 8}), "rank_pattern set"),
    "biases": (lambda f: change_settings(f, bias="all"), "bias set"),
    "a changed base": (
        lambda f: change_settings(f, init_lora_weights="pissa_niter_4"),
        "init_lora_weights set",
    ),
    "not LoRA": (lambda f: change_settings(f, peft_type="LOHA"), "peft_type set"),
    "NaN in the adapter": (
        lambda f: change_adapter(f, lambda w: w[f"{LORA}.0.attn.to_q.lora_A.weight"].fill_(float("nan"))),
        r"0.attn.to_q.lora_A.weight holds NaN",
    ),
    "adapter cut short": (lambda f: cut(f / ADAPTER), "adapter_model.safetensors is damaged or cut short"),
    "adapter settings missing": (lambda f: (f / SETTINGS).unlink(), r"adapter_config.json cannot be read"),
    "adapter missing": (lambda f: (f / ADAPTER).unlink(), r"adapter_model.bin is not there"),
    "head key renamed": (
        lambda f: change_head(f, rename("attn1.to_q.weight", "attn1.query.weight")),
        r"rm_head.pt is not the head .*attn1.to_q.weight is missing",
    ),
    "head with more": (
        lambda f: change_head(f, lambda w: w.update({"attn2.gate_vis.0.weight": torch.ones(192, 192)})),
        r"attn2.gate_vis.0.weight has no place",
    ),
    "head of other queries": (
        lambda f: change_config(f, reward_head={"num_queries": 5}),
        r"query_tokens has shape \(1, 4, 192\), wanted \(1, 5, 192\)",
    ),
    "head of other taps": (
        lambda f: change_config(f, visual_head_idx=[1]),
        r"layer_adapters_visual.1.\S+ has no place|agg_visual.weight has shape",
    ),
    "head of another width": (lambda f: change_config(f, reward_head={"width": 128}), "has shape|is missing"),
    "heads that do not divide": (
        lambda f: change_config(f, reward_head={"num_attn_heads": 7}),
        "192 wide: wanted a multiple of its 7",
    ),
    "two scores a picture": (lambda f: change_config(f, reward_head={"out_dim": 2}), "out_dim 2: wanted 1"),
    "learned logistic without its switch": (
        lambda f: change_head(f, lambda w: w.update({"eta3": torch.tensor(0.0)})),
        "eta3 has no place",
    ),
    "NaN in the head": (
        lambda f: change_head(f, lambda w: w["head.bias"].fill_(float("inf"))),
        "head.bias holds NaN",
    ),
    "head cut short": (lambda f: cut(f / HEAD), "rm_head.pt is damaged"),
    "head missing": (lambda f: (f / HEAD).unlink(), "rm_head.pt is not there: give the folder"),
    "head that is no state dict": (lambda f: torch.save([1, 2], f / HEAD), "rm_head.pt is not a state dict"),
    "deeper than the base": (
        lambda f: change_config(f, num_transformer_layers=4),
        "num_kept is 4: wanted 1 to 3, the model's blocks",
    ),
    "text after the base's last block": (
        lambda f: change_config(f, num_transformer_layers=3, text_head_idx=[1, 3]),
        "block 3 is the model's last, it has no text output",
    ),
    "taps past the depth": (
        lambda f: change_config(f, visual_head_idx=[1, 3]),
        r"visual_head_idx is \[1, 3\]",
    ),
    "taps twice": (lambda f: change_config(f, text_head_idx=[1, 1]), r"text_head_idx is \[1, 1\]"),
    "embeddings not first": (lambda f: change_config(f, text_head_idx=[1, 0]), r"wanted different numbers"),
    "depth in words": (lambda f: change_config(f, num_transformer_layers="two"), "wanted a whole number"),
    "fully trained": (lambda f: change_config(f, use_lora=False), "only adapters"),
    "config without taps": (lambda f: change_config(f, visual_head_idx=None), "has no visual_head_idx"),
    "config without model": (lambda f: (f / CONFIG).write_text("{}"), "has no model"),
    "config that is a list": (
        lambda f: (f / CONFIG).write_text("[1]"),
        "no model section as DiNa-LRM writes",
    ),
    "config cut short": (lambda f: cut(f / CONFIG), r"config.json cannot be read|has no"),
    "config missing": (lambda f: (f / CONFIG).unlink(), r"config.json cannot be read .*give the folder"),
}


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="module")
def published(transformer, tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("published") / "release", transformer)


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_named(published, base, tmp_path, capsys, name):
    change, message = UNFIT[name]
    shutil.copytree(published.folder, tmp_path / "release")
    change(tmp_path / "release")
    (tmp_path / "out").mkdir()
    assert run(base, tmp_path / "release", tmp_path / "out" / "dina.safetensors") == 1
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 256, "depth": 4}, r"0.attn.to_q.lora_A.weight has shape \(4, 192\), wanted \(4, 256\)"),
        ({"dual_attention_layers": (0,)}, r"1.attn2.to_\w.lora_A.weight has no place"),
        ({"dual_attention_layers": ()}, r"0.attn2.to_\w.lora_A.weight has no place"),
    ],
)
def test_another_base_is_named(published, tmp_path, capsys, changes, message):
    other = small_transformer(**changes)
    save_file(to_comfy_layout(other.state_dict(), other.config), tmp_path / "other.safetensors")
    assert run(tmp_path / "other.safetensors", published.folder, tmp_path / "dina.safetensors") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "dina.safetensors").exists()


def test_a_head_that_runs_code_is_not_run(published, base, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    shutil.copytree(published.folder, tmp_path / "release")
    torch.save({"head.weight": Bomb()}, tmp_path / "release" / HEAD)
    assert run(base, tmp_path / "release", tmp_path / "dina.safetensors") == 1
    assert "rm_head.pt is damaged or holds more than weights" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("base_name", "out", "message"),
    [
        ("nothing.safetensors", "dina.safetensors", "nothing.safetensors is not there"),
        ("base.safetensors", "dina.pt", "saved as .safetensors"),
        ("base.safetensors", "file/dina.safetensors", "could not be written"),
    ],
)
def test_bad_paths(published, base, tmp_path, capsys, base_name, out, message):
    (tmp_path / "file").write_text("in the way")
    assert run(base.with_name(base_name), published.folder, tmp_path / out) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_old_file_stays_when_an_import_fails(published, base, tmp_path):
    out = tmp_path / "dina.safetensors"
    out.write_bytes(b"old")
    assert run(base.with_name("nothing.safetensors"), published.folder, out) == 1
    assert out.read_bytes() == b"old"
