"""Fine-tuning on the forward process by the command: as test_train_step_grpo.py, for NFT and AWM."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drm.forward_rl import old_decay
from drm.grpo import FORWARD_METHODS
from drm.lora import load_lora
from tests.training.fine_tuning import make_config, write_family
from tests.training.processes import log_lines, numbers, train, train_and_kill
from training.grpo.cost import forecast, passes
from training.grpo.step_grpo_config import StepGRPOConfig

AGREE = ("loss", "rewards/mean", "rewards/std", "spread", "kl", "grad_norm")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forward")
    write_family(folder)
    return folder


def make(files: Path, out: str, method: str, **changes) -> StepGRPOConfig:
    """5 prompts of 3 samples each, 2 noise levels."""
    changes = {"iterations": 4, "evaluate_every": 4, **changes}
    grpo = {"method": method, **changes.pop("grpo", {})}
    forward = {"noise_levels": 2, **changes.pop("forward", {})}
    return make_config(files, out=str(files / out), grpo=grpo, forward=forward, **changes)


def run(config: StepGRPOConfig, world: int = 1) -> Path:
    train(config, world)
    return Path(config.train.out)


@pytest.fixture(scope="module", params=["nft", "step-awm"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(files: Path, method: str) -> Path:
    """A run never stopped."""
    return run(make(files, f"reference_{method}", method))


def figures(folder: Path) -> list[list[float]]:
    return [[row[name] for name in AGREE] for row in log_lines(folder / "log.jsonl")]


def test_a_log_line_an_iteration_and_what_it_took(files: Path, reference: Path, method: str):
    rows = log_lines(reference / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(4))
    assert {row["passes"] for row in rows} == {15 * 2}
    assert {row["forwards"] for row in rows} == {15 * (4 + 2)}  # drawn, and the old policy's
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]
    assert all(row["grad_norm"] > 0 and row["ratio_error"] == 0 for row in rows)


def test_the_file_and_the_old_policy_beside_it(files: Path, reference: Path, method: str):
    _, facts = load_lora(reference / "lora.safetensors")
    assert (facts["method"], facts["config"]["forward"]["noise_levels"]) == (method, 2)
    states = [load_file(reference / f"step_{step:08d}" / "state.safetensors") for step in (2, 4)]
    name = "transformer_blocks/0/attn/to_q/lora_B/default/weight"
    assert not torch.equal(states[1][f"old.{name}"], states[1][f"model.{name}"])
    gap = (states[1][f"old.{name}"] - states[1][f"model.{name}"]).abs().max()
    moved = (states[1][f"model.{name}"] - states[0][f"model.{name}"]).abs().max()
    assert gap < 2 * old_decay(3, method) * moved


@pytest.mark.parametrize("moments", [(0, 2), (1, 3)])
def test_killed_and_resumed_it_is_the_run_never_stopped(
    files: Path, reference: Path, method: str, moments: tuple[int, ...]
):
    config = make(files, f"killed_{method}_{moments[0]}", method)
    rng = random.Random(moments[0])
    for lines in moments:
        train_and_kill(config, lines, delay=rng.uniform(0, 0.1))
    out = run(config)
    assert numbers(out / "log.jsonl") == numbers(reference / "log.jsonl")
    assert numbers(out / "evaluation.jsonl") == numbers(reference / "evaluation.jsonl")
    one, two = (load_file(folder / "lora.safetensors") for folder in (reference, out))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_two_processes_equal_one(files: Path, reference: Path, method: str):
    out = run(make(files, f"two_{method}", method, rollout={"micro_prompts": 2}), world=2)
    assert [pytest.approx(row, rel=1e-3, abs=1e-5) for row in figures(reference)] == figures(out)


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_the_reward_rises(files: Path, method: str):
    config = make(
        files,
        f"learn_{method}",
        method,
        grpo={"num_branches": 6},
        rollout={"prompts": 7},
        iterations=25,
        evaluate_every=25,
        learning_rate=1e-2,
        ema=0.0,
    )
    before, after = (row["held_out"] for row in log_lines(run(config) / "evaluation.jsonl"))
    assert after > before + 0.02


@pytest.mark.parametrize("collector", ["best-of", "step-wise"])
def test_other_collectors(files: Path, collector: str):
    forward = {"collector": collector, "collector_branches": 2}
    config = make(files, f"by_{collector}", "step-nft", forward=forward, iterations=1, evaluate_every=None)
    (row,) = log_lines(run(config) / "log.jsonl")
    assert row["forwards"] == 15 * (4 * (2 if collector == "best-of" else 1) + 2)
    assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("method", "without", "scored"),
    # with guidance, a reference and an old policy at 2 levels: 2 + 4 + 4 passes, and 4 steps of 2
    [("nft", 18, 1), ("awm", 18, 1), ("step-nft", 18, 2), ("step-awm", 18, 2)],
)
def test_the_forecast_of_passes(tmp_path: Path, method: str, without: int, scored: int):
    found = passes(make(tmp_path, "none", method))
    assert found == {"passes with gradients": 30, "passes without": 15 * without, "scored": 15 * scored}


def test_the_forecast_of_collectors(tmp_path: Path):
    plain = passes(make(tmp_path, "none", "nft", rollout={"cfg": 1.0}, grpo={"kl_weight": 0.0}))
    assert (plain["passes without"], plain["scored"]) == (15 * (4 + 2), 15)
    best, step = (
        passes(make(tmp_path, "none", "nft", forward={"collector": name, "collector_branches": 3}))
        for name in ("best-of", "step-wise")
    )
    assert (best["passes without"], best["scored"]) == (15 * (10 + 24), 15 * (1 + 3))
    assert (step["passes without"], step["scored"]) == (15 * 18, 15 * (1 + 3 * 3))


def test_the_forecast_has_a_second_lora(tmp_path: Path):
    from tests.training.test_grpo_evaluation import SHAPE

    plain, forward = (forecast(make(tmp_path, "none", name), SHAPE) for name in ("grpo", "awm"))
    part = "LoRA, gradients, Adam, averages"
    assert forward[part] / plain[part] == pytest.approx(6 / 5)
    assert forward["latents at once"] == plain["latents at once"] == 8 * 3


def test_a_run_of_another_method_keeps_its_identity(tmp_path: Path):
    """Runs that were begun before there was a forward section go on."""
    assert "forward" not in make(tmp_path, "none", "step-grpo").identity()
    assert make(tmp_path, "none", "nft").identity()["forward"]["noise_levels"] == 2
