"""The authors' checkpoints become DRM files and the other way, and score as their description says."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from drm import DRM, load_drm, save_drm
from drm.head import ConvGNHead
from drm.sd3.comfy_layout import PREFIX, to_comfy_layout
from tests.tiny import randomise, tiny_drm, tiny_transformer
from training.import_drm import main

KEPT = 2


@pytest.fixture(scope="module")
def theirs():
    """Their transformer, with all its blocks; trained, so other weights than the base's."""
    return tiny_transformer(192, 3, seed=5, dual_attention_layers=(0,)).requires_grad_(False)


@pytest.fixture(scope="module")
def files(tmp_path_factory, theirs) -> Path:
    """base.safetensors (ComfyUI's layout), base/ (diffusers), and a checkpoint as their code saves it."""
    folder = tmp_path_factory.mktemp("authors")
    base = tiny_transformer(192, 3, seed=0, dual_attention_layers=(0,))
    layout = to_comfy_layout(base.state_dict(), base.config)
    save_file({PREFIX + key: value for key, value in layout.items()}, folder / "base.safetensors")
    base.save_pretrained(folder / "base")
    head = randomise(ConvGNHead(widths=(32, 64, 64)), 1)
    checkpoint = {f"transformer.{key}": value for key, value in theirs.state_dict().items()}
    checkpoint |= {f"reward_output.{key}": value for key, value in head.state_dict().items()}
    save_file(checkpoint, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(files: Path, out: Path, *more: str, base: str = "base.safetensors", way: str = "--checkpoint") -> int:
    source = [] if way in more else [way, str(files / "model.safetensors")]
    return main(["--base", str(files / base), *source, "--out", str(out), *more])


def described(theirs, checkpoint: dict, latents, timestep, embeds, pooled):
    """Their forward by diffusers and plain functions: x after block KEPT, norm_out, proj_out, head."""
    seen = {}
    hook = theirs.transformer_blocks[KEPT - 1].register_forward_hook(
        lambda module, arguments, output: seen.update(x=output[1])
    )
    theirs(latents, embeds, pooled, timestep)
    hook.remove()
    out = theirs.proj_out(theirs.norm_out(seen["x"], theirs.time_text_embed(timestep, pooled)))
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    out = out.reshape(len(out), rows, columns, 2, 2, 16)
    image = torch.einsum("nhwpqc->nchpwq", out).reshape(latents.shape)
    head = {k.removeprefix("reward_output."): v for k, v in checkpoint.items() if "reward_output" in k}
    for name in ("down1", "down2", "down3"):
        image = F.conv2d(image, head[f"{name}.0.weight"], head[f"{name}.0.bias"], stride=2, padding=1)
        image = F.relu(F.group_norm(image, 32, head[f"{name}.1.weight"], head[f"{name}.1.bias"]))
    hidden = F.relu(F.linear(image.mean(dim=(2, 3)), head["mlp.0.weight"], head["mlp.0.bias"]))
    return F.linear(hidden, head["mlp.3.weight"], head["mlp.3.bias"]).squeeze(1)


@pytest.mark.parametrize("base", ["base.safetensors", "base"])
@pytest.mark.parametrize("sigma", [0.0, 0.25, 0.9])
def test_an_imported_checkpoint_scores_as_described(files, theirs, tmp_path, base, sigma):
    out = tmp_path / "drm.safetensors"
    assert run(files, out, "--num-kept", str(KEPT), "--dtype", "float32", base=base) == 0
    drm = load_drm(out)
    assert drm.num_blocks == KEPT
    assert drm.metadata["text_length"] == 77 + 512
    generator = torch.Generator().manual_seed(3)
    latents, embeds, pooled = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 6, 10), (2, 7, 256), (2, 256))
    )
    timestep = torch.full((2,), 1000 * sigma)
    wanted = described(theirs, load_file(files / "model.safetensors"), latents, timestep, embeds, pooled)
    torch.testing.assert_close(drm.score(latents, sigma, embeds, pooled), wanted, atol=1e-4, rtol=0)


def test_what_is_exported_is_imported_bit_for_bit_and_has_every_weight(files, theirs, tmp_path):
    drm, checkpoint, again = (tmp_path / f"{name}.safetensors" for name in ("drm", "model", "again"))
    kept = ("--num-kept", str(KEPT), "--dtype", "float32")
    assert run(files, drm, *kept) == 0
    assert run(files, checkpoint, "--export", str(drm), way="--export") == 0
    original, exported = load_file(files / "model.safetensors"), load_file(checkpoint)
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in original.items()}
    assert (
        main(["--base", str(files / "base"), "--checkpoint", str(checkpoint), "--out", str(again), *kept])
        == 0
    )
    first, second = load_file(drm), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # Of the last kept block's text only what is read is theirs; what never is comes from the base.
    last = f"transformer.transformer_blocks.{KEPT - 1}"
    key, width = f"{last}.norm1_context.linear.weight", 192
    assert torch.equal(exported[key][: 2 * width], original[key][: 2 * width])
    assert not torch.equal(exported[key][2 * width :], original[key][2 * width :])
    for key in (f"{last}.attn.to_q.weight", f"{last}.ff.net.2.bias", "reward_output.mlp.3.weight"):
        assert torch.equal(exported[key], original[key])


