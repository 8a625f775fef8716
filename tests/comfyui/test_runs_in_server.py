"""Runs in a real server: pictures, metadata, caching, progress, Cancel, seeds."""

import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.comfyui.graphs import custom_graph, node, score_graph, stepwise_graph


def picture(server, result, node_id="9"):
    """The one picture a node saved, with its metadata decoded."""
    (image,) = result.images(node_id)
    with Image.open(io.BytesIO(server.view(image))) as opened:
        metadata = {key: json.loads(value) for key, value in opened.info.items()}
        return np.asarray(opened.convert("RGB")), metadata


def succeeded(result):
    assert result.status == "success", result.error
    return result


def test_a_seed_gives_the_same_picture_in_another_process(server, inside):
    graph = stepwise_graph("seed", num_branches=3, steps=4, seed=21)
    graph["10"] = node("SaveLatent", samples=["7", 0], filename_prefix="seed")
    result = succeeded(server.run(graph))
    here = inside.stepwise(inside.latent(), num_branches=3, steps=4, seed=21)
    with torch.inference_mode():
        decoded = inside.vae.decode(here)[0]
    wanted = np.clip(255.0 * decoded.numpy(), 0, 255).astype(np.uint8)
    drawn, _ = picture(server, result)
    assert drawn.std() > 5
    assert np.abs(drawn.astype(int) - wanted.astype(int)).max() <= 1


def test_picture_carries_the_trace(server):
    _, metadata = picture(
        server, succeeded(server.run(stepwise_graph("trace", num_branches=3, steps=4, seed=31)))
    )
    (trace,) = metadata["drm_trace"].values()
    assert list(metadata["drm_trace"]) == ["7"]
    assert (trace["num_branches"], trace["seed"], len(trace["steps"])) == (3, 31, 4)
    assert [len(step["scores"][0]) for step in trace["steps"][:-1]] == [3, 3, 3]
    assert (trace["steps"][-1]["scores"], trace["steps"][-1]["sigma_next"]) == (None, 0.0)
    assert metadata["prompt"]["7"]["class_type"] == "StepwiseKSampler"


def test_picture_keeps_the_pages_workflow(server):
    result = server.run(stepwise_graph("page", seed=32), workflow={"nodes": [], "made": "here"})
    _, metadata = picture(server, succeeded(result))
    assert metadata["workflow"] == {"nodes": [], "made": "here"}
    assert "7" in metadata["drm_trace"]


def test_cached_run_still_carries_the_trace(server):
    _, first = picture(server, succeeded(server.run(stepwise_graph("cache_a", seed=33))))
    again = succeeded(server.run(stepwise_graph("cache_b", seed=33)))
    cached = [data["nodes"] for event, data in again.messages if event == "execution_cached"]
    assert "7" in cached[0]
    _, second = picture(server, again)
    assert second["drm_trace"] == first["drm_trace"]
    _, third = picture(server, succeeded(server.run(stepwise_graph("cache_c", seed=34))))
    assert third["drm_trace"]["7"]["steps"] != first["drm_trace"]["7"]["steps"]


def test_custom_sampler_carries_its_trace_too(server):
    first = succeeded(server.run(custom_graph("custom_a", noise_seed=41)))
    drawn, metadata = picture(server, first, "13")
    assert list(metadata["drm_trace"]) == ["11"]
    # The sampler node is cached, the sampling is not: its new trace must be found, plotted and saved.
    second = succeeded(server.run(custom_graph("custom_a", noise_seed=42)))
    other, other_metadata = picture(server, second, "13")
    assert (drawn.astype(int) - other.astype(int)).any()
    assert other_metadata["drm_trace"]["11"] != metadata["drm_trace"]["11"]
    assert set(second.executed) == {"13", "14"}
    same = stepwise_graph("custom_same", seed=5)
    _, plain = picture(server, succeeded(server.run(same)))
    third = succeeded(server.run(custom_graph("custom_b", noise_seed=5)))
    assert picture(server, third, "13")[1]["drm_trace"]["11"]["steps"] == plain["drm_trace"]["7"]["steps"]


def test_prompts_without_our_nodes_are_left_alone(server):
    graph = {
        "1": node("EmptyImage", width=16, height=16, batch_size=1, color=7),
        "2": node("SaveImage", images=["1", 0], filename_prefix="other"),
    }
    _, metadata = picture(server, succeeded(server.run(graph)), "2")
    assert set(metadata) == {"prompt"}


