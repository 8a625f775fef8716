"""Presets, seconds and DRM Search: in this process, in the real server and in the page."""

import json
import time

import numpy as np
import pytest
import torch

from tests.comfyui.graphs import custom_graph, node, stepwise_graph
from tests.comfyui.test_bad_input import linked
from tests.comfyui.test_runs_in_server import picture, succeeded
from tools.comfy_server import ROOT

DEFAULTS = {
    "choice": "greedy",
    "temperature": 0.5,
    "paths": 1,
    "beam_end": 1.0,
    "stride": 1,
    "last_branches": 0,
    "sigma_high": 1.0,
    "sigma_low": 0.0,
    "early_exit": True,
    "good_enough": 0.0,
    "skip_below": 0.0,
}


def searching(graph=stepwise_graph, search=None, **changes):
    """A graph with DRM Search 80 connected."""
    prompt = graph(**changes)
    prompt["80"] = node("DRMSearch", **DEFAULTS | (search or {}))
    for entry in prompt.values():
        if entry["class_type"] in ("StepwiseKSampler", "StepwiseSampler"):
            entry["inputs"]["search"] = ["80", 0]
    return prompt


def search_of(inside, **changes):
    return inside.pack.module("nodes.search").DRMSearch.execute(**DEFAULTS | changes).result[0]


@pytest.fixture
def calibrated(inside, monkeypatch):
    """The random DRM with a calibration that its scores lie around."""
    table = {"sigma": [0.5], "mean": [0.0], "std": [1.0]}
    monkeypatch.setitem(inside.drm.model.metadata, "calibration", table)


def test_the_list_of_presets_is_the_cores(inside):
    search = inside.pack.module("nodes.search")
    core = inside.pack.module("drm.search")
    assert ["custom", *core.PRESETS] == search.PRESETS
    assert tuple(search.CHOICES) == core.CHOICES


def test_custom_without_a_search_is_what_it_was(inside):
    before, trace = inside.run(num_branches=3)
    after, same = inside.run(num_branches=3, preset="custom", seconds=0.0, search=None)
    assert torch.equal(before["samples"], after["samples"])
    assert (trace.steps, trace.search, trace.preset, trace.budget) == (same.steps, None, "custom", None)


@pytest.mark.parametrize("preset", ["fast", "balanced", "thorough"])
def test_a_preset_takes_the_place_of_the_widgets(inside, preset):
    core = inside.pack.module("drm.search").PRESETS[preset]
    # What it takes the place of cannot fail either.
    ours, trace = inside.run(preset=preset, num_branches=7, branch_start=0.9, branch_end=0.1, steps=6)
    assert (trace.num_branches, trace.start, trace.end) == (core.num_branches, core.start, core.end)
    assert trace.preset == preset
    scored = [number for number, step in enumerate(trace.steps) if step.scores is not None]
    assert scored == [number for number in range(5) if core.start <= number / 6 < core.end]
    assert scored
    dropped = inside.pack.module("drm.search").fit_to_scorer(core.search, None)[0]
    by_hand, _ = inside.run(
        num_branches=core.num_branches, branch_start=core.start, branch_end=core.end, search=dropped, steps=6
    )
    assert torch.equal(ours["samples"], by_hand["samples"])


def test_the_search_node_says_what_the_core_understands(inside):
    core = inside.pack.module("drm.search").Search
    assert search_of(inside) == core()
    assert search_of(
        inside,
        choice="softmax",
        temperature=0.2,
        paths=3,
        beam_end=0.5,
        stride=2,
        last_branches=2,
        sigma_high=0.9,
        sigma_low=0.3,
        early_exit=False,
        good_enough=0.9,
        skip_below=0.1,
    ) == core(
        choice="softmax",
        temperature=0.2,
        paths=3,
        beam_end=0.5,
        stride=2,
        last_branches=2,
        sigma_window=(0.9, 0.3),
        early_exit=False,
        good_enough=0.9,
        skip_below=0.1,
    )


