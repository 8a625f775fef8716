"""The whole way a researcher goes: published sets to latents, latents to a model, the model to a table.

One YAML file serves `encode` and `train_drm`; the exported file is what `evaluate` and the nodes read.
"""

import json
from pathlib import Path

import pytest
import yaml

from drm import load_drm
from drm.checkpoint import read_header
from tests.training.evaluation import write_config, write_test_sets
from tests.training.processes import log_lines, train
from tests.training.sd3_folder import build_pipeline
from training import encode, evaluate
from training.config import DRMConfig, read_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journey")
    build_pipeline(folder / "sd3")
    write_test_sets(folder / "sets")
    sets = folder / "sets"
    tree = {
        "version": 1,
        "name": "journey",
        "model": {"base": str(folder / "sd3"), "num_kept": 1, "head_hidden": 32},
        "encode": {
            "encoders": str(folder / "sd3"),
            "out": str(folder / "encoded"),
            "resolution": 64,
            "t5_lengths": [8, 16],
            "workers": 0,
            "held_out": 0.3,
            "bad_rows": 0.7,
            "sources": [
                {"format": "hpdv3", "path": str(sets / "hpdv3/train.json"), "weight": 2.0},
                {"format": "imagereward", "path": str(sets / "imagereward/pairs")},
                {"format": "jsonl", "path": str(sets / "own/pairs.jsonl")},
            ],
        },
        "data": {"encoded": str(folder / "encoded")},
        "train": {
            "out": str(folder / "run"),
            "epochs": 2,
            "global_batch": 4,
            "micro_batch": 2,
            "learning_rate": 1.0e-3,
            "warmup": 2,
            "workers": 1,
        },
    }
    (folder / "drm.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_published_sets_to_the_table(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    encode.main(["--config", str(made / "drm.yaml")])
    config = read_config(made / "drm.yaml", DRMConfig)
    train(config)
    header = read_header(made / "run" / "reward.safetensors")
    assert header["text_length"] == 77 + 16
    assert set(header["metadata"]["data"]) == {"hpdv3", "imagereward", "jsonl"}
    meta = json.loads((made / "encoded" / "meta.json").read_text())
    assert meta["weights"] == {"hpdv3": 2.0, "imagereward": 1.0, "jsonl": 1.0}
    steps = len(log_lines(made / "run" / "log.jsonl"))
    assert steps == header["metadata"]["steps"] > 2
    assert load_drm(made / "run" / "reward.safetensors").prompt_dim == 128

    arguments = ["--config", write_config(tmp_path, made / "sets", encoders=str(made / "sd3"), resolution=64)]
    capsys.readouterr()
    model = str(made / "run" / "reward.safetensors")
    assert evaluate.main([*arguments, "--models", model, "--sigma", "0"]) == 0
    table = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {result["column"] for result in table["results"]} >= {"imagereward", "hpdv2", "hpdv3"}
    assert all(0 <= result["accuracy"] <= 1 for result in table["results"])
    assert "reward" in capsys.readouterr().out
