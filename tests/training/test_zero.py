"""ZeRO-2 through DeepSpeed, on two CPU processes: the run that DDP makes, in the same files."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from drm import load_drm
from tests.training.encoded import make_config, write_base, write_encoded
from tests.training.processes import numbers, start, train
from training.engine import launch

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="wants pip install deepspeed"
)
RECIPE = {"noise": "independent", "sigma_draw": "logit-normal", "ema": 0.0, "micro_batch": 2, "save_every": 2}
WIDTHS = (2, 7, 256), (2, 256)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    write_encoded(folder / "encoded")
    write_base(folder / "base.safetensors")
    return folder


def config(files: Path, name: str, **changes):
    model = {"head": "conv_gn", "train": changes.pop("part", "full"), "lora_rank": 4}
    return make_config(files, model=model, out=str(files / name), **RECIPE | {"steps": 4} | changes)


def losses(files: Path, name: str) -> list[float]:
    return [row["loss"] for row in numbers(files / name / "log.jsonl")]


def scores(files: Path, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(shape, generator=generator) for shape in WIDTHS]
    latents = torch.randn(2, 16, 4, 4, generator=generator)
    return load_drm(files / name / "reward.safetensors").score(latents, 0.4, *prompts)


@needs_deepspeed
def test_it_is_the_run_of_two_plain_processes(files: Path):
    train(config(files, "plain"), world=2)
    train(config(files, "zero"), world=2, zero="2")
    assert losses(files, "zero") == pytest.approx(losses(files, "plain"), abs=1e-5)
    torch.testing.assert_close(scores(files, "zero"), scores(files, "plain"), atol=2e-3, rtol=0)


@needs_deepspeed
@pytest.mark.parametrize(("before", "after"), [("2", "2"), ("2", None), (None, "2")])
def test_a_checkpoint_goes_on_under_any_launcher(files: Path, before: str | None, after: str | None):
    name = f"from_{before}_to_{after}"
    if not (files / "whole").exists():
        train(config(files, "whole"), world=2)
    train(config(files, name, steps=2), world=2, zero=before)
    train(config(files, name), world=2, zero=after)
    assert losses(files, name) == pytest.approx(losses(files, "whole"), abs=1e-5)


@needs_deepspeed
def test_parts_are_refused_in_a_sentence(files: Path, tmp_path: Path):
    errors = tmp_path / "errors.txt"
    (process,) = start(config(files, "lora", part="lora"), errors=errors, zero="2")
    process.join(240)
    assert process.exitcode == 1
    assert "model.train is 'lora' under DeepSpeed" in errors.read_text()


@needs_deepspeed
def test_another_stage_is_refused_in_a_sentence(files: Path, tmp_path: Path):
    errors = tmp_path / "errors.txt"
    (process,) = start(config(files, "stage_3"), errors=errors, zero="3")
    process.join(240)
    assert process.exitcode == 1
    assert "DeepSpeed is configured with ZeRO's stage 3: wanted stage 2" in errors.read_text()


def test_without_deepspeed_it_is_said_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: False)
    with pytest.raises(launch.TrainingError, match="is not installed: pip install deepspeed"):
        launch.make_accelerator(tmp_path)


def test_its_file_is_one_that_accelerate_reads():
    path = Path(__file__).parents[2] / "training" / "configs" / "accelerate_zero2.yaml"
    assert load_config_from_file(str(path)).deepspeed_config["zero_stage"] == 2
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