@pytest.mark.parametrize("search", [{"paths": 2}, {"good_enough": 0.6}, {"choice": "softmax"}])
def test_part_of_a_batch_repeats_the_whole(inside, calibrated, search):
    settings = {"num_branches": 3, "search": search_of(inside, **search)}
    whole, trace = inside.run(inside.latent(batch=3), **settings)
    for item in range(3):
        alone, own = inside.run(inside.latent(batch_index=[item]), **settings)
        torch.testing.assert_close(alone["samples"][0], whole["samples"][item], atol=1e-4, rtol=0)
        assert [step.winner[0] for step in own.steps] == [step.winner[item] for step in trace.steps]


def test_a_beam_under_a_mask_keeps_the_kept_region(inside):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    latent = inside.latent(batch=2, seed=3, noise_mask=mask)
    ours = inside.stepwise(latent, search=search_of(inside, paths=3))
    stock = inside.ksampler(latent)
    assert torch.equal(ours[..., :4], stock[..., :4])
    assert (ours[..., 4:] - stock[..., 4:]).abs().max() > 0.1


def test_a_beam_calls_the_policy_once_a_path(inside):
    calls = []

    def count(apply_model, arguments):
        calls.append(len(arguments["input"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = inside.model.clone()
    model.set_model_unet_function_wrapper(count)
    _, trace = inside.run(model=model, steps=4, cfg=1.0, search=search_of(inside, paths=2))
    assert calls == [1] * 7
    assert trace.spent["denoise"] == 7


def test_control_without_calibration_is_refused_and_in_a_preset_left_out(inside, monkeypatch):
    monkeypatch.delitem(inside.drm.model.metadata, "calibration", raising=False)
    with pytest.raises(ValueError, match="skip_below in DRM Search need the DRM's calibration"):
        inside.run(search=search_of(inside, skip_below=0.1))
    core = inside.pack.module("drm.search")
    picky = core.Preset(num_branches=2, search=core.Search(good_enough=0.9, stride=2))
    monkeypatch.setitem(core.PRESETS, "fast", picky)
    _, trace = inside.run(preset="fast")
    assert (trace.search["good_enough"], trace.search["stride"]) == (None, 2)


def test_a_searching_sampler_draws_what_the_ksampler_draws(server):
    search = {"paths": 2, "choice": "softmax"}
    first = succeeded(server.run(searching(custom_graph, search, prefix="search_custom", noise_seed=5)))
    second = succeeded(server.run(searching(stepwise_graph, search, prefix="search_ksampler", seed=5)))
    one, metadata = picture(server, first, "13")
    other, others = picture(server, second)
    assert np.array_equal(one, other)
    assert metadata["drm_trace"]["11"]["steps"] == others["drm_trace"]["7"]["steps"]


def test_picture_says_what_was_spent(server):
    result = succeeded(server.run(searching(search={"paths": 2}, steps=4, seed=131)))
    trace = picture(server, result)[1]["drm_trace"]["7"]
    assert trace["spent"]["denoise"] == 1 + 2 * 3
    assert sum(trace["spent"]["scored"].values()) == 2 + 4 + 4 + 2
    assert trace["spent"]["seconds"] > 0
    assert (trace["search"]["paths"], trace["preset"], trace["budget"]) == (2, "custom", None)


def test_picture_says_what_the_budget_chose(server):
    result = succeeded(server.run(stepwise_graph("budget", steps=8, seed=132, preset="fast", seconds=3600.0)))
    trace = picture(server, result)[1]["drm_trace"]["7"]
    assert trace["budget"]["seconds"] == 3600
    branches = trace["budget"]["branches"]
    assert max(branches[2:]) in (0, 16)
    assert [len(step["scores"][0]) if step["scores"] else 0 for step in trace["steps"]] == branches
    short = succeeded(server.run(stepwise_graph("budget", steps=8, seed=132, seconds=0.001)))
    trace = picture(server, short)[1]["drm_trace"]["7"]
    assert trace["budget"]["branches"] == [2, 2] + [0] * 6


@pytest.mark.parametrize("preset", ["fast", "balanced", "thorough"])
def test_presets_run_in_the_server(server, preset):
    result = succeeded(server.run(stepwise_graph("preset", preset=preset, seed=133, steps=6)))
    assert picture(server, result)[1]["drm_trace"]["7"]["preset"] == preset


def test_cancel_works_in_the_middle_of_a_beam(server):
    prompt_id = server.queue(
        searching(search={"paths": 8}, prefix="cancel_beam", seed=134, steps=200, num_branches=16)
    )
    deadline = time.monotonic() + 60
    while server.queue_state()["running"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    server.interrupt()
    asked = time.monotonic()
    assert server.wait(prompt_id, timeout=60).interrupted
    assert time.monotonic() - asked < 20
    succeeded(server.run(stepwise_graph("after_cancel_beam", seed=135)))


BAD = {
    "unknown preset": (lambda: stepwise_graph(preset="best"), "preset is 'best': choose one of custom, fast"),
    "negative seconds": (
        lambda: linked("seconds", -1.0, with_seconds),
        "seconds is -1.0: give 0",
    ),
    "preset and search": (
        lambda: searching(preset="fast"),
        "a DRM Search is connected and preset is 'fast', which brings its own: set preset to custom",
    ),
    "unknown choice": (
        lambda: searching(search={"choice": "best"}),
        "choice is 'best': it must be one of greedy, softmax",
    ),
    "cold softmax": (
        lambda: searching(search={"choice": "softmax", "temperature": 0.0}),
        "temperature is 0.0: softmax needs one above 0",
    ),
    "no path": (lambda: linked("paths", 0, searching, "PrimitiveInt"), "paths is 0: at least 1 path"),
    "too many paths": (lambda: linked("paths", 10**6, searching, "PrimitiveInt"), "paths is 1000000: give"),
    "no stride": (lambda: linked("stride", 0, searching, "PrimitiveInt"), "stride is 0: 1 branches at every"),
    "no last branches": (
        lambda: linked("last_branches", -2, searching, "PrimitiveInt"),
        "last_branches is -2: give 0",
    ),
    "all are good enough": (
        lambda: linked("good_enough", 1.5, searching),
        "good_enough is 1.5: it is a quantile above 0 and below 1",
    ),
    "skip below nothing": (
        lambda: linked("skip_below", -0.5, searching),
        "skip_below is -0.5: it is",
    ),
    "beam that ends later": (lambda: linked("beam_end", 2.0, searching), "beam_end is 2.0: it is a part"),
    "window upside down": (
        lambda: searching(search={"sigma_high": 0.2, "sigma_low": 0.8}),
        "sigma_window is (0.2, 0.8): wanted (high, low)",
    ),
    "window beyond noise": (lambda: linked("sigma_high", 3.0, searching), "sigma_window is (3.0, 0.0)"),
    "no calibration": (
        lambda: searching(search={"good_enough": 0.9}),
        "good_enough in DRM Search need the DRM's calibration, and this DRM file has none: set it to 0",
    ),
}


def with_seconds():
    return stepwise_graph(seconds=1.0)


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_clear_sentence(server, case):
    build, sentence = BAD[case]
    result = server.run(build())
    assert result.status == "error", "it ran"
    assert sentence in result.error
    message = result.error.partition(": ")[2]
    assert "\n" not in message
    assert len(message) < 400


def old_graph(name):
    """A bundled graph as it was saved before there were presets."""
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    for entry in graph["nodes"]:
        if entry["type"] in ("StepwiseKSampler", "StepwiseSampler"):
            entry["widgets_values"] = entry["widgets_values"][: 11 if "latent_image" in str(entry) else 7]
    return graph


@pytest.mark.parametrize(
    ("name", "node_type"),
    [("stepwise_sampling", "StepwiseKSampler"), ("stepwise_custom_sampler", "StepwiseSampler")],
)
def test_an_older_graph_opens_with_its_old_meaning(page, name, node_type):
    report = page.open_workflow(old_graph(name), f"older_{name}")
    assert report.console_errors == []
    widgets = report.widgets(node_type)
    assert (widgets["preset"], widgets["seconds"]) == ("custom", 0)
    assert (widgets["num_branches"], widgets["branch_end"]) == (4, 0.9)


def test_a_new_node_starts_with_a_preset(page):
    added = page.page.evaluate("""() => {
        const node = LiteGraph.createNode("StepwiseKSampler");
        return Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]));
    }""")
    assert added["preset"] != "custom"
    assert added["seconds"] == 0
