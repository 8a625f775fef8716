"""Step-GRPO LoRA Trainer in a real server: stock nodes take what it gives, a stop loses nothing."""

import io
import json
import signal
import time

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from drm.lora import load_lora
from tests.comfyui.graphs import models, node
from tests.comfyui.training_graphs import files, trainer_graph
from tests.tiny import build_demo_family
from tools.comfy_server import ComfyServer


def succeeded(result):
    assert result.status == "success", result.error
    return result


def drawn(start, model, **changes):
    """KSampler, VAE Decode and Save Image on a MODEL, as nodes start, start + 1, start + 2."""
    inputs = {
        "model": model,
        "positive": ["4", 0],
        "negative": ["5", 0],
        "latent_image": ["6", 0],
        "seed": 5,
        "steps": 3,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return {
        str(start): node("KSampler", **inputs | changes),
        str(start + 1): node("SaveLatent", samples=[str(start), 0], filename_prefix=f"trainer_{start}"),
    }


def latent(base_dir, start):
    """What SaveLatent of `drawn` wrote last."""
    return load_file(sorted((base_dir / "output").glob(f"trainer_{start}_*.latent"))[-1])["latent_tensor"]


def wait_for(server, condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.05)


def test_stock_nodes_take_what_it_gives(server, base_dir):
    graph = trainer_graph(name="stock", learning_rate=0.02, seed=11, width=0, height=0)
    graph |= {
        "8": node("SaveLoRA", lora=["7", 1], prefix="loras/stock_copy", steps=["7", 3]),
        "9": node("LossGraphNode", loss=["7", 2], filename_prefix="curve"),
        "10": node("LoraModelLoader", model=["1", 0], lora=["7", 1], strength_model=1.0, bypass=False),
        "11": node("PreviewAny", source=["7", 5]),
        "12": node("SaveImage", images=["7", 4], filename_prefix="grid"),
    }
    graph |= drawn(20, ["7", 0]) | drawn(30, ["10", 0]) | drawn(40, ["1", 0])
    result = succeeded(server.run(graph))
    (path,) = (base_dir / "output" / "loras").glob("stock_*[0-9a-f].safetensors")
    assert "went" not in result.outputs["7"]["text"][0]
    assert str(path) in result.outputs["11"]["text"][0]
    (copy,) = (base_dir / "output" / "loras").glob("stock_copy_2_steps_*.safetensors")
    own, copied = load_file(path), load_file(copy)
    assert all((own[name] == copied[name]).all() for name in own)
    trained, loaded, plain = (latent(base_dir, start) for start in (20, 30, 40))
    assert (trained - loaded).abs().max() <= 1e-4
    assert (trained - plain).abs().max() > 1e-2
    with Image.open(io.BytesIO(server.view(result.images("12")[0]))) as picture:
        assert np.asarray(picture).std() > 5
        assert picture.width >= 2 * 128  # what the DRM was made for

    # The stock LoraLoader finds the file where it was saved.
    name = path.name
    for start, strength in ((50, 1.0), (60, 0.0)):
        loader = node("LoraLoaderModelOnly", model=["1", 0], lora_name=name, strength_model=strength)
        graph |= {str(start + 5): loader} | drawn(start, [str(start + 5), 0])
    undone = node("LoraLoaderModelOnly", model=["7", 0], lora_name=name, strength_model=-1.0)
    graph |= {"75": undone} | drawn(70, ["75", 0])
    succeeded(server.run(graph))
    assert (latent(base_dir, 50) - trained).abs().max() <= 1e-4
    assert (latent(base_dir, 60) - plain).abs().max() == 0
    assert (latent(base_dir, 70) - plain).abs().max() <= 1e-4


def test_progress_shows_pictures_and_words(server):
    with server.events() as events:
        graph = trainer_graph(name="shown", iterations=4, preview_every=2)
        prompt_id = server.queue(graph, client_id=events.client_id)
        succeeded(server.wait(prompt_id))
    ticks = [tick for tick in events.of("progress", prompt_id) if tick["node"] == "7"]
    assert ticks[-1]["value"] <= ticks[-1]["max"] == 4 * 2 * 3
    assert len(ticks) > 8
    assert len(events.previews) >= 2
    before = ("Reading ", "Loading the models", "Reading the weights", "Drawing ", "Checking that")
    for line in (*before, "iteration 4 of 4, reward", "KL", "s left", "held-out"):
        assert line in server.log_text()


def test_cancel_keeps_what_was_learned_and_the_next_prompt_goes_on(server, base_dir):
    graph = trainer_graph(name="cancelled", iterations=10000)
    prompt_id = server.queue(graph)
    wait_for(server, lambda: files(base_dir / "output", "cancelled_*.safetensors"))
    server.interrupt()
    assert server.wait(prompt_id, timeout=60).interrupted
    (path,) = files(base_dir / "output", "cancelled_*.safetensors")
    done = load_lora(path)[1]["iteration"]
    assert f"what was learned in {done} iteration{'s' * (done != 1)} is in {path}" in server.log_text()
    result = succeeded(server.run(trainer_graph(name="cancelled", iterations=done + 1)))
    assert f"went on after iteration {done}" in result.outputs["7"]["text"][0]


@pytest.fixture
def clean(server, base_dir):
    """Fails the test when the server's MODEL draws anything else after it than before it."""

    def draw(start):
        graph = models() | {"90": node("TestSameModel", model=["1", 0])} | drawn(start, ["90", 0])
        succeeded(server.run(graph))
        return latent(base_dir, start)

    before = draw(91)
    yield
    assert (draw(94) == before).all()


def broken_graph(node_type, socket, source, **broken):
    """A long training with a test's node before one of its sockets."""
    breaks = node(node_type, **{socket: source}, **broken)
    return trainer_graph(name="broken", iterations=50, **{socket: ["70", 0]}) | {"70": breaks}


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (
            ("TestMemoryFor", "model", ["1", 0], {"pictures": 9, "calls": 100}),
            "out of memory in iteration {next}, with one picture at once and every block computed again",
        ),
        (("TestNaNAfter", "drm", ["3", 0], {"calls": 60}), "the reward model gave NaN or infinity"),
    ],
    ids=["memory", "nan"],
)
def test_an_end_in_the_middle_loses_nothing(server, base_dir, clean, broken, sentence):
    node_type, socket, source, settings = broken
    result = server.run(broken_graph(node_type, socket, source, **settings))
    assert result.status == "error"
    (path,) = files(base_dir / "output", "broken_*.safetensors")
    done = load_lora(path)[1]["iteration"]
    assert 0 < done < 50
    assert sentence.format(next=done + 1) in result.error
    learned = f"{done} iteration{'s' * (done != 1)}"
    assert f"What was learned in {learned} is in {path}; queued again, it goes on there" in result.error
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    went_on = succeeded(server.run(trainer_graph(name="broken", iterations=done + 1)))
    assert f"went on after iteration {done} of" in went_on.outputs["7"]["text"][0]
    path.unlink()
    path.with_suffix(".resume").unlink()


