"""The trainer as people run it: to the end, killed and resumed, on one process and on several."""

import dataclasses
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drm import load_drm
from drm.checkpoint import read_header
from tests.training.encoded import make_config, write_base, write_encoded, write_yaml
from tests.training.processes import numbers, train, train_and_kill


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_encoded(folder / "encoded")
    write_base(folder / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def reference(files: Path) -> Path:
    """A run of 8 steps, never stopped: 22 pairs in batches of 8, so every third batch is a short one."""
    config = make_config(files, out=str(files / "reference"), steps=8, save_every=2, keep=9)
    train(config)
    return Path(config.train.out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "reward.safetensors")


def scores(folder: Path) -> torch.Tensor:
    """Of eight random latents. Runs that agree are compared by these: Adam turns the rounding of a gradient
    that is zero by symmetry into whole steps of weights that change nothing.
    """
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 4, 4, generator=rng)
    sigma, prompt = torch.rand(8, generator=rng), torch.randn(8, 9, 256, generator=rng)
    return load_drm(folder / "reward.safetensors").score(latents, sigma, prompt, prompt[:, 0])


def test_the_exported_file_scores_and_says_where_it_comes_from(reference: Path):
    drm = load_drm(reference / "reward.safetensors")
    rng = torch.Generator().manual_seed(0)
    scores = drm.score(
        torch.randn(2, 16, 4, 4, generator=rng),
        0.5,
        torch.randn(1, 9, 256, generator=rng),
        torch.zeros(1, 256),
    )
    assert scores.shape == (2,)
    assert torch.isfinite(scores).all()
    header = read_header(reference / "reward.safetensors")
    facts = header["metadata"]
    assert (facts["name"], facts["license"], facts["trained"]) == ("tiny", "CC0-1.0", "full")
    assert facts["data"] == {"hpdv3": 14, "pickapic": 14}
    assert (facts["steps"], facts["pairs_seen"]) == (8, 64)
    assert re.fullmatch("[0-9a-f]{64}", facts["config_sha256"])
    assert facts["held_out"]["pairs"] == 6
    assert len(facts["held_out"]["by_sigma"]) == 4
    assert header["text_length"] == 6 + 8
    assert facts["resolution"] == 8 * 4
    assert len(header["calibration"]["sigma"]) == len(header["calibration"]["std"]) > 0


