"""One safetensors file per reward model: what goes in comes out, all else is refused in a sentence."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import drm as package
from drm import checkpoint
from drm.checkpoint import DRMFileError, load_drm, read_header, save_drm
from tests.tiny import tiny_drm


@pytest.fixture
def saved(drm, tmp_path):
    path = tmp_path / "model.safetensors"
    save_drm(drm, path)
    return path


def test_float32_is_bit_equal(drm, inputs, saved):
    loaded = load_drm(saved)
    assert not loaded.training
    before, after = drm.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert loaded.backbone.config == drm.backbone.config
    assert torch.equal(loaded.score(inputs[0], 0.4, *inputs[1:]), drm.score(inputs[0], 0.4, *inputs[1:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backbone_dtype_on_disk_and_in_memory(drm, inputs, tmp_path, dtype):
    path = tmp_path / "half.safetensors"
    save_drm(drm, path, dtype=dtype)
    stored = load_file(path)
    assert {value.dtype for key, value in stored.items() if key.startswith("backbone.")} == {dtype}
    assert {value.dtype for key, value in stored.items() if key.startswith("head.")} == {torch.float32}
    loaded = load_drm(path)
    assert loaded.backbone.dtype == torch.float32
    torch.testing.assert_close(
        loaded.score(inputs[0], 0.4, *inputs[1:]), drm.score(inputs[0], 0.4, *inputs[1:]), atol=0.05, rtol=0
    )
    half = load_drm(path, dtype=dtype)
    assert half.backbone.dtype == dtype
    assert half.head.out.weight.dtype == torch.float32


def test_header_and_metadata(drm, tmp_path):
    path = tmp_path / "deep" / "er" / "model.safetensors"
    table = {"sigma": [0.5], "mean": [1.0], "std": [2.0]}
    save_drm(drm, path, metadata={"name": "other", "calibration": table, "licence": "Apache-2.0"})
    header = read_header(path)
    assert (header["format"], header["version"]) == ("drm-reward-model", 1)
    assert header["architecture"]["backbone"]["num_kept"] == 2
    assert header["architecture"]["head"] == {"kind": "conv", "dim": 128, "hidden": 32}
    assert header["sigma"].startswith("x = (1 - sigma) * x0 + sigma * noise")
    assert (header["text_length"], header["calibration"]) == (20, table)
    assert header["metadata"] == {"name": "other", "licence": "Apache-2.0"}
    loaded = load_drm(path)
    assert loaded.metadata == {**header["metadata"], "text_length": 20, "calibration": table}
    assert drm.metadata["name"] == "random"
    again = tmp_path / "again.safetensors"
    save_drm(loaded, again)
    assert read_header(again) == header


def test_hash_names_the_weights(drm, saved, tmp_path):
    renamed, other = tmp_path / "renamed.safetensors", tmp_path / "other.safetensors"
    save_drm(drm, renamed, metadata={"name": "renamed"})
    save_drm(tiny_drm(hidden=64, depth=2, seed=1), other)
    assert read_header(renamed)["sha256"] == read_header(saved)["sha256"]
    assert read_header(other)["sha256"] != read_header(saved)["sha256"]


def test_loaded_model_trains(saved, inputs):
    loaded = load_drm(saved)
    loaded(inputs[0], 0.5, *inputs[1:]).sum().backward()
    assert loaded.backbone.context_embedder.weight.grad.abs().sum() > 0


def test_loaded_model_outlives_its_file(saved, inputs):
    loaded = load_drm(saved)
    before = loaded.score(inputs[0], 0.5, *inputs[1:])
    saved.write_bytes(b"")
    assert torch.equal(loaded.score(inputs[0], 0.5, *inputs[1:]), before)


def test_save_leaves_one_file_or_the_old_one(drm, saved):
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        save_drm(drm, saved, metadata={"not JSON": object()})
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert saved.stat().st_mode & 0o044


def rewrite(path, tensors=None, **text):
    """The same file with other weights or other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **text}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=metadata)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["backbone.pos_embed.proj.bias", "head.out.bias"])
def test_weights_that_are_not_numbers_are_refused(saved, key, value):
    tensors = load_file(saved)
    tensors[key].view(-1)[0] = value
    rewrite(saved, tensors)
    with pytest.raises(DRMFileError, match=f"holds NaN or infinity in {key}"):
        load_drm(saved)


def test_weights_that_are_not_the_header_s_are_refused(saved):
    tensors = load_file(saved)
    tensors["head.out.bias"] += 1
    rewrite(saved, tensors)
    with pytest.raises(DRMFileError, match="their sha256 differs"):
        load_drm(saved)


