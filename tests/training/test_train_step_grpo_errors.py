"""What goes wrong in a fine-tuning ends in one clear line, a non-zero exit and no damaged file."""

import re
from pathlib import Path

import pytest
import torch

from drm import load_drm, save_drm
from drm.backbone import backbone_from_transformer
from drm.head import ConvHead
from drm.lora import save_lora
from drm.model import DRM
from tests.tiny import tiny_drm
from tests.training.encoded import write_yaml
from tests.training.fine_tuning import make_config, write_family
from tests.training.processes import command, log_lines


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    write_family(folder)
    write_yaml(make_config(folder, out=str(folder / "run"), iterations=2), folder / "config.yaml")
    return folder


def run(files: Path, tmp_path: Path, *settings: str, file_limit: int | None = None) -> tuple[int, list[str]]:
    arguments = ["--config", str(files / "config.yaml"), f"train.out={tmp_path / 'run'}", *settings]
    return command(arguments, tmp_path, file_limit, module="training.train_step_grpo")


def fails(files: Path, tmp_path: Path, *settings: str, file_limit: int | None = None) -> str:
    """The one line of a run in tmp_path/run that fails."""
    status, errors = run(files, tmp_path, *settings, file_limit=file_limit)
    assert status == 1
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("grpo.num_branches=1", "num_branches is 1: wanted at least 2"),
        ("train.iterations=0", "train.iterations is 0: wanted at least 1"),
        ("train.itertions=3", "train.itertions is not a setting, the nearest is train.iterations"),
        ("grpo.method=ppo", "grpo.method is 'ppo': wanted one of step-grpo, grpo, nft, awm, step-nft"),
        ("forward.noise_levels=0", "forward.noise_levels is 0: wanted at least 1"),
        ("forward.colector=euler", "forward.colector is not a setting, the nearest is forward.collector"),
        ("forward.collector=dpm", "forward.collector is 'dpm': wanted one of euler, best-of, step-wise"),
        ("grpo.noise_level=0", "noise_level is 0.0: wanted above 0"),
        ("rollout.resolution=20", "rollout.resolution is 20: wanted a multiple of 16"),
        ("rollout.steps=1", "rollout.steps is 1: wanted at least 2"),
        ("train.pictures_every=2", "model.vae is None: wanted a VAE"),
        ("evaluate.baselines={a: 'os:path'}", "model.vae is None: wanted a VAE"),
        ("evaluate.best_by=taste", "evaluate.best_by is taste: wanted one of held_out"),
        ("evaluate.drms={prompts: a.safetensors}", "names of their own"),
        ("version=9", "version is 9, this code reads 1"),
        ("model.base=nowhere.safetensors", "nowhere.safetensors is not there"),
        ("model.drm=nowhere.safetensors", "nowhere.safetensors is not there"),
        ("model.vae=nowhere", "nowhere is no VAE folder"),
        ("data.prompts=nowhere.txt", "cannot read the prompts nowhere.txt"),
        ("data.encoded=nowhere", "nowhere holds no prompt embeddings"),
        ("data.encoders=nowhere", "nowhere has no vae"),
    ],
)
def test_settings_and_files_that_cannot_be_used(files: Path, tmp_path: Path, setting: str, wanted: str):
    assert wanted in fails(files, tmp_path, setting)
    assert not (tmp_path / "run" / "lora.safetensors").exists()


def test_a_file_without_prompts(files: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n# nothing but this\n   \n")
    assert "empty.txt has no prompts: write one a line" in fails(
        files, tmp_path, f"data.prompts={tmp_path / 'empty.txt'}"
    )


def test_a_prompt_that_was_never_embedded(files: Path, tmp_path: Path):
    (tmp_path / "more.txt").write_text("a red thing\na purple thing\n")
    message = fails(files, tmp_path, f"data.prompts={tmp_path / 'more.txt'}")
    assert "no embedding of 'a purple thing'" in message
    assert "data.encoders" in message


def test_reward_models_of_another_family(files: Path, tmp_path: Path):
    from diffusers import SD3Transformer2DModel

    save_drm(tiny_drm(), tmp_path / "wide.safetensors")
    message = fails(files, tmp_path, f"model.drm={tmp_path / 'wide.safetensors'}")
    assert "the base has 128 text width, model.drm takes 256" in message
    other = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=64,
        caption_projection_dim=64,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
    )
    drm = DRM(backbone_from_transformer(other, 1), ConvHead(64, hidden=32))
    save_drm(drm, tmp_path / "four.safetensors")
    message = fails(files, tmp_path, f"evaluate.drms={{four: {tmp_path / 'four.safetensors'}}}")
    assert "the base has 16 latent channels, evaluate.drms.four takes 4" in message


