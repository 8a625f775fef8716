"""Step-GRPO LoRA Trainer in this process: it learns, goes on after a stop, and leaves the MODEL as it was."""

import contextlib
import re
import resource
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from drm.lora import load_lora
from tests.comfyui.inside import write_lora
from tests.comfyui.training_graphs import files, train


@pytest.fixture
def output(inside, tmp_path):
    """ComfyUI's output and temp folder in this process."""
    import folder_paths

    before = folder_paths.get_output_directory(), folder_paths.get_temp_directory()
    folder_paths.set_output_directory(str(tmp_path))
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    yield tmp_path
    folder_paths.set_output_directory(before[0])
    folder_paths.set_temp_directory(before[1])


@pytest.fixture
def clean(inside):
    """Fails the test when the MODEL draws or holds anything else after it than before it."""
    network = inside.model.model.diffusion_model
    before, hooks, learning = inside.ksampler(), count_hooks(inside), learning_names(network)
    yield
    assert torch.equal(inside.ksampler(), before)
    assert count_hooks(inside) == hooks
    assert learning_names(network) <= learning
    assert all(parameter.grad is None for parameter in network.parameters())
    assert "forward" not in {name for module in network.modules() for name in vars(module)}
    assert "sampler_calc_cond_batch_function" not in inside.model.model_options


def learning_names(network):
    """Weights that would be learned, if they are of the kind that can."""
    return {name for name, weight in network.named_parameters() if weight.requires_grad}


def count_hooks(inside):
    return sum(len(module._forward_hooks) for module in inside.model.model.modules())


def wrapped(inside, wrapper):
    """The MODEL with a wrapper around its network, as many packs patch it: wrapper(call) -> output."""
    model = inside.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: wrapper(
            lambda: apply(args["input"], args["timestep"], **args["c"]), args["input"]
        )
    )
    return model


class After:
    """Calls through, and from the nth call on raises."""

    def __init__(self, calls, error):
        self.left, self.error = calls, error

    def __call__(self, call, x):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return call()


@pytest.mark.parametrize("method", ["step-grpo", "grpo"])
def test_it_learns_and_saves(inside, output, clean, method):
    _, lora, loss, steps, image, report = train(inside, method=method, vae=inside.vae)
    (path,) = files(output)
    tensors, facts = load_lora(path)
    assert sorted(tensors) == sorted(lora)
    assert all(torch.equal(tensors[name], lora[name]) for name in lora)
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert (facts["method"], facts["seed"], facts["iteration"], steps) == (method, 0, 2, 2)
    assert facts["rewards"] == loss["loss"]
    assert len(facts["hashes"]["base"]) == len(facts["hashes"]["drm"]) == 64
    assert facts["settings"]["prompts"][0] == "red heart"
    assert (image.shape[0], image.shape[3]) == (1, 3)
    assert image.std() > 0.05
    for line in ("KL", "exactly 1", "std of the stochastic path", "memory: about", "spread among siblings"):
        assert line in report
    assert str(path) in report


def test_training_raises_the_reward(inside, output):
    settings = {"prompts": "red heart", "iterations": 12, "prompts_per_iteration": 2, "preview_every": 12}
    _, _, loss, _, _, report = train(inside, learning_rate=0.03, kl_weight=0.0, **settings)
    before, after = re.search(r"held-out score .* ([+-][\d.]+) before, ([+-][\d.]+) after", report).groups()
    assert float(after) > float(before)
    assert sum(loss["loss"][-4:]) > sum(loss["loss"][:4])
    assert "KL" not in report  # without a weight it is not measured


def test_seed_decides_everything(inside, output):
    first = train(inside, name="a")[1]
    again = train(inside, name="b")[1]
    other = train(inside, name="c", seed=1)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["step-grpo", "grpo"])
def test_going_on_equals_never_stopped(inside, output, method):
    settings = {"method": method, "iterations": 4, "preview_every": 2, "ema_decay": 0.5}
    whole = train(inside, name="whole", **settings)
    train(inside, name="parts", **settings | {"iterations": 2})
    parts = train(inside, name="parts", **settings)
    assert "went on after iteration 2" in parts[5]
    assert parts[2]["loss"] == whole[2]["loss"]
    assert all(torch.equal(parts[1][name], whole[1][name]) for name in whole[1])


def test_a_running_mean_of_the_iterations(inside, output):
    one, two = (train(inside, name=f"at{n}", iterations=n, preview_every=2)[1] for n in (1, 2))
    mean = train(inside, name="mean", ema_decay=0.75, preview_every=2)[1]
    for name in mean:
        assert torch.allclose(mean[name], 0.75 * one[name] + 0.25 * two[name], atol=1e-7)
    assert any(not torch.equal(mean[name], two[name]) for name in mean)


