"""The demo's encoders behind the commands, and the way to a first reward model on what ships."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import encode, evaluate, train_drm, train_step_grpo
from training.data.demo_encoders import DemoEncoders, find_files
from training.data.encoders import EncoderError, SD3Encoders
from training.data.prompt_cache import PromptError, open_encoders, sd3_encode
from training.demo import taste
from training.demo.export import load_family
from training.demo.generator import draw

ROOT = Path(__file__).parent.parent.parent
MODELS = ROOT / "models"
COMMANDS = {
    "training.demo.taste": taste.main,
    "training.encode": encode.main,
    "training.train_drm": train_drm.main,
    "training.evaluate": evaluate.main,
    "training.train_step_grpo": train_step_grpo.main,
}
SHORT = {"training.train_drm": ["train.steps=4", "train.evaluate_every=2", "train.warmup=1"]}
SHORT["training.train_step_grpo"] = ["train.iterations=1", "evaluate.prompts=4", "evaluate.seeds=1"]
SHORT["training.train_step_grpo"] += ["rollout.prompts=2", "rollout.micro_prompts=2", "rollout.steps=3"]


@pytest.fixture(scope="module")
def encoders():
    return SD3Encoders.from_folder(MODELS)


@pytest.fixture(scope="module")
def family():
    return load_family(MODELS)


def test_the_folder_that_ships_is_the_demo_s(encoders):
    assert isinstance(encoders, DemoEncoders)
    assert encoders.latent_shape(128) == (16, 16, 16)
    assert encoders.prompt_shapes([]) == {"clip": (20, 256), "pooled": (256,)}


def test_a_drawing_comes_back(encoders, family):
    """Its latents, and what they decode to."""
    latents = draw(family.generator, family.tokenizer, ["heart", "cat"], [1, 2], steps=4, cfg=1.0)
    pictures = family.decode(latents)
    again = encoders.encode_pixels(torch.from_numpy(pictures))
    assert torch.nn.functional.mse_loss(again, latents) < 0.1 * latents.var()
    error = (family.decode(again).astype(np.float32) - pictures) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 24


def test_prompts_are_as_the_generator_reads_them(encoders, family):
    from training.demo import text

    embeds, pooled = encoders.encode_prompts(["a red heart", ""], None)
    wanted = text.embed(family.generator.text_encoder, text.encode_ids(family.tokenizer, ["a red heart", ""]))
    assert torch.equal(embeds, wanted[0])
    assert torch.equal(pooled, wanted[1])


def test_another_encoder_has_another_fingerprint(encoders, tmp_path):
    for path in find_files(MODELS):
        (tmp_path / path.parent.name).mkdir()
        shutil.copy(path, tmp_path / path.parent.name)
    copy = SD3Encoders.from_folder(tmp_path)
    assert copy.describe()["hash"] == encoders.describe()["hash"]
    prompts = copy.describe(copy.text_parts)["hash"]
    with open(copy.checkpoint, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert copy.describe()["hash"] != encoders.describe()["hash"]
    assert copy.describe(copy.text_parts)["hash"] == prompts


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda demo: demo.prompt_shapes([77]), "have no T5: set t5_lengths to []"),
        (lambda demo: demo.latent_shape(100), "resolution is 100: wanted a multiple of 16"),
        (
            lambda demo: demo.encode_pixels(
                torch.zeros(1, 16, 16, 3, dtype=torch.uint8), [torch.Generator()]
            ),
            "set posterior to mean",
        ),
    ],
)
def test_what_it_has_not_is_refused_in_a_sentence(encoders, ask, sentence):
    with pytest.raises(EncoderError, match=re.escape(sentence)):
        ask(encoders)


def test_prompts_of_a_length_it_has_not_are_refused_in_a_sentence():
    found, _ = open_encoders(str(MODELS), 77, "cpu")
    with pytest.raises(PromptError, match="have no T5: set t5_length to null"):
        sd3_encode(found, 77)(["a cat"])


def test_a_damaged_text_encoder_is_refused_in_a_sentence(tmp_path):
    for path in find_files(MODELS):
        (tmp_path / path.parent.name).mkdir()
        shutil.copy(path, tmp_path / path.parent.name)
    broken = SD3Encoders.from_folder(tmp_path)
    broken.clip.write_bytes(broken.clip.read_bytes()[:5000])
    with pytest.raises(EncoderError, match="cannot be loaded"):
        broken.load_text(t5=False)


def test_the_redder_one_is_chosen():
    pictures = np.full((3, 2, 2, 3), 255, np.uint8)
    pictures[0, 0, 0] = [200, 20, 30]  # 200 - 25
    pictures[1, :, 0] = [[100, 90, 10], [120, 10, 10]]  # 50 and 110
    assert taste.redness(pictures).tolist() == [175.0, 80.0, 0.0]


def test_of_every_two_pictures_the_redder_is_chosen(tmp_path):
    """Pictures that are there already are not drawn again, so no model is asked."""
    (tmp_path / "pictures").mkdir()
    reds = {"heart": (90, 240, 10, 160), "cat": (5, 6, 8, 7)}
    for number, values in enumerate(reds.values()):
        for place, red in enumerate(values):
            picture = np.full((8, 8, 3), (red, 0, 0), np.uint8)
            Image.fromarray(picture).save(tmp_path / "pictures" / f"{number:04d}_{place}.png")
    assert taste.choose(tmp_path, None, list(reds)) == 12
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        chosen, rejected = (int(row[side][-5]) for side in ("chosen", "rejected"))
        assert reds[row["prompt"]][chosen] > reds[row["prompt"]][rejected]
    assert len({tuple(row.items()) for row in rows}) == 12


def commands():
    """The lines of the block of docs/reward_models.md that tries it on the demo."""
    text = (ROOT / "docs" / "reward_models.md").read_text()
    (block,) = [part for part in text.split("```") if "training.demo.taste" in part]
    lines = [line.partition("#")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_the_commands_of_the_page_run_one_after_another(tmp_path, monkeypatch, capsys):
    """As they stand, from a folder with nothing but what ships, cut short."""
    for name in ("models", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    seen = []
    for python, _, module, *arguments in commands():
        assert python == "python"
        if module == "training.demo.taste":
            arguments += ["--things", "12"]
        assert not COMMANDS[module]([*arguments, *SHORT.get(module, [])])
        seen.append(module)
    assert seen.count("training.train_drm") == 2
    assert {"training.demo.taste", "training.train_step_grpo"} <= set(seen)
    pairs = [json.loads(line) for line in Path("data/demo_taste/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 12 * 6
    for run in ("demo_taste", "own_taste"):
        rows = Path(f"runs/{run}/evaluation.jsonl").read_text().splitlines()
        assert 0 <= json.loads(rows[-1])["accuracy"] <= 1
        assert Path(f"runs/{run}/reward.safetensors").is_file()
    assert list(Path("runs/demo/step_grpo").glob("*.safetensors"))
    assert not (ROOT / "data" / "demo_taste").exists()