def test_too_little_memory_takes_smaller_parts(server, clean):
    graph = broken_graph("TestMemoryFor", "model", ["1", 0], pictures=1, calls=10000)
    graph["7"]["inputs"] |= {"name": "small", "method": "grpo", "iterations": 2}
    report = succeeded(server.run(graph)).outputs["7"]["text"][0]
    assert "out of memory in iteration 1: from there 1 pictures at once" in report


def test_a_folder_that_cannot_be_written(server, base_dir, clean):
    (base_dir / "output" / "loras").mkdir(exist_ok=True)
    (base_dir / "output" / "loras" / "blocked").write_text("a file where a folder would be")
    result = server.run(trainer_graph(name="blocked/mine"))
    assert result.status == "error"
    assert "cannot be written to" in result.error
    assert "give the server one it may" in result.error


def test_a_prompt_file_that_changed_is_trained_on_again(server, base_dir):
    file, graph = base_dir / "input" / "changing.txt", trainer_graph(name="changing", prompts="changing.txt")
    counted = []
    for prompts in ("red heart", "red heart", "blue car\ngreen tree"):
        if not file.exists() or file.read_text() != prompts:
            file.write_text(prompts)
        succeeded(server.run(graph))
        counted.append(len(files(base_dir / "output", "changing_*.safetensors")))
    assert counted == [1, 1, 2]


def test_two_trainers_one_after_the_other(server, base_dir):
    ids = [server.queue(trainer_graph(name=f"pair{i}", seed=i)) for i in (1, 2)]
    for prompt_id in ids:
        succeeded(server.wait(prompt_id))
    first, second = (load_file(files(base_dir / "output", f"pair{i}_*.safetensors")[0]) for i in (1, 2))
    assert any((first[name] != second[name]).any() for name in first)


def test_a_killed_server_goes_on(tmp_path):
    """Stopped once politely and once not, the run ends with the LoRA of one that never was."""
    build_demo_family(tmp_path / "models")
    graph = trainer_graph(name="killed", iterations=6, preview_every=2)
    for stop, after in ((signal.SIGTERM, 2), (signal.SIGKILL, 4)):
        with ComfyServer(tmp_path) as server:
            server.queue(graph)
            wait_for(server, lambda after=after: f"iteration {after} of 6" in server.log_text())
            server.process.send_signal(stop)
            server.process.wait(20)
        (state,) = files(tmp_path / "output", ".resume")
        with safe_open(state, "pt") as file:
            done = json.loads(file.metadata()["progress"])["iteration"]
        assert after - 1 <= done < 6
        path = state.with_suffix(".safetensors")
        # killed between its two files, the LoRA is one iteration behind what is gone on from
        assert not path.exists() or done - load_lora(path)[1]["iteration"] in (0, 1)
    with ComfyServer(tmp_path) as server:
        went_on = succeeded(server.run(graph)).outputs["7"]["text"][0]
        assert f"went on after iteration {done} of" in went_on
        resumed = load_file(path)
        path.with_suffix(".resume").unlink()
        graph["7"]["inputs"]["save_every"] = 4  # or the server would take the result from its cache
        succeeded(server.run(graph))
    whole = load_file(path)
    assert all((resumed[name] == whole[name]).all() for name in whole)
