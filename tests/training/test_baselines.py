"""Baseline scorers: a CLIP folder gives transformers' own similarity; the rest says so in a line."""

import shutil
import sys

import pytest
from PIL import Image

from drm.picture_scorers import load_picture_scorer
from tests.tiny_scorers import own_similarity, write_tiny_clip, write_tiny_image_reward
from training.evaluation.baselines import BaselineError, fingerprint, load_baseline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "PickScore_v1")


def pictures():
    gradient = Image.linear_gradient("L").resize((40, 56))
    return [Image.merge("RGB", (gradient, gradient.rotate(90), gradient)), Image.new("RGB", (32, 32), "red")]


@pytest.mark.parametrize("kind", ["clip", "pickscore"])
@pytest.mark.parametrize("prompt", ["a red heart", "a cat and a dog " * 20])
def test_clip_folder_gives_its_own_similarity(folder, kind, prompt):
    scores = load_baseline(f"{kind}:{folder}")(prompt, pictures())
    assert scores == pytest.approx(own_similarity(folder, prompt, pictures()).tolist(), rel=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_image_reward_folder_gives_its_scores(tmp_path):
    place = write_tiny_image_reward(tmp_path / "ImageReward")
    scores = load_baseline(f"imagereward:{place}")("a red heart", pictures())
    assert scores == load_picture_scorer(place)("a red heart", pictures()).tolist()


def test_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_baseline_for_test.py").write_text(
        "def width(prompt, pictures):\n    return [float(one.width) for one in pictures]\n\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_baseline("own_baseline_for_test:width")("any", pictures()) == [40.0, 32.0]
    with pytest.raises(BaselineError, match="own_baseline_for_test has no function number"):
        load_baseline("own_baseline_for_test:number")
    with pytest.raises(BaselineError, match="cannot import nowhere_to_be_found"):
        load_baseline("nowhere_to_be_found:score")
    before = fingerprint("own_baseline_for_test:width")
    assert before == fingerprint("own_baseline_for_test:width")
    assert before != fingerprint("own_baseline_for_test:number")


def test_folders_that_are_no_baseline(folder, tmp_path):
    for spec in ("", "clip", "clip:", ":score"):
        with pytest.raises(BaselineError, match="names no scorer"):
            load_baseline(spec)
    with pytest.raises(BaselineError, match=r"no config\.json"):
        load_baseline(f"clip:{tmp_path}")
    # Weights as a pickle are not even opened.
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    for kind in ("clip", "pickscore"):
        with pytest.raises(BaselineError, match=r"holds pytorch_model\.bin and no \.safetensors"):
            load_baseline(f"{kind}:{broken}")


def test_fingerprint_of_a_folder_follows_its_files(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = fingerprint(f"clip:{copy}")
    assert fingerprint(f"clip:{copy}") == before
    with open(copy / "config.json", "a") as file:
        file.write(" ")
    assert fingerprint(f"clip:{copy}") != before