def test_unchanged_graph_reloads_nothing(server):
    succeeded(server.run(stepwise_graph("reload", seed=51)))
    before = len(server.log_text())
    again = succeeded(server.run(stepwise_graph("reload", seed=52)))
    cached = next(data["nodes"] for event, data in again.messages if event == "execution_cached")
    assert {"1", "2", "3", "4", "5", "6"} <= set(cached)
    log = server.log_text()[before:]
    assert "Requested to load DRM" not in log
    assert "model_type FLOW" not in log


def test_one_progress_tick_a_step(server):
    with server.events() as events:
        prompt_id = server.queue(stepwise_graph("ticks", seed=61, steps=5), client_id=events.client_id)
        succeeded(server.wait(prompt_id))
    ticks = [(tick["value"], tick["max"]) for tick in events.of("progress", prompt_id) if tick["node"] == "7"]
    # newer versions drop what comes too soon after another, never the first and the last
    assert set(ticks) <= {(step, 5) for step in range(1, 6)}
    assert (ticks[0], ticks[-1]) == ((1, 5), (5, 5))
    assert ticks == sorted(set(ticks))


def test_cancel_works_in_the_middle_of_scoring(server):
    prompt_id = server.queue(stepwise_graph("cancel", seed=71, steps=50, num_branches=1000))
    deadline = time.monotonic() + 60
    while server.queue_state()["running"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    server.interrupt()
    result = server.wait(prompt_id, timeout=60)
    assert result.interrupted
    succeeded(server.run(stepwise_graph("after_cancel", seed=72)))


def test_score_node_shows_its_ranking(server):
    result = succeeded(server.run(score_graph(seed=81)))
    (text,) = result.outputs["8"]["text"]
    ranks = [line.split(". picture ") for line in text.splitlines()]
    assert [rank for rank, _ in ranks] == ["1", "2", "3"]
    scores = [float(rest.split(": ")[1]) for _, rest in ranks]
    assert scores == sorted(scores, reverse=True)
    assert {int(rest.split(":")[0]) for _, rest in ranks} == {1, 2, 3}


def test_best_picture_and_sorted_batch_go_on(server):
    graph = score_graph(seed=82) | {
        "9": node("VAEDecode", samples=["8", 2], vae=["1", 2]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="best"),
        "11": node("VAEDecode", samples=["8", 3], vae=["1", 2]),
        "12": node("SaveImage", images=["11", 0], filename_prefix="sorted"),
    }
    result = succeeded(server.run(graph))
    ordered = result.images("12")
    assert (len(result.images("10")), len(ordered)) == (1, 3)
    with Image.open(io.BytesIO(server.view(ordered[0]))) as first:
        assert (np.abs(np.asarray(first, dtype=int) - picture(server, result, "10")[0]) <= 1).all()


@pytest.mark.parametrize("size", [(136, 128), (72, 104)])
def test_odd_latent_sizes_run(server, size):
    graph = stepwise_graph(f"odd_{size[0]}", seed=91)
    graph["6"] = node("EmptyLatentImage", width=size[0], height=size[1], batch_size=1)
    drawn, _ = picture(server, succeeded(server.run(graph)))
    assert drawn.shape[:2] == (size[1], size[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"denoise": 0.0},
        {"denoise": 0.3},
        {"num_branches": 1, "noise_level": 0.0},
        {"kind": "cps", "noise_level": 0.5},
        {"branch_start": 0.5, "branch_end": 0.5},
    ],
)
def test_unusual_settings_run(server, settings):
    succeeded(server.run(stepwise_graph("unusual", **{"seed": 95, **settings})))


def test_a_thousand_branches_run(server):
    graph = stepwise_graph("thousand", seed=96, num_branches=1000, steps=2)
    graph["6"]["inputs"] |= {"width": 16, "height": 16}
    _, metadata = picture(server, succeeded(server.run(graph)))
    first, last = metadata["drm_trace"]["7"]["steps"]
    assert len(first["scores"][0]) == 1000
    assert first["winner"] == [int(np.argmax(first["scores"][0]))]
    assert last["scores"] is None
