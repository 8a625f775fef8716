"""DRM Score Image with random CLIP models in a folder: in this process, and once through the real server."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.comfyui.graphs import node
from tests.tiny_scorers import own_similarity, write_tiny_clip, write_tiny_image_reward

PROMPT = "a red heart"


@pytest.fixture(scope="module")
def scorers(pack, tmp_path_factory) -> Path:
    """A folder of models/drm_scorers with one scorer, `tiny`."""
    import folder_paths

    folder = tmp_path_factory.mktemp("drm_scorers")
    folder_paths.add_model_folder_path("drm_scorers", str(folder), is_default=True)
    write_tiny_clip(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def module(pack):
    return pack.module("nodes.score_image")


@pytest.fixture
def score(module, scorers):
    """(scores, ranks, best, sorted, batch_index) of DRM Score Image."""
    defaults = {"scorer": "tiny", "prompt": PROMPT, "keep": 1, "threshold": -1000.0}

    def run(images, **settings):
        with torch.inference_mode():
            return module.DRMScoreImage.execute(images=images, **{**defaults, **settings}).result

    return run


def images(count=4, height=40, width=56, channels=3, seed=0):
    """Smooth random pictures, on the 8-bit grid as they are after decoding and saving."""
    small = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (255 * large.movedim(1, -1)).round() / 255


def as_pil(batch):
    return [Image.fromarray((255 * one[..., :3]).round().byte().numpy()) for one in batch]


def test_scores_are_transformers_own(score, scorers):
    batch = images()
    scores = torch.tensor(score(batch)[0])
    torch.testing.assert_close(scores, own_similarity(scorers / "tiny", PROMPT, as_pil(batch)))
    assert scores.std() > 1e-3


def test_image_reward(score, scorers):
    from drm.picture_scorers import load_picture_scorer

    folder = write_tiny_image_reward(scorers / "ImageReward")
    batch = images()
    scores = score(batch, scorer="ImageReward")[0]
    wanted = load_picture_scorer(folder)(PROMPT, as_pil(batch))
    torch.testing.assert_close(torch.tensor(scores), wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 1e-2
    shutil.rmtree(folder)


def test_ranks_best_sorted_and_index(score):
    batch = images(5, seed=1)
    scores, ranks, best, ordered, index, _ = score(batch, keep=3)
    order = sorted(range(5), key=lambda i: -scores[i])
    assert index == order[:3]
    assert torch.equal(best, batch[order[:3]])
    assert torch.equal(ordered, batch[order])
    wanted = [f"{rank}. picture {i + 1}: {scores[i]:+.2f}" for rank, i in enumerate(order, start=1)]
    assert ranks.splitlines() == wanted


def test_more_to_keep_than_there_are(score):
    _, ranks, best, ordered, index, _ = score(images(2), keep=9)
    assert torch.equal(best, ordered)
    assert len(index) == len(ranks.splitlines()) == 2


def test_one_picture(score):
    batch = images(1)
    scores, ranks, best, ordered, index, _ = score(batch)
    assert ranks == f"1. picture 1: {scores[0]:+.2f}"
    assert index == [0]
    assert torch.equal(best, batch)
    assert torch.equal(ordered, batch)


def test_equal_scores_keep_the_order_of_the_batch(score, module, monkeypatch):
    monkeypatch.setattr(module, "score_images", lambda *_: torch.tensor([1.0, 2.0, 1.0, 2.0]))
    _, ranks, _, _, index, _ = score(images(4), keep=4)
    assert index == [1, 3, 0, 2]
    assert [line.split(":")[0] for line in ranks.splitlines()] == [
        "1. picture 2",
        "2. picture 4",
        "3. picture 1",
        "4. picture 3",
    ]


def test_threshold_leaves_out_what_scores_less(score, module, monkeypatch):
    monkeypatch.setattr(module, "score_images", lambda *_: torch.tensor([1.0, 2.5, 2.0, 1.5]))
    batch = images(4)
    scores, ranks, best, ordered, index, _ = score(batch, keep=4, threshold=2.0)
    assert index == [1, 2]  # a score equal to the threshold reaches it
    assert torch.equal(best, batch[[1, 2]])
    assert (len(scores), len(ordered)) == (4, 4)
    assert ranks.splitlines()[-1] == "2 of 4 reach the threshold 2"
    assert score(batch, keep=1, threshold=2.0)[4] == [1]


def test_none_reaches_the_threshold(score):
    from comfy_execution.graph_utils import ExecutionBlocker

    scores, ranks, best, ordered, index, _ = score(images(3), threshold=999.0)
    assert isinstance(best, ExecutionBlocker)
    assert isinstance(index, ExecutionBlocker)
    assert (len(scores), len(ordered)) == (3, 3)
    assert ranks.splitlines()[-1] == "0 of 3 reach the threshold 999"


def test_a_score_does_not_depend_on_the_batch(score):
    batch = images(20, seed=2)
    together = score(batch)[0]
    alone = [score(batch[i : i + 1])[0][0] for i in (0, 7, 19)]
    assert alone == pytest.approx([together[i] for i in (0, 7, 19)], rel=1e-5)


def test_alpha_is_left_out_of_the_score_and_stays_in_the_picture(score):
    batch = images(3, channels=4)
    scores, _, best, _, index, _ = score(batch)
    assert scores == pytest.approx(score(batch[..., :3])[0], rel=1e-6)
    assert torch.equal(best, batch[index])


def test_out_of_memory_halves_the_chunk(score, module, monkeypatch):
    import comfy.model_management as mm

    batch = images(7, seed=3)
    wanted = score(batch)[0]
    clip, sizes = module.load_scorer("tiny").model.clip, []
    own = clip.forward

    def small_memory(*, pixel_values, **rest):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 3:
            raise mm.OOM_EXCEPTION("no memory for that many")
        return own(pixel_values=pixel_values, **rest)

    monkeypatch.setattr(clip, "forward", small_memory)
    assert score(batch)[0] == pytest.approx(wanted, rel=1e-5)
    assert sizes == [7, 4, 2, 2, 2, 1]


def test_cancel_is_seen_between_chunks(score, monkeypatch):
    import comfy.model_management as mm

    calls = []

    def cancel():
        calls.append(None)
        if len(calls) == 2:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(mm.InterruptProcessingException):
        score(images(40, 8, 8))
    assert len(calls) == 2


def test_the_scorer_is_loaded_whole_and_kept_until_its_files_change(score, module, scorers, monkeypatch):
    import comfy.model_management as mm

    loads, own = [], mm.load_models_gpu

    def load(models, *rest, **settings):
        loads.append((models, settings))
        own(models, *rest, **settings)

    monkeypatch.setattr(mm, "load_models_gpu", load)
    write_tiny_clip(scorers / "other", seed=1)
    first = score(images(), scorer="other")[0]
    before = module.DRMScoreImage.fingerprint_inputs(scorer="other", prompt=PROMPT)
    assert score(images(), scorer="other")[0] == first
    (one,), _ = loads[0]
    assert loads[1][0][0] is one
    assert type(one).__name__ == "WholePatcher"
    assert any(loaded.model is one for loaded in mm.current_loaded_models)

    write_tiny_clip(scorers / "other", seed=2)
    assert module.DRMScoreImage.fingerprint_inputs(scorer="other", prompt=PROMPT) != before
    assert score(images(), scorer="other")[0] != first
    shutil.rmtree(scorers / "other")
    assert module.DRMScoreImage.fingerprint_inputs(scorer="other", prompt=PROMPT) == "missing"


NAN = images(2)
NAN[1, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"images": NAN}, "the IMAGE holds NaN or infinity: look at the node that made it"),
        ({"images": images(0)}, r"the IMAGE is empty, its shape is \(0, 40, 56, 3\): give it at least one"),
        ({"images": images(channels=1)}, r"the IMAGE has shape \(4, 40, 56, 1\): wanted .*convert it to RGB"),
        ({"images": images()[0]}, r"the IMAGE has shape \(40, 56, 3\): wanted \(batch, height, width"),
        ({"prompt": ""}, "the prompt is empty: write what the pictures were to show"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"keep": 0}, "keep is 0: give a number from 1 to 4096"),
        ({"threshold": float("nan")}, r"threshold is nan: give a score from -1000 \(keeps all\) to 1000"),
        ({"scorer": "nowhere"}, r"no folder 'nowhere' in models/drm_scorers: put .*PickScore.*found: .*tiny"),
        ({"scorer": "../drm"}, r"no folder '\.\./drm' in models/drm_scorers"),
    ],
)
def test_bad_input_is_a_sentence(score, settings, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        score(**{"images": images(2), **settings})


@pytest.fixture
def bad_folder(scorers):
    folder = shutil.copytree(scorers / "tiny", scorers / "bad")
    yield folder
    shutil.rmtree(folder)


def test_bad_folders_are_a_sentence(score, bad_folder):
    (bad_folder / "model.safetensors").rename(bad_folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"DRM Score Image: .*bad holds pytorch_model\.bin and no \.safetens"
    ):
        score(images(), scorer="bad")
    (bad_folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"DRM Score Image: .*bad holds no tokenizer\.json"):
        score(images(), scorer="bad")
    for path in bad_folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"DRM Score Image: .*bad holds no config\.json"):
        score(images(), scorer="bad")


def test_damaged_weights_are_a_sentence(score, bad_folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(bad_folder / "model.safetensors")
    weights["visual_projection.weight"][0] = float("nan")
    save_file(weights, bad_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the scorer 'bad' returned nan for picture 1: its weights may be"):
        score(images(), scorer="bad")


def test_folders_are_offered_by_name(pack, scorers, tmp_path):
    import folder_paths

    folders = pack.module("nodes.folders")
    (scorers / ".cache").mkdir(exist_ok=True)
    (scorers / "notes.txt").write_text("no folder")
    more = tmp_path / "more"
    (more / "tiny").mkdir(parents=True)
    (more / "second").mkdir()
    folder_paths.add_model_folder_path("drm_scorers", str(more))
    folder_paths.add_model_folder_path("drm_scorers", str(tmp_path / "not there"))
    assert list(folders.scorer_folders()) == ["second", "tiny"]
    assert folders.scorer_folder("tiny") == scorers / "tiny"


def picture_graph(name: str, **changes):
    """Three uploaded pictures as a batch 4, DRM Score Image 5, Save Image 6 of the best."""
    inputs = {"scorer": "tiny", "images": ["4", 0], "prompt": PROMPT, "keep": 2, "threshold": -1000.0}
    return {
        "1": node("LoadImage", image=name),
        "2": node("ImageInvert", image=["1", 0]),
        "3": node("ImageBatch", image1=["1", 0], image2=["2", 0]),
        "4": node("ImageBatch", image1=["3", 0], image2=["1", 0]),
        "5": node("DRMScoreImage", **inputs | changes),
        "6": node("SaveImage", images=["5", 2], filename_prefix="score_image"),
    }


def test_through_the_server(server, base_dir, tmp_path):
    options = server.object_info("DRMScoreImage")["input"]["required"]["scorer"][1]["options"]
    assert options == ["(none in models/drm_scorers yet)"]
    missing = server.run(
        picture_graph("", scorer=options[0])
        | {"1": node("EmptyImage", width=32, height=32, batch_size=1, color=0)}
    )
    assert "put a PickScore, ImageReward or CLIP model there" in missing.error

    folder = write_tiny_clip(base_dir / "models" / "drm_scorers" / "tiny")
    assert server.object_info("DRMScoreImage")["input"]["required"]["scorer"][1]["options"] == ["tiny"]
    (one,) = as_pil(images(1))
    one.save(tmp_path / "one.png")
    name = server.upload_image(tmp_path / "one.png")
    result = server.run(picture_graph(name))
    assert result.status == "success", result.error
    inverted = Image.eval(one, lambda value: 255 - value)
    wanted = own_similarity(folder, PROMPT, [one, inverted, one]).tolist()
    order = sorted(range(3), key=lambda i: -wanted[i])
    lines = result.outputs["5"]["text"][0].splitlines()
    assert [float(line.split(": ")[1]) for line in lines] == pytest.approx(
        [wanted[i] for i in order], abs=0.006
    )
    saved = [Image.open(io.BytesIO(server.view(picture))).convert("RGB") for picture in result.images("6")]
    for picture, i in zip(saved, order[:2], strict=True):  # Save Image cuts where the scorer rounds
        off = np.asarray(picture, int) - np.asarray([one, inverted, one][i], int)
        assert abs(off).max() <= 1

    none = server.run(picture_graph(name, threshold=999.0))
    assert none.status == "success", none.error
    assert none.outputs["5"]["text"][0].endswith("0 of 3 reach the threshold 999")
    assert "6" not in none.outputs
