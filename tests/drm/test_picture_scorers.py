"""A CLIP folder gives transformers' own similarity, and runs nothing; a bad one says so in a line."""

import json
import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from drm.picture_scorers import folder_facts, load_picture_scorer
from tests.tiny_scorers import own_similarity, write_tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "PickScore_v1")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def pictures():
    gradient = Image.linear_gradient("L").resize((40, 56))
    return [Image.merge("RGB", (gradient, gradient.rotate(90), gradient)), Image.new("RGB", (32, 32), "red")]


@pytest.mark.parametrize("prompt", ["a red heart", "a cat and a dog " * 20])
def test_the_folder_gives_its_own_similarity(folder, prompt):
    scores = load_picture_scorer(folder)(prompt, pictures())
    torch.testing.assert_close(scores, own_similarity(folder, prompt, pictures()), rtol=1e-5, atol=1e-5)
    assert scores.dtype == torch.float32
    assert abs(scores[0] - scores[1]) > 1e-3


def test_scores_depend_on_the_prompt_and_not_on_company(folder):
    scorer = load_picture_scorer(folder)
    both = scorer("a red heart", pictures())
    torch.testing.assert_close(scorer("a red heart", pictures()[1:]), both[1:], rtol=1e-5, atol=0)
    assert not torch.allclose(scorer("blue sun", pictures()), both, rtol=1e-3)


def test_weights_in_half_precision_are_computed_in_float32(copy):
    weights = {key: value.half() for key, value in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}))
    scorer = load_picture_scorer(copy)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float32}
    wanted = own_similarity(copy, "a red heart", pictures())
    torch.testing.assert_close(scorer("a red heart", pictures()), wanted, rtol=1e-5, atol=1e-5)


def test_a_folder_without_a_configuration(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"holds no config\.json: give the folder"):
            load_picture_scorer(path)


def test_another_type_of_model(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="of type 'qwen2_vl': wanted 'clip'"):
        load_picture_scorer(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_picture_scorer(copy)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["preprocessor_config.json", "processor_config.json"], r"no preprocessor_config\.json"),
        (["tokenizer.json"], r"no tokenizer\.json"),
    ],
)
def test_small_files_that_are_missing(copy, names, wanted):
    for name in names:
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"{wanted}.*laion/CLIP-ViT-H-14"):
        load_picture_scorer(copy)


class Harmful:
    """What a pickle can do: leaves a file where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_not_opened(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights and no \.safetensors"):
        load_picture_scorer(copy)
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "opened")))
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin and no \.safetensors.*download"):
        load_picture_scorer(copy)
    # Nor where a .safetensors of another name lies beside it.
    save_file({"a": torch.zeros(1)}, copy / "other.safetensors")
    with pytest.raises(ValueError, match="cannot load a CLIP model from"):
        load_picture_scorer(copy)
    assert not (tmp_path / "opened").exists()


def test_code_in_the_folder_is_not_run(copy, tmp_path):
    (copy / "own.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')\nclass Own: pass\n")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        if (copy / name).exists():
            auto = dict.fromkeys(("AutoModel", "AutoConfig", "AutoProcessor", "AutoTokenizer"), "own.Own")
            facts = json.loads((copy / name).read_text())
            (copy / name).write_text(json.dumps(facts | {"auto_map": auto}))
    assert load_picture_scorer(copy)("a red heart", pictures()).isfinite().all()
    assert not (tmp_path / "opened").exists()


def test_damaged_and_incomplete_weights(folder, copy):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot load a CLIP model from"):
        load_picture_scorer(copy)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack visual_projection\.weight"):
        load_picture_scorer(copy)


def test_facts_follow_the_files(copy):
    before = folder_facts(copy)
    assert folder_facts(copy) == before
    with open(copy / "config.json", "a") as file:
        file.write(" ")
    assert folder_facts(copy) != before