def test_a_file_with_early_heads_loads_and_they_are_not_used(drm, inputs, saved):
    """Files of the first versions have heads after earlier blocks, in header and weights."""
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    tensors = load_file(saved)
    tensors |= {
        key.replace("head.", "early_heads.1."): value.clone()
        for key, value in tensors.items()
        if key.startswith("head.")
    }
    header["architecture"]["early_heads"] = {"1": header["architecture"]["head"]}
    header["sha256"] = checkpoint._digest(tensors)
    rewrite(saved, tensors, header=json.dumps(header))
    loaded = load_drm(saved)
    assert torch.equal(loaded.score(inputs[0], 0.4, *inputs[1:]), drm.score(inputs[0], 0.4, *inputs[1:]))
    assert loaded.state_dict().keys() == drm.state_dict().keys()


def test_weights_are_looked_through_once_a_file(saved, monkeypatch):
    made = []
    digest = checkpoint._Digest
    monkeypatch.setattr(checkpoint, "_Digest", lambda: made.append(1) or digest())
    for _ in range(3):
        load_drm(saved)
    assert len(made) == 1
    tensors = load_file(saved)
    tensors["head.out.bias"] += 1
    rewrite(saved, tensors)
    with pytest.raises(DRMFileError, match="their sha256 differs"):
        load_drm(saved)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.bin", "model.pth"])
def test_pickle_formats_are_refused_unopened(drm, tmp_path, name):
    path = tmp_path / name
    torch.save({"head.out.weight": torch.zeros(1)}, path)
    for call in (load_drm, read_header):
        with pytest.raises(DRMFileError, match=r"is not a \.safetensors file"):
            call(path)
    with pytest.raises(DRMFileError, match=r"saved as .safetensors"):
        save_drm(drm, path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_files_are_refused(saved, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(DRMFileError, match="damaged or cut short"):
        load_drm(saved)


def test_missing_file(tmp_path):
    with pytest.raises(DRMFileError, match="is not there"):
        load_drm(tmp_path / "nothing.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DRMFileError, match="is not there"):
        load_drm(tmp_path / "folder.safetensors")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD3 diffusion checkpoint"),
        ("model.diffusion_model.input_blocks.0.0.weight", "an SD1.5 or SDXL checkpoint"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("first_stage_model.decoder.conv_in.weight", "a VAE"),
        ("something.else", "it holds something.else"),
    ],
)
def test_foreign_files_are_named(tmp_path, key, message):
    path = tmp_path / "foreign.safetensors"
    save_file({key: torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(DRMFileError, match=f"not a reward model, .*{message}"):
        load_drm(path)
    save_file({key: torch.zeros(2)}, path)
    with pytest.raises(DRMFileError, match=message):
        read_header(path)


def test_the_demo_checkpoint_and_text_encoder_are_no_reward_models(family):
    with pytest.raises(DRMFileError, match="an SD3 diffusion checkpoint"):
        load_drm(family.checkpoint)
    with pytest.raises(DRMFileError, match="a CLIP text encoder"):
        load_drm(family.text_encoder)
    assert load_drm(family.drm).num_blocks == 3


@pytest.mark.parametrize("version", ["2", "99", "one", ""])
def test_other_versions_are_refused(saved, version):
    rewrite(saved, version=version)
    with pytest.raises(DRMFileError, match="update ComfyUI-DRM"):
        load_drm(saved)


@pytest.mark.parametrize("header", ["", "{", "[]", "{}", '{"architecture": 3}'])
def test_broken_headers_are_refused(saved, header):
    rewrite(saved, header=header)
    with pytest.raises(DRMFileError, match="broken header"):
        load_drm(saved)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("backbone", "num_kept", 9), ("backbone", "flavour", 1), ("head", "hidden", "wide"), ("head", "dim", 7)],
)
def test_unknown_architectures_are_refused(saved, part, name, value):
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    header["architecture"][part][name] = value
    rewrite(saved, header=json.dumps(header))
    with pytest.raises(DRMFileError, match="cannot build"):
        load_drm(saved)


def test_weights_that_are_not_the_headers_are_refused(saved):
    tensors = load_file(saved)
    rewrite(saved, tensors={**tensors, "head.out.weight": torch.zeros(1, 3)})
    with pytest.raises(DRMFileError, match=r"head.out.weight differs"):
        load_drm(saved)
    del tensors["head.norm.bias"]
    rewrite(saved, tensors=tensors)
    with pytest.raises(DRMFileError, match=r"head.norm.bias differs"):
        load_drm(saved)


def test_package_level_names():
    assert package.load_drm is load_drm
    assert issubclass(package.DRMFileError, ValueError)
    assert package.sde.sde_step is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018
