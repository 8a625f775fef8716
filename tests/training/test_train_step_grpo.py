"""Step-GRPO's command as people run it: to the end, killed and resumed, on one process and on several."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drm import load_drm, save_drm
from drm.lora import load_lora
from drm.sd3.base_model import load_transformer
from tests.training.encoded import write_yaml
from tests.training.fine_tuning import HELD_OUT, WIDTH, embed, make_config, write_family
from tests.training.processes import free_port, log_lines, numbers, train, train_and_kill
from training.grpo.diffusers_policy import build_policy
from training.grpo.step_grpo_config import StepGRPOConfig

FIGURES = ("rewards/mean", "rewards/std", "spread", "kl", "gated", "clipped", "ratio_error", "grad_norm")
AGREE = ("loss", "rewards/mean", "rewards/std", "spread", "kl", "grad_norm")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine_tuning")
    write_family(folder)
    return folder


def run(config: StepGRPOConfig, world: int = 1) -> Path:
    train(config, world)
    return Path(config.train.out)


@pytest.fixture(scope="module")
def reference(files: Path) -> Path:
    """A run of 6 iterations, never stopped."""
    return run(make_config(files, out=str(files / "reference")))


@pytest.fixture(scope="module")
def baseline(files: Path) -> Path:
    """The same with GRPO."""
    return run(make_config(files, out=str(files / "baseline"), grpo={"method": "grpo"}, iterations=4))


def figures(folder: Path) -> list[list[float]]:
    return [[row[name] for name in AGREE] for row in log_lines(folder / "log.jsonl")]


def test_a_log_line_an_iteration_with_what_people_watch(reference: Path):
    rows = log_lines(reference / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    assert all({*FIGURES, "seconds"} <= row.keys() for row in rows)
    assert all((row["ratio_error"], row["clipped"]) == (0, 0) for row in rows)
    assert {row["passes"] for row in rows} == {5 * 3}  # prompts, steps but the last
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_grpo_passes_through_every_trajectory_and_its_ratio_is_one(baseline: Path):
    rows = log_lines(baseline / "log.jsonl")
    assert {row["passes"] for row in rows} == {5 * 3 * 3}
    assert {row["forwards"] for row in rows} == {5 * 3 * 4}
    assert all(row["ratio_error"] == 0 for row in rows)


def test_tensorboard_has_the_log(reference: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reference / "step_grpo")).Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("rewards/mean")]
    rows = log_lines(reference / "log.jsonl")
    assert [step for step, _ in rewards] == [row["step"] for row in rows]
    assert [value for _, value in rewards] == pytest.approx([row["rewards/mean"] for row in rows], rel=1e-6)
    held_out = [event.value for event in events.Scalars("held_out/held_out")]
    assert held_out == pytest.approx(
        [row["held_out"] for row in log_lines(reference / "evaluation.jsonl")], rel=1e-6
    )


def test_accelerate_launch_of_two_processes_equals_one(files: Path, reference: Path, tmp_path: Path):
    """The command line as it is documented."""
    config = make_config(files, out=str(files / "launched"), iterations=2)
    write_yaml(config, tmp_path / "config.yaml")
    launcher = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", f"--main_process_port={free_port()}"]
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *launcher]
    done = subprocess.run(
        [*command, "-m", "training.train_step_grpo", "--config", str(tmp_path / "config.yaml")],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"LoRA -> {config.train.out}/lora.safetensors" in done.stderr
    assert figures(Path(config.train.out)) == [pytest.approx(row, abs=1e-5) for row in figures(reference)[:2]]


def test_evaluation_before_between_and_after(reference: Path):
    rows = log_lines(reference / "evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert {row["prompts"] for row in rows} == {len(HELD_OUT)}
    assert len({row["held_out"] for row in rows}) == 3
    assert all(row["diversity"] > 0 for row in rows)


@pytest.mark.parametrize("method", ["step-grpo", "grpo"])
def test_the_reward_rises(files: Path, method: str):
    config = make_config(
        files,
        out=str(files / f"learn_{method}"),
        grpo={"method": method, "num_branches": 6},
        rollout={"prompts": 7},
        iterations=25,
        evaluate_every=25,
        learning_rate=2e-2,
        ema=0.0,
    )
    before, after = (row["held_out"] for row in log_lines(run(config) / "evaluation.jsonl"))
    assert after > before + 0.02


@pytest.mark.parametrize("moments", [(0, 2, 5), (1, 3, 6)])
def test_killed_at_random_moments_and_resumed_it_is_the_run_never_stopped(
    files: Path, reference: Path, moments: tuple[int, ...]
):
    config = make_config(files, out=str(files / f"killed_{moments[0]}"))
    rng = random.Random(moments[0])
    for lines in moments:
        train_and_kill(config, lines, delay=rng.uniform(0, 0.1))
    out = run(config)
    assert numbers(out / "log.jsonl") == numbers(reference / "log.jsonl")
    assert numbers(out / "evaluation.jsonl") == numbers(reference / "evaluation.jsonl")
    for name in ("lora.safetensors", "best.safetensors"):
        one, two = load_file(reference / name), load_file(out / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(out.glob("*.tmp"))


def test_two_processes_equal_one(files: Path, reference: Path):
    out = run(make_config(files, out=str(files / "two"), rollout={"micro_prompts": 2}), world=2)
    assert [pytest.approx(row, abs=1e-5) for row in figures(reference)] == figures(out)
    one, two = (
        [row["held_out"] for row in log_lines(folder / "evaluation.jsonl")] for folder in (reference, out)
    )
    assert two == pytest.approx(one, abs=1e-5)


def test_two_processes_equal_one_with_grpo(files: Path, baseline: Path):
    config = make_config(files, out=str(files / "two_grpo"), grpo={"method": "grpo"}, iterations=4)
    assert [pytest.approx(row, abs=1e-5) for row in figures(baseline)] == figures(run(config, world=2))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    files: Path, reference: Path, before: int, after: int
):
    out = str(files / f"from_{before}_to_{after}")
    run(make_config(files, out=out, iterations=4), world=before)
    assert [pytest.approx(row, abs=1e-5) for row in figures(reference)] == figures(
        run(make_config(files, out=out), world=after)
    )


def velocity(transformer: torch.nn.Module) -> torch.Tensor:
    """Of two latents at two sigmas with two prompts."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 4, 4, generator=rng)
    embeds, pooled = embed(HELD_OUT[:2])
    with torch.no_grad():
        return transformer(x, embeds, pooled, torch.tensor([800.0, 300.0]), return_dict=False)[0]