def changed(files: Path, tmp_path: Path, change) -> Path:
    tensors = load_file(files / "model.safetensors")
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.norm_out.linear.weight"),
            "transformer.norm_out.linear.weight is missing",
        ),
        (lambda t: t.pop("reward_output.down2.0.weight"), "reward_output.down2.0.weight is missing"),
        (lambda t: t.pop("reward_output.mlp.3.bias"), "reward_output.mlp.3.bias is missing"),
        (
            lambda t: t.update({"reward_output.mlp.0.weight": torch.zeros(8, 64)}),
            r"reward_output.mlp.0.weight has shape \(8, 64\), wanted \(64, 64\)",
        ),
        (
            lambda t: t.update({"transformer.proj_out.weight": torch.zeros(4, 192)}),
            r"transformer.proj_out.weight has shape \(4, 192\), wanted \(64, 192\)",
        ),
        (
            lambda t: t.update({"transformer.proj_out.bias": torch.full((64,), float("nan"))}),
            "holds NaN or infinity in transformer.proj_out.bias",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("reward_")], "no weight below reward_output."),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("trans")], "no weight below transformer."),
    ],
)
def test_the_first_mismatch_is_named(files, tmp_path, capsys, change, message):
    path, out = changed(files, tmp_path, change), tmp_path / "drm.safetensors"
    assert run(files, out, "--num-kept", "2", "--checkpoint", str(path)) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-kept", "9"], "num_kept is 9: wanted 1 to 3"),
        ([], "the base has 3 blocks, not 24 or 38: say with --num-kept how many"),
        (["--checkpoint", "model.pt"], "model.pt is not a .safetensors file"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors is not there"),
        (["--base", "nowhere.safetensors"], "nowhere.safetensors is not there"),
        (["--out", "drm.ckpt"], "drm.ckpt: weights are saved as .safetensors"),
    ],
)
def test_wrong_arguments_are_one_sentence(files, tmp_path, capsys, arguments, message):
    kept = [] if message.startswith("the base has") else ["--num-kept", "2"]
    assert run(files, tmp_path / "drm.safetensors", *kept, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_base_of_another_width_is_named(files, tmp_path, capsys):
    other = tiny_transformer(128, 2, dual_attention_layers=())
    other.save_pretrained(tmp_path / "other")
    arguments = ["--base", str(tmp_path / "other"), "--num-kept", "1"]
    assert run(files, tmp_path / "drm.safetensors", *arguments) == 1
    assert "the checkpoint does not fit the base: transformer.pos_embed" in capsys.readouterr().err


def test_foreign_and_damaged_files_are_named(files, tmp_path, capsys):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"down_blocks.0.weight": torch.zeros(1)}, foreign)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((files / "model.safetensors").read_bytes()[:5000])
    for path, message in ((foreign, "it looks like a diffusers UNet"), (damaged, "damaged or cut short")):
        assert run(files, tmp_path / "o.safetensors", "--num-kept", "2", "--checkpoint", str(path)) == 1
        assert message in capsys.readouterr().err


def test_only_their_head_is_exported_and_only_with_its_base(files, tmp_path, capsys):
    ours = tmp_path / "ours.safetensors"
    save_drm(tiny_drm(), ours)
    assert run(files, tmp_path / "o.safetensors", "--export", str(ours), way="--export") == 1
    assert "head is of kind 'conv': the authors' code reads 'conv_gn' alone" in capsys.readouterr().err
    drm = tmp_path / "drm.safetensors"
    assert run(files, drm, "--num-kept", str(KEPT)) == 0
    tiny_transformer(128, 3, dual_attention_layers=(0,)).save_pretrained(tmp_path / "other")
    arguments = ["--base", str(tmp_path / "other"), "--export", str(drm)]
    assert run(files, tmp_path / "o.safetensors", *arguments, way="--export") == 1
    assert "the base is another model: " in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_training_goes_on_from_an_imported_model(files, tmp_path):
    """Its header says all that training.train_drm needs."""
    out = tmp_path / "drm.safetensors"
    assert run(files, out, "--num-kept", str(KEPT)) == 0
    drm = load_drm(out)
    assert isinstance(drm, DRM)
    assert json.loads(json.dumps(drm.head.to_dict()))["kind"] == "conv_gn"
    latents, embeds, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 7, 256), torch.randn(2, 256)
    drm.train().requires_grad_(True)
    drm(latents, 0.5, embeds, pooled).sum().backward()
    assert all(p.grad is not None for name, p in drm.named_parameters() if "pos_embed.pos_embed" not in name)