def test_cancel_in_a_look_looks_again(inside, output, pack):
    import comfy.model_management as mm

    run, settings = pack.module("nodes.grpo.run").Run, {"iterations": 4}
    whole = train(inside, name="whole", **settings)

    def cancelled(self):
        raise mm.InterruptProcessingException

    for at in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_look", cancelled)
            with pytest.raises(mm.InterruptProcessingException):
                train(inside, name=f"at{at}", **settings | {"preview_every": at})
    parts = [train(inside, name=f"at{at}", **settings) for at in (2, 4)]
    assert all(torch.equal(parts[0][1][name], whole[1][name]) for name in whole[1])
    assert all(part[2] == whole[2] for part in parts)


class Killed(BaseException):
    """What a test raises where a server would be killed."""


def killed_between_its_files(inside, run, at, **settings):
    """A run that is killed with the first file of the save after iteration `at` written, not the second."""
    save = run.save_lora

    def dies(tensors, path, facts):
        if facts["iteration"] == at:
            raise Killed
        save(tensors, path, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_lora", dies)
        patch.setattr(run.Run, "_stopped", lambda *_: None)  # a killed process does nothing more
        with pytest.raises(Killed):
            train(inside, **settings)


@pytest.mark.parametrize("at", [1, 3])
def test_killed_between_its_files_nothing_is_lost(inside, output, pack, at):
    settings = {"iterations": 4, "preview_every": 4, "ema_decay": 0.5}
    whole = train(inside, name="whole", **settings)
    killed_between_its_files(inside, pack.module("nodes.grpo.run"), at, name="parts", **settings)
    behind = [
        load_lora(path)[1]["iteration"] for path in files(output, ".safetensors") if "parts" in path.name
    ]
    assert behind == [at - 1] * (at > 1)
    parts = train(inside, name="parts", **settings)
    assert f"went on after iteration {at} of" in parts[5]
    assert parts[2] == whole[2]
    assert all(torch.equal(parts[1][name], whole[1][name]) for name in whole[1])


def test_the_lora_is_made_good_before_anything_else(inside, output, pack):
    import comfy.model_management as mm

    run = pack.module("nodes.grpo.run")
    killed_between_its_files(inside, run, 3, iterations=4)

    def cancelled(*_):
        raise mm.InterruptProcessingException

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_learn", lambda *_: cancelled())
        patch.setattr(run.Run, "_stopped", lambda *_: None)
        with pytest.raises(mm.InterruptProcessingException):
            train(inside, iterations=4)
    (path,) = files(output)
    assert load_lora(path)[1]["iteration"] == 3


def test_cancel_keeps_what_was_learned(inside, output, clean, caplog):
    import comfy.model_management as mm

    model = wrapped(inside, After(100, mm.InterruptProcessingException()))
    with pytest.raises(mm.InterruptProcessingException):
        train(inside, model=model, iterations=50)
    (path,) = files(output)
    done = load_lora(path)[1]["iteration"]
    assert 0 < done < 50
    assert f"what was learned in {done} iteration{'s' * (done != 1)} is in {path}" in caplog.text
    report = train(inside, iterations=done + 1)[5]
    assert f"went on after iteration {done}" in report


def test_error_keeps_what_was_learned(inside, output, clean):
    with pytest.raises(RuntimeError, match="the lamp fell over\nWhat was learned in") as error:
        train(inside, model=wrapped(inside, After(100, OSError("the lamp fell over"))), iterations=50)
    (path,) = files(output)
    assert str(path) in str(error.value)


def test_nan_reward_stops_and_keeps(inside, output, clean, monkeypatch):
    score, left = inside.drm.model.score_prepared, [60]

    def broken(*arguments):
        left[0] -= 1
        return score(*arguments) * (float("nan") if left[0] < 0 else 1)

    monkeypatch.setattr(inside.drm.model, "score_prepared", broken, raising=False)
    with pytest.raises(RuntimeError, match=r"NaN or infinity.*\nWhat was learned in \d+ iterations?"):
        train(inside, iterations=50)
    assert all(tensor.isfinite().all() for tensor in load_file(files(output)[0]).values())


def test_out_of_memory_takes_smaller_parts(inside, output, clean):
    def small_only(call, x):
        if len(x) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("too many at once")
        return call()

    grpo = {"method": "grpo", "iterations": 1}
    report = train(inside, model=wrapped(inside, small_only), name="small", **grpo)[5]
    assert "out of memory in iteration 1: from there 1 pictures at once" in report
    whole, parts = train(inside, name="whole", **grpo)[1], load_file(files(output)[0])
    difference = sum((parts[name] - whole[name]).square().sum() for name in whole)
    assert difference / sum(tensor.square().sum() for tensor in whole.values()) < 1e-4


def test_recomputed_blocks_give_the_same_lora(inside, output, clean, pack):
    policy = pack.module("nodes.grpo.comfy_policy").ComfyPolicy
    plain = train(inside, name="plain", iterations=1)[1]
    original = policy.__init__

    def sparing(self, *arguments):
        original(self, *arguments)
        self.recompute = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "__init__", sparing)
        patch.setattr(
            policy, "recompute", property(lambda self: True, lambda self, value: None), raising=False
        )
        spared = train(inside, name="spared", iterations=1)[1]
    difference = sum((plain[name] - spared[name]).square().sum() for name in plain)
    assert difference / sum(tensor.square().sum() for tensor in plain.values()) < 1e-4


