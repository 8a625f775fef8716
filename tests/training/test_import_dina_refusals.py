"""What does not fit a DiNa-LRM import is named in one line, the first of it, and leaves no file."""

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.training.dina_release import (
    ADAPTER,
    CONFIG,
    HEAD,
    LORA,
    SETTINGS,
    change_adapter,
    change_config,
    change_head,
    change_settings,
    small_transformer,
    write_base,
    write_release,
)
from training.import_dina import main


def run(base, release, out):
    return main(["--base", str(base), "--release", str(release), "--out", str(out)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", small_transformer())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("published") / "release", small_transformer())


def rename(old, new):
    return lambda weights: weights.update({new: weights.pop(old)})


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


# The change to a good release, and what the message says.
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
    "alpha in words": (
        lambda f: (change_settings(f, lora_alpha="8"), change_config(f, lora_config={"lora_alpha": "8"})),
        "lora_alpha is '8', wanted a number",
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
    "depth in words": (
        lambda f: change_config(f, num_transformer_layers="two"),
        r"num_transformer_layers is 'two': wanted a whole number",
    ),
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
    write_base(tmp_path / "other.safetensors", other)
    assert run(tmp_path / "other.safetensors", published.folder, tmp_path / "dina.safetensors") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "dina.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux-type diffusion checkpoint"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "an SDXL checkpoint"),
    ],
)
def test_a_base_of_another_family(published, tmp_path, capsys, key, message):
    save_file({key: torch.zeros(2)}, tmp_path / "other.safetensors")
    assert run(tmp_path / "other.safetensors", published.folder, tmp_path / "dina.safetensors") == 1
    assert re.search(f"not an SD3 or SD3.5 checkpoint, it looks like {message}", capsys.readouterr().err)
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
