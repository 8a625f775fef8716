"""What goes wrong in a training ends in one clear line, a non-zero exit and no damaged file."""

import json
import os
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.encoded import make_config, write_base, write_encoded, write_yaml
from tests.training.processes import begin, command, log_lines, numbers, start, train
from training.engine.launch import HOLDER, TrainingError, only_run_in


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    write_encoded(folder / "encoded")
    write_base(folder / "base.safetensors")
    write_yaml(make_config(folder), folder / "config.yaml")
    return folder


def fails(files: Path, tmp_path: Path, *settings: str, file_limit: int | None = None) -> str:
    """The one line of a run in tmp_path/run that fails."""
    arguments = ["--config", str(files / "config.yaml"), f"train.out={tmp_path / 'run'}", *settings]
    status, errors = command(arguments, tmp_path, file_limit)
    assert status == 1
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("model.base=nowhere.safetensors", "nowhere.safetensors"),
        ("data.encoded=nowhere", "no finished encoded pairs"),
        ("version=7", "version is 7, this code reads 1"),
        ("train.stesp=3", "train.stesp is not a setting, the nearest is train.steps"),
    ],
)
def test_what_is_not_there_or_not_known(files: Path, tmp_path: Path, setting: str, wanted: str):
    assert wanted in fails(files, tmp_path, setting)
    assert not (tmp_path / "run" / "reward.safetensors").exists()


def test_a_base_that_is_cut_short(files: Path, tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((files / "base.safetensors").read_bytes()[:5000])
    assert "cut.safetensors" in fails(files, tmp_path, f"model.base={path}")


def test_a_base_of_another_family(files: Path, tmp_path: Path):
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}, tmp_path / "sdxl.safetensors"
    )
    assert "SD3" in fails(files, tmp_path, f"model.base={tmp_path / 'sdxl.safetensors'}")


def test_latents_of_another_vae(files: Path, tmp_path: Path):
    write_encoded(tmp_path / "encoded", latent=(4, 4, 4))
    message = fails(files, tmp_path, f"data.encoded={tmp_path / 'encoded'}")
    assert "4 channels, the base model takes 16" in message


def test_nan_in_the_data_names_the_step_and_its_rows(files: Path, tmp_path: Path):
    write_encoded(tmp_path / "encoded")
    for path in (tmp_path / "encoded").glob("images-*"):
        tensors = load_file(path)
        tensors["latents"][:, 0, 0, 0] = float("nan")
        save_file(tensors, path)
    message = fails(files, tmp_path, f"data.encoded={tmp_path / 'encoded'}")
    assert "the loss at step 0 is nan" in message
    assert "row " in message
    assert log_lines(tmp_path / "run" / "log.jsonl") == []


def test_a_disk_that_fills_leaves_the_checkpoint_before(files: Path, tmp_path: Path):
    settings = ["train.steps=2", "train.save_every=2"]
    arguments = ["--config", str(files / "config.yaml"), f"train.out={tmp_path / 'run'}"]
    assert command([*arguments, *settings], tmp_path)[0] == 0
    size = (tmp_path / "run" / "step_00000002" / "state.safetensors").stat().st_size
    message = fails(files, tmp_path, "train.steps=4", "train.save_every=2", file_limit=size // 2)
    assert "cannot write the checkpoint of step 4" in message
    assert "the disk is full" in message
    assert "the checkpoint of step 2 is whole" in message
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert command([*arguments, "train.steps=4", "train.save_every=2"], tmp_path) == (0, [])
    assert [row["step"] for row in log_lines(tmp_path / "run" / "log.jsonl")] == [0, 1, 2, 3]


def test_a_reading_process_that_dies(files: Path, tmp_path: Path):
    config = make_config(files, out=str(tmp_path / "run"), steps=100000, save_every=20, workers=1)
    errors = tmp_path / "stderr.txt"
    (process,) = start(config, errors=errors)
    deadline = time.monotonic() + 120
    while len(log_lines(tmp_path / "run" / "log.jsonl")) < 45 and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()
    process.join(120)
    assert process.exitcode not in (0, None)
    text = errors.read_text()
    assert "TrainingError: a process that reads data died" in text
    train(make_config(files, out=str(tmp_path / "run"), steps=50, save_every=20, workers=0))
    rows = numbers(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows][:50] == list(range(50))


def test_a_folder_that_holds_another_run(files: Path, tmp_path: Path):
    train(make_config(files, out=str(tmp_path / "run"), steps=2))
    before = (tmp_path / "run" / "reward.safetensors").read_bytes()
    assert "train.learning_rate differs" in fails(files, tmp_path, "train.learning_rate=0.5")
    assert "model.head_hidden differs" in fails(files, tmp_path, "model.head_hidden=32")
    assert (tmp_path / "run" / "reward.safetensors").read_bytes() == before


def test_two_runs_in_one_folder(files: Path, tmp_path: Path):
    arguments = ["--config", str(files / "config.yaml"), f"train.out={tmp_path / 'run'}"]
    first = begin([*arguments, "train.steps=100000"], tmp_path / "first.txt")
    deadline = time.monotonic() + 120
    while len(log_lines(tmp_path / "run" / "log.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    message = fails(files, tmp_path, "train.steps=100000")
    assert f"another run is in it (process {first.pid} on {socket.gethostname()} since 2" in message
    assert first.is_alive()
    first.kill()
    first.join()
    done = len(log_lines(tmp_path / "run" / "log.jsonl"))
    assert command([*arguments, f"train.steps={done + 2}"], tmp_path) == (0, [])
    rows = log_lines(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(done + 2))
    assert not (tmp_path / "run" / HOLDER).exists()


def test_of_a_launcher_s_processes_the_first_holds_the_folder(tmp_path: Path, monkeypatch):
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
        monkeypatch.setenv("RANK", "1")
        with only_run_in(tmp_path):
            pass
        assert (tmp_path / HOLDER).exists()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr("training.engine.launch.PATIENCE", 0)
        with pytest.raises(TrainingError, match=rf"another run is in it \(process {os.getpid()} on"):
            only_run_in(tmp_path).__enter__()
    with only_run_in(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to(files: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    message = fails(files, tmp_path, f"train.out={tmp_path / 'file' / 'run'}")
    assert "it cannot be written to (Not a directory); give a folder that can be" in message


def test_what_is_left_is_said_as_it_is(files: Path, tmp_path: Path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    assert "there is no checkpoint, the same command starts from the beginning" in fails(files, tmp_path)
    (tmp_path / "run" / "log.jsonl").rmdir()
    train(make_config(files, out=str(tmp_path / "run"), steps=2))
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "log.jsonl").mkdir()
    message = fails(files, tmp_path, "train.steps=4")
    assert "the same command goes on from the checkpoint of step 2, which is whole" in message


def test_a_damaged_checkpoint(files: Path, tmp_path: Path):
    train(make_config(files, out=str(tmp_path / "run"), steps=2))
    path = tmp_path / "run" / "step_00000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "delete it to go on from the one before" in fails(files, tmp_path)


def test_a_checkpoint_s_json_says_where_it_stands(files: Path, tmp_path: Path):
    train(make_config(files, out=str(tmp_path / "run"), steps=3))
    facts = json.loads((tmp_path / "run" / "step_00000003" / "state.json").read_text())
    assert facts["step"] == 3
    assert facts["run"]["model"]["num_kept"] == 2
