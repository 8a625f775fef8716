"""Baseline scorers: a CLIP folder gives transformers' own similarity; the rest says so in a line."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny_clip import LENGTH, write_tiny_clip
from training.evaluation.baselines import BaselineError, fingerprint, load_baseline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "PickScore_v1")


def pictures():
    gradient = Image.linear_gradient("L").resize((40, 56))
    return [Image.merge("RGB", (gradient, gradient.rotate(90), gradient)), Image.new("RGB", (32, 32), "red")]


def similarity(folder, prompt):
    """exp(logit_scale) * cosine from the two towers, without the joint forward that the scorer calls."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPTextModel, CLIPVisionModel

    weights = load_file(folder / "model.safetensors")
    tokens = AutoTokenizer.from_pretrained(folder)(
        [prompt], truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt")
    with torch.no_grad():
        text = (
            CLIPTextModel.from_pretrained(folder)(**tokens).pooler_output
            @ weights["text_projection.weight"].T
        )
        image = CLIPVisionModel.from_pretrained(folder)(**pixels).pooler_output
        image = image @ weights["visual_projection.weight"].T
    cosine = torch.nn.functional.cosine_similarity(image, text, dim=-1)
    return (weights["logit_scale"].exp() * cosine).tolist()


@pytest.mark.parametrize("kind", ["clip", "pickscore"])
@pytest.mark.parametrize("prompt", ["a red heart", "a cat and a dog " * 20])
def test_clip_folder_gives_its_own_similarity(folder, kind, prompt):
    scores = load_baseline(f"{kind}:{folder}")(prompt, pictures())
    assert scores == pytest.approx(similarity(folder, prompt), rel=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_scores_depend_on_the_prompt_and_not_on_company(folder):
    score = load_baseline(f"clip:{folder}")
    both = score("a red heart", pictures())
    assert score("a red heart", pictures()[1:]) == pytest.approx(both[1:], rel=1e-5)
    assert score("blue sun", pictures()) != pytest.approx(both, rel=1e-3)


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
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BaselineError, match="cannot load a CLIP model from"):
        load_baseline(f"clip:{broken}")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaselineError, match=r"lack visual_projection\.weight"):
        load_baseline(f"clip:{broken}")
    # Weights as a pickle are not even opened.
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(BaselineError, match=r"holds no \.safetensors"):
        load_baseline(f"clip:{broken}")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(BaselineError, match="of type 'qwen2_vl'"):
        load_baseline(f"pickscore:{broken}")
    shutil.copy(folder / "config.json", broken / "config.json")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (broken / name).unlink(missing_ok=True)
    with pytest.raises(BaselineError, match="laion/CLIP-ViT-H-14"):
        load_baseline(f"pickscore:{broken}")


def test_fingerprint_of_a_folder_follows_its_files(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = fingerprint(f"clip:{copy}")
    assert fingerprint(f"clip:{copy}") == before
    with open(copy / "config.json", "a") as file:
        file.write(" ")
    assert fingerprint(f"clip:{copy}") != before
