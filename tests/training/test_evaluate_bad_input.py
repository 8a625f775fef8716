"""Models, test sets and places that cannot be evaluated: one line on stderr, exit 1, no damaged file."""

import dataclasses
import errno
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drm import DRM, save_drm
from drm.backbone import TruncatedSD3
from tests.tiny import tiny_drm
from tests.tiny_scorers import write_tiny_clip
from tests.training.evaluation import fails, write_config, write_drm, write_test_sets
from tests.training.sd3_folder import CLIP_WIDTHS, T5_WIDTH, build_pipeline
from training.evaluate import main
from training.evaluation.picture_scores import Lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_test_sets(tmp_path_factory.mktemp("sets") / "data")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    build_pipeline(folder)
    return folder


def test_models_that_cannot_be_evaluated(data, encoders, tmp_path, capsys):
    config = write_config(tmp_path, data, encoders=str(encoders), resolution=64)
    base = ["--config", config, "--models"]
    other = tmp_path / "clip.safetensors"
    save_file({"text_model.embeddings.weight": torch.zeros(2)}, other)
    fails([*base, str(other)], capsys, "clip.safetensors is not a reward model", "a CLIP text encoder")
    good = write_drm(tmp_path / "good" / "m.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(good).read_bytes()[:-100])
    fails([*base, str(cut)], capsys, "cut.safetensors is damaged or cut short")
    fails([*base, str(tmp_path / "none.safetensors")], capsys, "none.safetensors is not there")
    fails([*base, good, good], capsys, "two scorers are called good/m")
    wide = write_drm(tmp_path / "wide.safetensors", joint_attention_dim=256)
    fails([*base, wide], capsys, "wide: the prompt embedding has shape", "wants width 256")
    broken = tiny_drm(joint_attention_dim=T5_WIDTH, pooled_projection_dim=sum(CLIP_WIDTHS))
    with torch.no_grad():
        next(broken.head.parameters()).fill_(math.nan)
    save_drm(broken, tmp_path / "nan.safetensors", metadata={"text_length": 77})
    fails(
        [*base, str(tmp_path / "nan.safetensors")], capsys, "nan.safetensors holds NaN or infinity in head."
    )
    assert not (tmp_path / "out" / "evaluation.json").exists()
    fails(["--config", config], capsys, "nothing to evaluate")
    fails([*base, good, "--encoders", str(tmp_path)], capsys, "has no vae")
    no_encoders = write_config(tmp_path, data)
    fails(["--config", no_encoders, "--models", good], capsys, "models need `encoders`")
    wrong = ["--config", config, "sigmas=[1.5]", "--models", good]
    fails(wrong, capsys, "sigmas[0] is 1.5: wanted at least 0 and at most 1")
    fails(["--config", config, "devise=cuda"], capsys, "devise is not a setting, the nearest is device")


def test_latents_of_another_family(data, encoders, tmp_path, capsys):
    """A reward model over 4-channel latents meets a VAE that makes 16."""
    drm = tiny_drm(joint_attention_dim=T5_WIDTH, pooled_projection_dim=sum(CLIP_WIDTHS))
    backbone = TruncatedSD3(dataclasses.replace(drm.backbone.config, in_channels=4))
    save_drm(DRM(backbone, drm.head), tmp_path / "four.safetensors")
    config = write_config(tmp_path, data, encoders=str(encoders), resolution=64)
    four = str(tmp_path / "four.safetensors")
    fails(["--config", config, "--models", four], capsys, "four: the latent has 16 channels", "reads 4")


def test_test_sets_that_are_not_there_or_broken(data, clip, tmp_path, capsys):
    hpdv3 = {"path": str(data / "hpdv3" / "test.json")}
    baseline = ["--baseline", f"Tiny=clip:{clip}"]

    def config(**sets):
        return ["--config", write_config(tmp_path, data, benchmarks=sets), *baseline]

    assert main(config(hpdv3=hpdv3, hpdv2={"path": str(tmp_path / "test.json")})) == 0
    printed = capsys.readouterr()
    assert "its column stays empty" in printed.err
    cells = [cell.strip() for cell in printed.out.splitlines()[2].split("|")[3:-1]]
    assert cells[:5] == ["-"] * 5
    assert cells[5].endswith("]")
    fails(config(hpdv2={"path": str(tmp_path / "test.json")}), capsys, "no test set is there")
    for text, piece in (("[]", "no row that can be used"), ('[{"prompt"', "cut short"), ("{}", "JSON list")):
        (tmp_path / "empty.json").write_text(text)
        fails(config(hpdv3={"path": str(tmp_path / "empty.json")}), capsys, piece)
    # Rows lost when read, and rows lost when their picture is opened.
    strict = config(imagereward={"path": str(data / "imagereward" / "test.json")})
    fails([*strict, "bad_rows=0.1"], capsys, "2 of 5 rows cannot be used", "at most 10.0%")
    rows = json.loads((data / "hpdv3" / "test.json").read_text())
    (tmp_path / "cut.jpg").write_bytes((data / "hpdv3" / rows[0]["path1"]).read_bytes()[:300])
    for row in rows:
        for key in ("path1", "path2"):
            name = Path(row[key]).name
            (tmp_path / name).write_bytes((data / "hpdv3" / row[key]).read_bytes())
            row[key] = name
    rows[1]["path2"] = "cut.jpg"
    (tmp_path / "test.json").write_text(json.dumps(rows))
    broken = config(hpdv3={"path": str(tmp_path / "test.json")})
    fails([*broken, "bad_rows=0.2"], capsys, "1 of 4 rows cannot be used", "broken picture")
    assert main([*broken, "bad_rows=0.25"]) == 0
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (tree["test_sets"]["hpdv3"]["used"], tree["test_sets"]["hpdv3"]["bad"]) == (
        3,
        {"broken picture": 1},
    )
    assert tree["results"][0]["counted"] == 3
    # Mended, it is read and scored.
    (tmp_path / "cut.jpg").write_bytes((tmp_path / rows[0]["path2"]).read_bytes())
    assert main([*broken, "bad_rows=0"]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"][0]["counted"] == 4


def test_a_full_disk_is_one_line(data, clip, tmp_path, capsys, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(Lines, "append", full)
    fails(
        ["--config", write_config(tmp_path, data), "--baseline", f"Tiny=clip:{clip}"], capsys, "No space left"
    )