def test_a_reward_that_is_not_a_number(files: Path, tmp_path: Path):
    drm = load_drm(files / "reward.safetensors")
    # Finite as a file's weights must be, and too large for any score.
    drm.head.out.weight.data.fill_(3e38)
    save_drm(drm, tmp_path / "huge.safetensors")
    path = f"model.drm={tmp_path / 'huge.safetensors'}"
    message = fails(files, tmp_path, path, "data.held_out=null")
    assert "iteration 0: the reward model gave NaN or infinity" in message
    assert log_lines(tmp_path / "run" / "log.jsonl") == []
    assert re.search(r"the held-out score after 0 iterations is (nan|-?inf)", fails(files, tmp_path, path))


def test_a_disk_that_fills_leaves_the_checkpoint_before(files: Path, tmp_path: Path):
    assert run(files, tmp_path)[0] == 0
    before = (tmp_path / "run" / "lora.safetensors").read_bytes()
    state = (tmp_path / "run" / "step_00000002" / "state.safetensors").stat().st_size
    message = fails(files, tmp_path, "train.iterations=4", file_limit=(state + len(before)) // 2)
    assert "cannot write the checkpoint of step 4" in message
    assert "the disk is full" in message
    assert "the checkpoint of step 2 is whole" in message
    assert (tmp_path / "run" / "lora.safetensors").read_bytes() == before
    assert run(files, tmp_path, "train.iterations=4") == (0, [])
    assert [row["step"] for row in log_lines(tmp_path / "run" / "log.jsonl")] == [0, 1, 2, 3]
    message = fails(files, tmp_path, "train.iterations=5", file_limit=len(before) // 2)
    assert "the disk is full" in message
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_folder_that_holds_another_run(files: Path, tmp_path: Path):
    assert run(files, tmp_path)[0] == 0
    before = (tmp_path / "run" / "lora.safetensors").read_bytes()
    assert "grpo.num_branches differs" in fails(files, tmp_path, "grpo.num_branches=5")
    assert "model.lora_rank differs" in fails(files, tmp_path, "model.lora_rank=2")
    assert "train.ema differs" in fails(files, tmp_path, "train.ema=0")
    (tmp_path / "other.txt").write_text("a blue thing\n")
    message = fails(files, tmp_path, f"data.prompts={tmp_path / 'other.txt'}")
    assert "data.prompts differs" in message
    assert (tmp_path / "run" / "lora.safetensors").read_bytes() == before


def test_a_damaged_checkpoint(files: Path, tmp_path: Path):
    assert run(files, tmp_path)[0] == 0
    path = tmp_path / "run" / "step_00000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "delete it to go on from the one before" in fails(files, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "wanted"),
    [
        ({"transformer.nothing.lora_A.weight": torch.zeros(4, 4)}, "is not a layer of this training"),
        (None, "was not made by Step-GRPO"),
    ],
)
def test_a_lora_that_cannot_be_gone_on_from(files: Path, tmp_path: Path, tensors: dict | None, wanted: str):
    path = tmp_path / "start.safetensors"
    if tensors is None:
        path.write_bytes((files / "reward.safetensors").read_bytes())
    else:
        save_lora(tensors, path, {})
    assert wanted in fails(files, tmp_path, f"model.lora={path}")


def test_a_lora_of_another_rank(files: Path, tmp_path: Path):
    assert run(files, tmp_path)[0] == 0
    path = tmp_path / "start.safetensors"
    (tmp_path / "run" / "lora.safetensors").rename(path)
    message = fails(files, tmp_path / "run", f"model.lora={path}", "model.lora_rank=8")
    assert "is (4, 128), wanted (8, 128)" in message