def test_out_of_memory_at_the_smallest_stops_clearly(inside, output, clean):
    calls = After(100, torch.OutOfMemoryError("nothing left"))
    with pytest.raises(
        RuntimeError, match=r"out of memory in iteration \d+.* choose a smaller width"
    ) as error:
        train(inside, model=wrapped(inside, calls), iterations=50)
    (path,) = files(output)
    assert str(path) in str(error.value)


def test_memory_forecast_stops_before_time_is_spent(inside, output, clean, pack, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 1 << 20)
    with pytest.raises(ValueError, match=r"training needs about .* GB are free: choose a smaller width"):
        train(inside)
    assert files(output) == []


def test_memory_forecast_is_near_the_truth(inside, pack):
    preflight, policies = pack.module("nodes.grpo.preflight"), pack.module("nodes.grpo.comfy_policy")
    lora = pack.module("drm.lora")
    network = inside.model.model.diffusion_model
    found = []

    def measure(policy):
        adapters = lora.Adapters(lora.comfy_targets(network), 4, 8.0, 0)
        noise = torch.randn(1, 16, 24, 16)
        with adapters.attached(network):
            forecast = preflight._graph(policy, 0, noise, inside.positive[0][0].shape[1])
            found.append(forecast / policies.graph_bytes(lambda: policy.velocity(0, noise, 0.9), network))

    policies.within_sampling(
        measure,
        inside.model,
        [inside.drm],
        network,
        prompts={0: inside.positive},
        negative=inside.negative,
        cfg=2.0,
        latents=torch.zeros(1, 16, 24, 16),
        seed=0,
    )
    assert found[0] == pytest.approx(1, abs=0.1)


def test_patches_on_the_model_take_part(inside, output, clean, tmp_path):
    import comfy.sd

    tensors = load_file(write_lora(tmp_path / "style.safetensors", 128))
    patched, _ = comfy.sd.load_lora_for_models(inside.model, None, tensors, 1.0, 0.0)
    before = inside.ksampler(model=patched)
    train(inside, name="plain")
    train(inside, name="patched", model=patched)
    plain, other = (
        load_lora(path)[1]
        for path in (files(output, "plain_*.safetensors") + files(output, "patched_*.safetensors"))
    )
    assert plain["hashes"]["base"] != other["hashes"]["base"]
    assert plain["rewards"] != other["rewards"]
    assert torch.equal(inside.ksampler(model=patched), before)


def test_a_lora_can_be_gone_on_from(inside, output, clean, pack):
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(output / "loras"))
    train(inside, name="first")
    (first,) = files(output)
    report = train(inside, name="second", lora_name=first.name, learning_rate=1e-7, iterations=1)[5]
    tensors = load_file(files(output)[1])
    assert max((tensors[name] - load_file(first)[name]).abs().max() for name in tensors) < 1e-5
    assert "iteration 1" in report
    with pytest.raises(ValueError, match="set the rank and the base model"):
        train(inside, name="third", lora_name=first.name, rank=2)


def test_a_second_drm_judges(inside, output):
    held_out = train(inside, held_out_drm=inside.drm.clone(), name="judged")[5]
    assert "judge" in load_lora(files(output)[0])[1]["hashes"]
    assert "held-out score" in held_out


def test_state_is_no_lora_in_the_page(inside, output):
    train(inside)
    (state,) = files(output, ".resume")
    with safe_open(state, "pt") as file:
        assert {"exp_avg.0", "exp_avg_sq.0", "step.0", "parameter.0"} <= set(file.keys())


def test_damaged_state_starts_again(inside, output):
    first = train(inside)[1]
    (state,) = files(output, ".resume")
    state.write_bytes(state.read_bytes()[:100])
    again = train(inside)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_iteration_gives_a_curve_the_stock_graph_can_draw(inside, output):
    loss = train(inside, iterations=1)[2]["loss"]
    assert len(loss) == 2
    assert max(loss) > min(loss)
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


@pytest.fixture
def full_disk():
    """Within it no file can grow past so many bytes: what a full disk does to a program."""

    @contextlib.contextmanager
    def limited(size):
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)

    return limited


@pytest.mark.parametrize(("size", "missing"), [(1000, [".resume", ".safetensors"]), (150_000, [".resume"])])
def test_full_disk_costs_the_file_only(inside, output, pack, monkeypatch, full_disk, size, missing):
    """150 kB hold the LoRA but not the state, which is four times as large."""
    run = pack.module("nodes.grpo.run").Run
    save = run._save

    def limited(self, *arguments):
        with full_disk(size):
            save(self, *arguments)

    monkeypatch.setattr(run, "_save", limited)
    lora, report = (train(inside)[i] for i in (1, 5))
    assert any(tensor.abs().max() > 0 for tensor in lora.values())
    for ending in (".resume", ".safetensors"):
        saved = files(output, ending)
        assert (saved == []) == (ending in missing)
        assert bool(re.search(rf"{ending} could not be saved \(.*File too large", report)) == (
            ending in missing
        )
    assert not list((output / "loras").glob(".*.tmp"))
