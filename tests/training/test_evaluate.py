"""The command from published files to table, JSON and figure, its numbers recomputed here."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from drm import load_drm, save_drm
from tests.tiny import tiny_drm
from tests.tiny_scorers import write_tiny_clip
from tests.training.evaluation import write_config, write_drm, write_test_sets
from tests.training.sd3_folder import CLIP_WIDTHS, T5_WIDTH, build_pipeline
from training import evaluate
from training.config import read_config
from training.data.encoders import SD3Encoders
from training.data.readers import Picture, Ranking, Report, read_rankings
from training.evaluate import EvaluateConfig, main
from training.evaluation.picture_scores import prompt_noise, t5_length
from training.evaluation.test_sets import FORMATS, drop_unscored, source_of, with_other_prompts

ROWS = {"imagereward": 3, "pickapic_test": 7, "pickapic_test_unique": 4, "pickapic_validation_unique": 3}
ROWS |= {"hpdv2": 3, "hpdv3": 4, "pairs": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_test_sets(tmp_path_factory.mktemp("sets") / "data")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def rankings_of(config, name):
    source = source_of(name, FORMATS[name], getattr(read_config(config, EvaluateConfig).benchmarks, name))
    return list(read_rankings(source, Report()))


def accuracies(config, score):
    """Every column straight from its definition, pair by pair, without training.evaluation.protocols."""

    @functools.cache
    def scored(name):
        return [(r.ranks, [score(r.prompt, p.open()) for p in r.pictures]) for r in rankings_of(config, name)]

    right = counted = 0
    for ranks, scores in scored("imagereward"):
        for i in range(len(ranks)):
            for j in range(len(ranks)):
                if ranks[i] < ranks[j]:
                    right, counted = right + (scores[i] > scores[j]), counted + 1
    found = {"imagereward": right / counted}
    per_prompt = []
    for ranks, scores in scored("hpdv2"):
        n, inversions = len(ranks), 0
        for i in range(n):
            for j in range(n):
                inversions += ranks[i] < ranks[j] and scores[i] < scores[j]
        per_prompt.append(1 - inversions / (n * (n - 1) / 2))
    found["hpdv2"] = np.mean(per_prompt)
    for name in ("hpdv3", "pairs"):
        found[name] = np.mean([scores[0] > scores[1] for _, scores in scored(name)])
    for column, name in (("pickscore_unique", "pickapic_test_unique"), ("pickscore_test", "pickapic_test")):
        untied = [(ranks, scores) for ranks, scores in scored(name) if ranks[0] != ranks[1]]
        found[column] = np.mean(
            [(ranks[0] < ranks[1]) == (scores[0] > scores[1]) for ranks, scores in untied]
        )

    def official(name, threshold):
        total = []
        for ranks, scores in scored(name):
            p = torch.tensor(scores, dtype=torch.float64).softmax(0)
            guess = "tie" if abs(p[0] - p[1]) <= threshold else ("first" if p[0] > p[1] else "second")
            label = "tie" if ranks[0] == ranks[1] else ("first" if ranks[0] < ranks[1] else "second")
            total.append(1 if guess == label else 0.5 * ("tie" in (guess, label)))
        return sum(total) / len(total)

    tried = [official("pickapic_validation_unique", k / 10) for k in range(11)]
    threshold = tried.index(max(tried)) / 10
    found["pickscore_official"] = official("pickapic_test_unique", threshold)
    return found, threshold


def test_a_baseline_through_the_command(data, clip, tmp_path, capsys):
    config = write_config(tmp_path, data)
    assert main(["--config", config, "--baseline", f"Tiny=pickscore:{clip}", "--paper"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert (out / "table.md").read_text() == printed.rstrip("\n") + "\n"
    tree = json.loads((out / "evaluation.json").read_text())
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)

    def score(prompt, picture):
        inputs = processor(
            text=[prompt], images=picture, padding=True, truncation=True, max_length=16, return_tensors="pt"
        )
        with torch.no_grad():
            return model(**inputs).logits_per_image.item()

    expected, threshold = accuracies(config, score)
    found = {r["column"]: r for r in tree["results"] if not r.get("prompts_swapped")}
    assert {column: result["accuracy"] for column, result in found.items()} == pytest.approx(expected)
    assert found["pickscore_official"]["threshold"] == threshold
    row = next(line for line in printed.splitlines() if line.startswith("| Tiny "))
    for column, result in found.items():
        assert 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1
        interval = f"{100 * result['accuracy']:.1f} [{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
        assert interval in row, column
    assert "| DRM (published)" in printed
    assert " 73.4 (*) " in printed
    used = {name: counts["used"] for name, counts in tree["test_sets"].items()}
    assert used == ROWS
    with Image.open(out / "accuracy.png") as figure:
        assert figure.format == "PNG"
        assert len(figure.convert("L").getcolors()) > 10


def test_what_is_owed_to_the_prompt(data, tmp_path, capsys, monkeypatch):
    """A scorer that looks at pictures alone loses nothing by swapped prompts; one whose choice hangs on the
    prompt is right with its own only.
    """
    path = data / "hpdv3" / "test.json"
    config = write_config(tmp_path, data, benchmarks={"hpdv3": {"path": str(path)}})
    rankings = rankings_of(config, "hpdv3")
    preferred = {r.prompt: r.pictures[0].open().tobytes() for r in rankings}
    assert len(preferred) == len(rankings) > 1

    def by_picture(prompt, pictures):
        return [int(hashlib.sha256(picture.tobytes()).hexdigest()[:8], 16) for picture in pictures]

    def by_prompt(prompt, pictures):
        return [float(picture.tobytes() == preferred[prompt]) for picture in pictures]

    scorers = {"some:picture": by_picture, "some:prompt": by_prompt}
    monkeypatch.setattr(evaluate.baselines, "load_baseline", lambda spec, device: scorers[spec])
    given = ["--baseline", "Picture=some:picture", "--baseline", "Prompt=some:prompt"]
    assert main(["--config", config, *given]) == 0
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    found = {(r["scorer"], r.get("prompts_swapped", False)): r["accuracy"] for r in results}
    assert found["Picture", True] == found["Picture", False]
    assert (found["Prompt", False], found["Prompt", True]) == (1.0, 0.0)
    assert "| Prompt, prompts swapped " in capsys.readouterr().out


def test_swapped_prompts_are_of_similar_length():
    picture = Picture(path="a.png", key="a")
    texts = ["a cat", "a dog in a long sentence of words", "a fox", "a cat and a dog in a house of glass"]
    ones = [Ranking(prompt=t, pictures=(picture, picture), ranks=(0, 1), source="s", row="r") for t in texts]
    swapped = with_other_prompts([*ones, ones[0]])
    assert [r.prompt for r in swapped] == ["a fox", texts[3], texts[1], "a cat", "a fox"]
    assert [(r.pictures, r.ranks) for r in swapped] == [(r.pictures, r.ranks) for r in [*ones, ones[0]]]
    assert with_other_prompts([ones[0], ones[0]]) == []


def test_what_is_scored_is_kept_and_gone_on_from(data, clip, tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, data, benchmarks={"hpdv2": {"path": str(data / "hpdv2" / "test.json")}})
    arguments = ["--config", config, "--baseline", f"Tiny=clip:{clip}"]
    assert main(arguments) == 0
    whole = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    (book,) = (tmp_path / "out" / "scores").glob("Tiny-*.jsonl")
    lines = book.read_bytes().splitlines(keepends=True)
    assert len(lines) == 27 + 27  # and once under another prompt
    # As if killed in the middle of a line of the third batch.
    book.write_bytes(b"".join(lines[:12]) + lines[12][:20])
    calls = []
    original = evaluate.baselines.load_baseline

    def counting(spec, device):
        function = original(spec, device)

        def score(prompt, pictures):
            calls.append(len(pictures))
            return function(prompt, pictures)

        return score

    monkeypatch.setattr(evaluate.baselines, "load_baseline", counting)
    assert main(arguments) == 0
    assert sum(calls) == 54 - 10  # two whole batches of five were there
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"] == whole
    scored = {tuple(json.loads(line)) for line in book.read_bytes().splitlines()}
    assert scored == {tuple(json.loads(line)) for line in lines}
    calls.clear()
    assert main(arguments) == 0
    assert calls == []


def test_stopped_by_hand_and_gone_on(data, tmp_path, capsys, monkeypatch):
    calls = []

    def baseline(prompt, pictures):
        calls.append(len(pictures))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [hash((prompt, picture.tobytes())) % 1000 for picture in pictures]

    monkeypatch.setattr(evaluate.baselines, "load_baseline", lambda spec, device: baseline)
    config = write_config(tmp_path, data, benchmarks={"hpdv2": {"path": str(data / "hpdv2" / "test.json")}})
    arguments = ["--config", config, "--baseline", "Own=some_module:score"]
    assert main(arguments) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert main(arguments) == 0
    assert sum(calls) - calls[1] == 54  # nothing was scored twice but the batch it was stopped in


def test_thresholds_are_chosen_on_raw_scores(data, encoders, tmp_path):
    """How a score is shown, such as DiNa-LRM's tenth, must not move PickScore's softmax."""
    drm = tiny_drm(joint_attention_dim=T5_WIDTH, pooled_projection_dim=sum(CLIP_WIDTHS))
    for name, facts in (("plain", {}), ("shown", {"shown": {"scale": 1e-3, "offset": 1.0}})):
        save_drm(drm, tmp_path / f"{name}.safetensors", metadata={"text_length": 77, **facts})
    sets = {f"pickapic_{split}_unique": {"path": str(data / "pickapic")} for split in ("test", "validation")}
    config = write_config(tmp_path, data, encoders=str(encoders), resolution=64, benchmarks=sets)
    models = [str(tmp_path / f"{name}.safetensors") for name in ("plain", "shown")]
    assert main(["--config", config, "--models", *models]) == 0
    books = [
        {tuple(row[:2]): row[2] for row in map(json.loads, book.read_text().splitlines())}
        for book in sorted((tmp_path / "out" / "scores").glob("*.jsonl"))
    ]
    assert sum(sigma > 0 for _, sigma in books[0]) == 3 * 8
    assert books[0] == books[1]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    build_pipeline(folder)
    return folder


def test_reward_models_through_the_command(data, encoders, clip, tmp_path, capsys):
    models = [write_drm(tmp_path / "drm" / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    config = write_config(tmp_path, data, encoders=str(encoders), resolution=64)
    arguments = [
        "--config",
        config,
        "--models",
        *models,
        "--baseline",
        f"Tiny=clip:{clip}",
        "--sigma",
        "0",
        "0.6",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    names = [line.split("|")[1:3] for line in printed.splitlines()[2:7]]
    assert [[name.strip(), sigma.strip()] for name, sigma in names] == [
        ["a", "0"],
        ["a", "0.6"],
        ["b", "0"],
        ["b", "0.6"],
        ["Tiny", ""],
    ]
    sd3 = SD3Encoders.from_folder(encoders)
    prompt_of = functools.cache(lambda prompt: sd3.encode_prompts([prompt], 5))
    latents = {}
    for path in models:
        drm = load_drm(path)
        for sigma in (0.0, 0.6):

            def score(prompt, picture, drm=drm, sigma=sigma):
                key = picture.tobytes()
                if key not in latents:
                    latents[key] = sd3.encode_pictures([picture], 64)
                noisy = (1 - sigma) * latents[key] + sigma * prompt_noise(prompt, (16, 8, 8), seed=0)
                return drm.score(noisy, sigma, *prompt_of(prompt)).item()

            expected, _ = accuracies(config, score)
            name = path[-len("a.safetensors")]
            shown = [r for r in tree["results"] if not r.get("prompts_swapped")]
            own = [r for r in shown if (r["scorer"], r["sigma"]) == (name, sigma)]
            assert {r["column"]: r["accuracy"] for r in own} == pytest.approx(expected)
    facts = tree["scorers"][0]
    assert facts["sha256"] == hashlib.sha256(Path(models[0]).read_bytes()).hexdigest()
    assert (facts["text_length"], facts["t5_length"]) == (82, 5)
    hpdv3 = data / "hpdv3" / "test.json"
    assert tree["test_sets"]["hpdv3"]["files_sha256"] == {
        str(hpdv3): hashlib.sha256(hpdv3.read_bytes()).hexdigest()
    }
    assert tree["versions"]["torch"] == torch.__version__


def test_a_broken_picture_costs_its_row():
    """A row that is a whole ranking goes; of a ranking with a row for each picture, only the broken ones."""
    pictures = tuple(Picture(f"{letter}.png", letter) for letter in "abc")

    def kept(broken, rows):
        ranking = Ranking(
            prompt="p", pictures=pictures, ranks=(1.0, 2.0, 3.0), source="imagereward", row="f:0", rows=rows
        )
        report = Report()
        report.read["imagereward"] = report.used["imagereward"] = rows
        reason = dict.fromkeys(broken, "broken picture: x").get
        (left,) = drop_unscored({"s": [ranking]}, {"s": report}, lambda _, p: reason(p.key)).values()
        tree = report.as_dict()["sources"]["imagereward"]
        numbers = tree["used"], sum(tree["bad"].values()), sum(tree["left_out"].values())
        assert sum(numbers) == rows
        return ["".join(p.key for p in one.pictures) for one in left], [one.ranks for one in left], numbers

    assert kept("", 1) == (["abc"], [(1.0, 2.0, 3.0)], (1, 0, 0))
    assert kept("ab", 1) == ([], [], (0, 1, 0))
    assert kept("b", 3) == (["ac"], [(1.0, 3.0)], (2, 1, 0))
    assert kept("bc", 3) == ([], [], (0, 2, 1))
    assert kept("abc", 3) == ([], [], (0, 3, 0))


def test_noise_is_shared_by_the_pictures_of_a_prompt():
    one = prompt_noise("a cat", (16, 8, 8), seed=0)
    torch.testing.assert_close(one, prompt_noise("a cat", (16, 8, 8), seed=0), rtol=0, atol=0)
    assert (one - prompt_noise("a dog", (16, 8, 8), seed=0)).abs().mean() > 0.5
    assert (one - prompt_noise("a cat", (16, 8, 8), seed=1)).abs().mean() > 0.5
    assert one.std() == pytest.approx(1, abs=0.1)


def test_text_length_of_a_header():
    assert [t5_length(length) for length in (77, 154, 333, 20, None)] == [None, 77, 256, None, 256]