def test_a_log_line_a_step_with_what_people_watch(reference: Path):
    rows = numbers(reference / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    wanted = {"loss", "accuracy", "margin", "rewards/mean", "rewards/std", "grad_norm", "learning_rate"}
    assert all(wanted <= row.keys() for row in rows)
    assert rows[0]["learning_rate"] == pytest.approx(5e-4)
    assert rows[1]["learning_rate"] == rows[-1]["learning_rate"] == pytest.approx(1e-3)


def test_training_learns_the_preference(files: Path):
    config = make_config(
        files, out=str(files / "learn"), steps=120, save_every=120, learning_rate=3e-3, sigma=(0.0, 0.3)
    )
    train(config)
    rows = numbers(files / "learn" / "log.jsonl")
    assert sum(row["accuracy"] for row in rows[-12:]) / 12 > 0.8
    assert sum(row["loss"] for row in rows[-12:]) < 0.8 * sum(row["loss"] for row in rows[:12])


def test_killed_at_random_moments_and_resumed_it_is_the_run_never_stopped(files: Path, reference: Path):
    config = make_config(files, out=str(files / "killed"), steps=8, save_every=2, keep=9)
    rng = random.Random(5)
    for lines in (0, 2, 3, 6, 7):
        train_and_kill(config, lines, delay=rng.uniform(0, 0.08))
    train(config)
    assert numbers(files / "killed" / "log.jsonl") == numbers(reference / "log.jsonl")
    one, two = weights(reference), weights(files / "killed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((files / "killed").glob("*.tmp"))


def test_two_processes_equal_one_at_the_same_global_batch(files: Path, reference: Path):
    config = make_config(files, out=str(files / "two"), steps=8, save_every=2, keep=9, micro_batch=3)
    train(config, world=2)
    losses = [[row["loss"] for row in numbers(folder / "log.jsonl")] for folder in (reference, files / "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert torch.allclose(scores(reference), scores(files / "two"), atol=2e-3)  # files hold half precision


def test_a_launcher_s_processes_find_each_other_without_a_gpu(files: Path, reference: Path, tmp_path: Path):
    path = write_yaml(
        make_config(files, out=str(tmp_path / "run"), steps=3, micro_batch=4), tmp_path / "c.yaml"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    subprocess.run(
        [*command, "-m", "training.train_drm", "--config", str(path)],
        check=True,
        cwd=Path(__file__).parents[2],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=240,
    )
    losses = [row["loss"] for row in numbers(tmp_path / "run" / "log.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in numbers(reference / "log.jsonl")][:3], abs=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    files: Path, reference: Path, before: int, after: int
):
    out = str(files / f"from_{before}_to_{after}")
    train(make_config(files, out=out, steps=4, save_every=2), world=before)
    train(make_config(files, out=out, steps=8, save_every=2), world=after)
    losses = [[row["loss"] for row in numbers(folder / "log.jsonl")] for folder in (reference, Path(out))]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_only_the_last_checkpoints_are_kept(files: Path):
    config = make_config(files, out=str(files / "kept"), steps=6, save_every=2, keep=2)
    train(config)
    assert sorted(p.name for p in (files / "kept").glob("step_*")) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize("part", ["lora", "head"])
def test_parts_train_and_export_as_a_plain_model(files: Path, part: str):
    model = {"train": part, "lora_rank": 4, "lora_alpha": 8}
    for world in (1, 2):
        config = make_config(files, model=model, out=str(files / f"{part}_{world}"), steps=6)
        train(config, world=world)
    start = load_drm(files / "reference" / "reward.safetensors").state_dict().keys()
    made = weights(files / f"{part}_1")
    assert made.keys() == start
    assert torch.allclose(scores(files / f"{part}_1"), scores(files / f"{part}_2"), atol=2e-3)
    base = weights_of_base(files)
    moved = {name for name in base if (made[name].float() - base[name]).abs().max() > 1e-3}
    assert bool(moved) == (part == "lora")
    assert all("attn" in name for name in moved)


def weights_of_base(files: Path) -> dict[str, torch.Tensor]:
    from drm.sd3.base_model import load_backbone

    backbone = load_backbone(files / "base.safetensors", 2)
    return {f"backbone.{name}": value for name, value in backbone.state_dict().items()}


def test_head_only_goes_on_from_a_reward_model(files: Path, reference: Path):
    base = str(reference / "reward.safetensors")
    config = make_config(
        files, model={"base": base, "train": "head", "num_kept": 2}, out=str(files / "more"), steps=4
    )
    train(config)
    before, after = weights(reference), weights(files / "more")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("head."))


def test_without_held_out_pairs_it_exports_without_a_table(files: Path, tmp_path: Path):
    write_encoded(tmp_path / "encoded", held_out=0)
    config = make_config(
        files, data={"encoded": str(tmp_path / "encoded")}, out=str(tmp_path / "run"), steps=2
    )
    train(config)
    assert read_header(tmp_path / "run" / "reward.safetensors")["calibration"] is None


def test_the_thurstone_loss_is_an_option(files: Path, reference: Path):
    config = make_config(files, out=str(files / "thurstone"), steps=2, loss="thurstone")
    train(config)
    assert (
        numbers(files / "thurstone" / "log.jsonl")[0]["loss"] != numbers(reference / "log.jsonl")[0]["loss"]
    )


def test_bfloat16_and_checkpointing_change_little(files: Path, reference: Path, monkeypatch):
    monkeypatch.setattr("drm.precision.computes_bfloat16", lambda device: True)
    config = make_config(files, model={"gradient_checkpointing": True}, out=str(files / "half"), steps=3)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16")))
    losses = [row["loss"] for row in numbers(files / "half" / "log.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in numbers(reference / "log.jsonl")][:3], abs=2e-2)


@pytest.mark.parametrize("part", ["full", "lora", "head"])
def test_the_authors_recipe_is_one_run_however_it_is_cut_or_spread(files: Path, part: str):
    """Their head with its dropout, noise of its own for each side, logit-normal sigmas, no averages."""
    model = {"head": "conv_gn", "train": part, "lora_rank": 4}
    recipe = {"noise": "independent", "sigma_draw": "logit-normal", "ema": 0.0, "weight_decay": 1e-4}
    recipe["micro_batch"] = 4  # sums of other parts round otherwise, and Adam makes whole steps of rounding
    outs = {name: files / f"authors_{part}_{name}" for name in ("whole", "parted", "two")}
    train(make_config(files, model=model, out=str(outs["whole"]), steps=4, **recipe))
    for steps in (2, 4):
        train(make_config(files, model=model, out=str(outs["parted"]), steps=steps, **recipe))
    train(make_config(files, model=model, out=str(outs["two"]), steps=4, **recipe), world=2)
    losses = {name: [row["loss"] for row in numbers(out / "log.jsonl")][-4:] for name, out in outs.items()}
    assert losses["parted"] == losses["whole"]
    assert losses["two"] == pytest.approx(losses["whole"], abs=1e-6)
    assert torch.equal(scores(outs["parted"]), scores(outs["whole"]))
    drm = load_drm(outs["whole"] / "reward.safetensors")
    assert drm.head.to_dict()["kind"] == "conv_gn"
    before = {name: value for name, value in drm.backbone.state_dict().items() if "proj_out" in name}
    assert before.keys() == {"proj_out.weight", "proj_out.bias"}
