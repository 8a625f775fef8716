"""A reward that is cheated rises while a second DRM's opinion falls: the node stops and keeps the best."""

import pytest
import torch

from drm import load_drm, save_drm
from drm.lora import load_lora
from tests.comfyui.test_trainer import clean, output  # noqa: F401
from tests.comfyui.training_graphs import files, train

SETTINGS = {
    "prompts": "red heart",
    "learning_rate": 0.03,
    "kl_weight": 0.0,
    "preview_every": 2,
    "iterations": 60,
    "prompts_per_iteration": 1,
}


@pytest.fixture
def opponent(inside, family, tmp_path):
    """A DRM whose every score is the reward's with the other sign: what the reward gains, it loses."""
    import folder_paths

    drm = load_drm(family.drm)
    with torch.no_grad():
        drm.head.out.weight.neg_()
        drm.head.out.bias.neg_()
    save_drm(drm, tmp_path / "opponent.safetensors")
    folder_paths.add_model_folder_path("drm", str(tmp_path))
    return inside.pack.module("nodes.adapters").load_drm_patcher("drm", "opponent.safetensors", "float32")


def test_it_stops_and_keeps_the_best(inside, output, clean, opponent, caplog):  # noqa: F811
    watched = {**SETTINGS, "held_out_drm": opponent}
    _, lora, _, steps, _, report = train(inside, name="cheated", **watched)
    (path,) = files(output)
    tensors, facts = load_lora(path)
    looks = facts["watch"]["looks"]
    best = max(looks, key=lambda look: look["held_out"])
    after = [look for look in looks if look["iteration"] > best["iteration"]]
    assert steps == looks[-1]["iteration"] < 60
    assert len(after) >= 3
    assert all(look["reward"] > best["reward"] for look in after[-3:])
    assert after[-1]["held_out"] < after[-3]["held_out"] < best["held_out"]
    assert "WARNING: stopped early: the reward rose while the held-out score fell" in report
    assert f"after iteration {best['iteration']}, which is the one kept" in report
    assert "the reward rises and the held-out score falls; stopped, best kept" in caplog.text

    # What is kept is what a run has that ends there.
    short = train(inside, name="short", **watched | {"iterations": best["iteration"]})[1]
    assert all(torch.equal(lora[name], short[name]) for name in short)
    assert all(torch.equal(tensors[name], short[name]) for name in short)

    # Queued again it says the same and learns no more.
    again = train(inside, name="cheated", **watched)
    assert again[3] == steps
    assert all(torch.equal(again[1][name], lora[name]) for name in lora)


def test_without_a_second_opinion_it_goes_on(inside, output):  # noqa: F811
    """The same training, watched by the DRM it pleases, sees nothing wrong."""
    report = train(inside, name="pleased", **SETTINGS | {"iterations": 16, "learning_rate": 0.01})[5]
    assert "16 iterations" in report
    assert "WARNING: stopped" not in report