def trained(config: StepGRPOConfig) -> torch.nn.Module:
    """The policy of a run's last checkpoint, as the trainer has it."""
    policy = build_policy(config.model, seed=0, device=torch.device("cpu"))
    out = Path(config.train.out)
    state = load_file(out / f"step_{config.train.iterations:08d}" / "state.safetensors")
    for name, parameter in policy.learned.items():
        parameter.data = state[f"model.{name.replace('.', '/')}"]
    return policy.transformer


def test_diffusers_loads_the_file_and_gives_the_trainer_s_velocity(files: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    config = make_config(files, out=str(files / "export"), iterations=4, ema=0.0)
    file = run(config) / "lora.safetensors"
    wanted, base = velocity(trained(config)), velocity(load_transformer(files / "base.safetensors"))
    assert (wanted - base).abs().max() > 1e-2
    alone = load_transformer(files / "base.safetensors")
    alone.load_lora_adapter(file)
    assert torch.allclose(velocity(alone), wanted, atol=1e-4)
    rest = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    rest += ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(
        transformer=load_transformer(files / "base.safetensors"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(rest),
    )
    pipeline.load_lora_weights(str(file))
    assert torch.allclose(velocity(pipeline.transformer), wanted, atol=1e-4)


def test_the_file_says_where_it_comes_from(files: Path, reference: Path):
    tensors, facts = load_lora(reference / "lora.safetensors")
    assert (facts["name"], facts["license"], facts["method"]) == ("tiny", "CC0-1.0", "step-grpo")
    assert (facts["version"], facts["iterations"], facts["seed"], facts["rank"]) == (1, 6, 0, 4)
    assert facts["base"]["name"] == "base.safetensors"
    assert len(facts["base"]["sha256"]) == len(facts["reward"]["sha256"]) == 64
    assert [step for step, _ in facts["curve"]] == [0, 3, 6]
    parts = {name.split(".", 3)[3] for name in tensors}
    assert "attn2.to_out.0.lora_B.weight" in parts
    assert "attn.to_add_out.lora_A.weight" in parts
    assert tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (4, WIDTH)


def test_averaged_weights_are_what_is_exported(files: Path, reference: Path):
    plain = run(make_config(files, out=str(files / "plain"), ema=0.0))
    assert numbers(plain / "log.jsonl") == numbers(reference / "log.jsonl")
    with_, without = (load_file(out / "lora.safetensors") for out in (reference, plain))
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    state = load_file(reference / "step_00000006" / "state.safetensors")
    own = "transformer_blocks/0/attn/to_q/lora_B/default/weight"
    assert torch.equal(with_[name], 2 * state[f"ema.{own}"])
    assert torch.equal(without[name], 2 * state[f"model.{own}"])


def test_going_on_from_a_lora_starts_where_it_ended(files: Path):
    first = run(make_config(files, out=str(files / "first"), ema=0.0, iterations=3))
    model = {"lora": str(first / "lora.safetensors")}
    second = run(make_config(files, out=str(files / "second"), model=model, ema=0.0, iterations=1))
    ended = log_lines(first / "evaluation.jsonl")[-1]["held_out"]
    assert log_lines(second / "evaluation.jsonl")[0]["held_out"] == pytest.approx(ended, abs=1e-5)
    assert log_lines(second / "log.jsonl")[0]["kl"] > 0  # the reference stays the base


def test_the_best_is_kept_and_the_run_stops_when_nothing_gets_better(files: Path):
    config = make_config(
        files,
        out=str(files / "worse"),
        iterations=100,
        evaluate_every=1,
        learning_rate=1.0,
        patience=2,
        ema=0.0,
    )
    out = run(config)
    rows = log_lines(out / "evaluation.jsonl")
    best = max(rows, key=lambda row: row["held_out"])
    assert len(rows) < 100
    assert rows[-1]["step"] == best["step"] + 2
    assert load_lora(out / "best.safetensors")[1]["iterations"] == best["step"]
    assert load_lora(out / "lora.safetensors")[1]["iterations"] == rows[-1]["step"]
    assert run(config) == out  # started again it stops at once
    assert log_lines(out / "evaluation.jsonl") == rows


def test_a_reward_that_is_cheated_stops_the_run_and_the_best_is_kept(files: Path):
    """The reward rises, a second reward model's opinion, whose sign is the other, falls."""
    drm = load_drm(files / "reward.safetensors")
    with torch.no_grad():
        drm.head.out.weight.neg_()
        drm.head.out.bias.neg_()
    save_drm(drm, files / "opponent.safetensors")
    opponent = {"drms": {"opponent": str(files / "opponent.safetensors")}}
    config = make_config(
        files,
        out=str(files / "cheated"),
        evaluate={**opponent, "best_by": "opponent"},
        grpo={"num_branches": 6},
        rollout={"prompts": 7},
        iterations=60,
        evaluate_every=6,
        learning_rate=2e-2,
        patience=2,
        ema=0.0,
    )
    out = run(config)
    rows = log_lines(out / "evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert rows[0]["held_out"] < rows[1]["held_out"] < rows[2]["held_out"]
    assert rows[0]["opponent"] > rows[1]["opponent"] > rows[2]["opponent"]
    best, facts = load_lora(out / "best.safetensors")
    assert facts["iterations"] == 0
    assert not any(tensor.any() for name, tensor in best.items() if "lora_B" in name)


def test_pictures_baselines_and_a_second_reward_model(files: Path):
    config = make_config(
        files,
        out=str(files / "pictures"),
        model={"vae": str(files / "base.safetensors")},
        evaluate={
            "drms": {"other": str(files / "reward.safetensors")},
            "baselines": {"red": "tests.training.fine_tuning:redness"},
            "pictures": 2,
            "sigmas": (0.0,),
        },
        iterations=2,
        evaluate_every=2,
        pictures_every=2,
        ema=0.0,
    )
    out = run(config, world=2)
    rows = log_lines(out / "evaluation.jsonl")
    assert all(row["other"] == row["held_out"] for row in rows)
    assert all(0 <= row["red"] <= 1 for row in rows)
    from PIL import Image

    sheets = [Image.open(path) for path in sorted((out / "pictures").glob("*.png"))]
    assert [sheet.size for sheet in sheets] == [(64, 64), (64, 64)]
    assert sheets[0].tobytes() != sheets[1].tobytes()


def test_bfloat16_and_checkpointing_change_little(files: Path, reference: Path, monkeypatch):
    monkeypatch.setattr("drm.precision.computes_bfloat16", lambda device: True)
    half = make_config(
        files,
        out=str(files / "half"),
        model={"precision": "bf16", "gradient_checkpointing": True},
        iterations=2,
    )
    one, two = (log_lines(out / "log.jsonl")[0] for out in (reference, run(half)))
    assert two["rewards/mean"] == pytest.approx(one["rewards/mean"], abs=0.05)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.3)


def test_the_presets_can_be_read():
    from training.grpo.step_grpo_config import read_step_grpo

    folder = Path(__file__).parents[2] / "training" / "configs"
    paths = sorted(folder.glob("step_grpo_*.yaml"))
    assert len(paths) == 3
    assert {read_step_grpo(path, ["grpo.method=grpo"]).grpo.method for path in paths} == {"grpo"}
