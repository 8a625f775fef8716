"""Step-GRPO LoRA Trainer with the methods that learn from finished pictures: NFT and AWM, and their step-
kind, whose pictures the DRM scores noised.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from drm.grpo import FORWARD_METHODS, METHODS
from drm.lora import load_lora
from tests.comfyui.families import load_family
from tests.comfyui.test_any_family import head_for
from tests.comfyui.test_trainer import After, clean, output, wrapped  # noqa: F401
from tests.comfyui.test_trainer_families import seen  # noqa: F401
from tests.comfyui.test_trainer_families import train as train_family
from tests.comfyui.training_graphs import SMALL, files, train


def test_the_node_offers_every_method(pack):
    assert list(METHODS) == pack.module("nodes.grpo.inputs").METHODS


def test_a_picture_has_no_more_noise_levels_than_there_are_sigmas(pack):
    training = pack.module("nodes.grpo.inputs").Training
    settings = {key: value for key, value in SMALL.items() if key != "lora_name"} | {"prompts": ("one",)}
    found = [training(**settings | {"steps": steps}).forward.noise_levels for steps in (2, 4, 10)]
    assert found == [1, 3, 6]


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_it_learns_and_saves(inside, output, clean, method):  # noqa: F811
    _, lora, loss, steps, image, report = train(inside, method=method, vae=inside.vae)
    (path,) = files(output)
    tensors, facts = load_lora(path)
    assert all(torch.equal(tensors[name], lora[name]) for name in lora)
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert (facts["method"], facts["iteration"], steps) == (method, 2, 2)
    assert facts["rewards"] == loss["loss"]
    assert image.std() > 0.05
    for line in (f"{method}, 2 iterations", "KL", "exactly 1", "memory: about", "spread among siblings"):
        assert line in report
    assert "std of the stochastic path" not in report


@pytest.mark.parametrize("method", ["awm", "step-nft"])
def test_going_on_equals_never_stopped(inside, output, method):  # noqa: F811
    settings = {"method": method, "iterations": 4, "preview_every": 2, "ema_decay": 0.5}
    whole = train(inside, name="whole", **settings)
    train(inside, name="parts", **settings | {"iterations": 2})
    parts = train(inside, name="parts", **settings)
    assert "went on after iteration 2" in parts[5]
    assert parts[2]["loss"] == whole[2]["loss"]
    assert all(torch.equal(parts[1][name], whole[1][name]) for name in whole[1])
    states = [load_file(path) for path in files(output, ".resume")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["old.1"], states[0]["parameter.1"])  # it trails


def test_training_raises_the_held_out_score(inside, output):  # noqa: F811
    settings = {"prompts": "red heart", "iterations": 8, "prompts_per_iteration": 2, "preview_every": 8}
    train(inside, method="step-nft", learning_rate=0.02, kl_weight=0.0, num_branches=4, **settings)
    (path,) = files(output)
    watch = load_lora(path)[1]["watch"]
    assert watch["looks"][-1]["held_out"] > watch["start"]


def test_cancel_keeps_what_was_learned(inside, output, clean):  # noqa: F811
    import comfy.model_management as mm

    model = wrapped(inside, After(300, mm.InterruptProcessingException()))
    with pytest.raises(mm.InterruptProcessingException):
        train(inside, model=model, method="step-nft", iterations=50)
    done = load_lora(files(output)[0])[1]["iteration"]
    assert 0 < done < 50
    assert f"went on after iteration {done}" in train(inside, method="step-nft", iterations=done + 1)[5]


def test_out_of_memory_takes_smaller_parts(inside, output, clean):  # noqa: F811
    def small_only(call, x):
        if len(x) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("too many at once")
        return call()

    settings = {"method": "step-awm", "iterations": 1}
    report = train(inside, model=wrapped(inside, small_only), name="small", **settings)[5]
    assert "1 pictures at once" in report
    whole, parts = (
        train(inside, name="whole", **settings)[1],
        load_file(files(output, "small_*.safetensors")[0]),
    )
    difference = sum((parts[name] - whole[name]).square().sum() for name in whole)
    assert difference / sum(tensor.square().sum() for tensor in whole.values()) < 1e-4


def test_the_forecast_has_a_second_set_of_matrices(pack, monkeypatch):
    preflight, inputs = pack.module("nodes.grpo.preflight"), pack.module("nodes.grpo.inputs")
    monkeypatch.setattr(preflight, "_graph", lambda *_: 0)
    monkeypatch.setattr(preflight.mm, "get_free_memory", lambda *_: 1 << 40)
    inner = SimpleNamespace(memory_required=lambda shape: 0)
    policy = SimpleNamespace(device="cpu", guider=SimpleNamespace(inner_model=inner))
    found = {}
    for method in ("grpo", "awm"):
        settings = {**SMALL, "prompts": ("one",), "method": method}
        settings.pop("lora_name")
        arguments = (policy, 0, torch.zeros(3, 16, 4, 4), 77, 1 << 30, inputs.Training(**settings))
        found[method] = preflight.check_memory(*arguments)
    assert "about 12.00 GB" in found["grpo"]
    assert "about 16.00 GB" in found["awm"]


def test_noise_level_is_of_no_account(inside, output):  # noqa: F811
    """1.9 is refused where there is a stochastic path."""
    report = train(inside, method="nft", noise_level=1.9, iterations=1)[5]
    assert "nft, 1 iteration," in report


def test_a_model_that_differs_with_gradients_is_refused(inside, output, clean):  # noqa: F811
    model = inside.model.clone()

    def wrapper(apply, args):
        drift = 1.001 if torch.is_grad_enabled() else 1.0
        return drift * apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match="the same noised sample matched twice differs"):
        train(inside, model=model, method="awm")
    assert files(output) == []


def test_rewards_that_do_not_differ_are_refused(inside, output, clean, monkeypatch):  # noqa: F811
    score = inside.drm.model.score_prepared
    monkeypatch.setattr(inside.drm.model, "score_prepared", lambda *a: 0 * score(*a) + 3.0, raising=False)
    with pytest.raises(ValueError, match=r"siblings differ by 0 \(std\).*; raise num_branches"):
        train(inside, method="step-awm")


def test_a_head_on_the_model_s_own_tokens_reads_it_as_it_came(pack, output, seen):  # noqa: F811
    """While what is learned, and the old policy, change under it."""
    tiny = load_family("flux")
    steps = train_family(pack, tiny, head_for(pack, tiny), method="step-nft")[3]
    assert steps == 2
    (score, velocity_before), (score_after, velocity_after) = seen
    assert score == score_after
    assert not torch.equal(velocity_before, velocity_after)


def test_the_old_policy_stands_in_and_leaves_nothing(pack):
    learner = pack.module("nodes.grpo.learner").Learner
    parameter = torch.nn.Parameter(torch.ones(2))
    holder = SimpleNamespace(
        adapters=SimpleNamespace(parameters=lambda: iter([parameter])),
        state=SimpleNamespace(old=[torch.zeros(2)]),
    )
    with contextlib.suppress(OSError), learner._as_old(holder):
        assert parameter.tolist() == [0.0, 0.0]
        raise OSError
    assert parameter.tolist() == [1.0, 1.0]
