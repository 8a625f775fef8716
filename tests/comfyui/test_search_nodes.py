"""Presets, seconds and DRM Search: in this process, in the real server and in the page."""

import json

import numpy as np
import pytest
import torch

from tests.comfyui.graphs import custom_graph, node, stepwise_graph
from tests.comfyui.test_bad_input import linked, run_unless_refused
from tests.comfyui.test_runs_in_server import picture, succeeded
from tools.comfy_server import ROOT

DEFAULTS = {"choice": "greedy", "temperature": 0.5, "stride": 1}


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


def test_custom_without_a_search_is_what_it_was(inside):
    before, trace = inside.run(num_branches=3)
    after, same = inside.run(num_branches=3, preset="custom", seconds=0.0, search=None)
    assert torch.equal(before["samples"], after["samples"])
    assert (trace.steps, trace.settings) == (same.steps, same.settings)


@pytest.mark.parametrize("preset", ["fast", "balanced", "thorough"])
def test_a_preset_takes_the_place_of_the_widgets(inside, preset):
    core = inside.pack.module("drm.presets").Branching(preset=preset).chosen()
    # What it takes the place of cannot fail either.
    ours, trace = inside.run(preset=preset, num_branches=7, branch_start=0.9, branch_end=0.1, steps=6)
    assert trace.settings.preset == preset
    scored = [number for number, step in enumerate(trace.steps) if step.scores is not None]
    assert scored == [number for number in range(5) if core.start <= number / 6 < core.end]
    assert scored
    window = {"branch_start": core.start, "branch_end": core.end}
    by_hand, _ = inside.run(num_branches=core.num_branches, **window, steps=6)
    assert torch.equal(ours["samples"], by_hand["samples"])


def test_the_search_node_says_what_the_core_understands(inside):
    core = inside.pack.module("drm.presets").Branching
    assert core(**search_of(inside)) == core()
    warm = search_of(inside, choice="softmax", temperature=0.2, stride=2)
    assert core(**warm) == core(choice="softmax", temperature=0.2, stride=2)


@pytest.mark.parametrize("search", [{"stride": 2}, {"choice": "softmax"}])
def test_part_of_a_batch_repeats_the_whole(inside, search):
    settings = {"num_branches": 3, "search": search_of(inside, **search)}
    whole, trace = inside.run(inside.latent(batch=3), **settings)
    for item in range(3):
        alone, own = inside.run(inside.latent(batch_index=[item]), **settings)
        torch.testing.assert_close(alone["samples"][0], whole["samples"][item], atol=1e-4, rtol=0)
        assert [step.winner[0] for step in own.steps] == [step.winner[item] for step in trace.steps]


def test_a_searching_sampler_draws_what_the_ksampler_draws(server):
    search = {"stride": 2, "choice": "softmax"}
    first = succeeded(server.run(searching(custom_graph, search, prefix="search_custom", noise_seed=5)))
    second = succeeded(server.run(searching(stepwise_graph, search, prefix="search_ksampler", seed=5)))
    one, metadata = picture(server, first, "13")
    other, others = picture(server, second)
    assert np.array_equal(one, other)
    assert metadata["drm_trace"]["11"]["steps"] == others["drm_trace"]["7"]["steps"]


def test_picture_says_what_was_spent(server):
    result = succeeded(server.run(searching(search={"stride": 2}, steps=4, seed=131)))
    trace = picture(server, result)[1]["drm_trace"]["7"]
    assert (trace["spent"]["denoise"], trace["spent"]["scored"]) == (4, 2 + 2)
    assert trace["spent"]["seconds"] > 0
    assert (trace["stride"], trace["preset"], trace["seconds"]) == (2, "custom", 0)


def drawn_by_step(trace):
    return [len(step["scores"][0]) if step["scores"] else 0 for step in trace["steps"]]


def test_picture_says_what_time_allowed(server):
    result = succeeded(server.run(stepwise_graph("budget", steps=8, seed=132, preset="fast", seconds=3600.0)))
    trace = picture(server, result)[1]["drm_trace"]["7"]
    assert trace["seconds"] == 3600
    assert [len(step["scores"][0]) if step["scores"] else 0 for step in trace["steps"]] == [0] * 3 + [
        4
    ] * 4 + [0]
    short = succeeded(server.run(stepwise_graph("budget", steps=8, seed=132, seconds=0.001)))
    trace = picture(server, short)[1]["drm_trace"]["7"]
    assert drawn_by_step(trace) == [2] + [0] * 7


def test_a_graph_of_an_earlier_version_runs_and_the_log_says_what_is_ignored(server):
    prompt = searching(search={"paths": 3, "early_exit": False, "beam_end": 1.0}, prefix="earlier", seed=136)
    # A linked input that is no more would reach the node as an unknown keyword.
    prompt["91"] = node("PrimitiveFloat", value=0.9)
    prompt["80"]["inputs"]["good_enough"] = ["91", 0]
    first, _ = picture(server, succeeded(server.run(prompt)))
    plain, _ = picture(server, succeeded(server.run(searching(prefix="earlier", seed=136))))
    assert np.array_equal(first, plain)
    assert server.log_text().count("DRM Search: paths, early_exit, good_enough of an older graph") == 1


@pytest.mark.parametrize("preset", ["fast", "balanced", "thorough"])
def test_presets_run_in_the_server(server, preset):
    result = succeeded(server.run(stepwise_graph("preset", preset=preset, seed=133, steps=6)))
    assert picture(server, result)[1]["drm_trace"]["7"]["preset"] == preset


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
    "no stride": (lambda: linked("stride", 0, searching, "PrimitiveInt"), "stride is 0: 1 branches at every"),
}


def with_seconds():
    return stepwise_graph(seconds=1.0)


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_clear_sentence(server, case):
    build, sentence = BAD[case]
    result = run_unless_refused(server, build(), sentence)
    if result is None:
        return
    assert result.status == "error", "it ran"
    assert sentence in result.error
    message = result.error.partition(": ")[2]
    assert "\n" not in message
    assert len(message) < 400


START = [7, "fixed", 20, 1.5, "simple", 1.0]
BRANCHES = [6, 0.5, "cps", 0.2, 0.8]
KEPT = {
    "num_branches": 6,
    "noise_level": 0.5,
    "kind": "cps",
    "branch_start": 0.2,
    "branch_end": 0.8,
    "seed": 7,
}


def old_graph(name, widgets):
    """A bundled graph with the widgets' values of some nodes as an earlier version saved them."""
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    for entry in graph["nodes"]:
        if entry["type"] in widgets:
            entry["widgets_values"] = widgets[entry["type"]]
    return graph


@pytest.mark.parametrize(
    ("name", "node_type", "values"),
    [
        ("Reward-guided text to image", "StepwiseKSampler", [*START, *BRANCHES]),
        ("Reward-guided custom sampler", "StepwiseSampler", [*BRANCHES, 7, "fixed"]),
    ],
)
@pytest.mark.parametrize("later", [[], ["fast", 12.5]])
def test_an_older_graph_opens_with_its_old_meaning(page, name, node_type, values, later):
    """From before there were presets, and from before they led."""
    report = page.open_workflow(old_graph(name, {node_type: values + later}), f"older_{name}")
    assert report.console_errors == []
    widgets = report.widgets(node_type)
    preset, seconds = later or ["custom", 0]
    assert (widgets["preset"], widgets["seconds"], widgets["film_strip"]) == (preset, seconds, 0)
    assert {key: widgets[key] for key in KEPT} == KEPT


def test_an_older_plot_shows_the_picture_it_showed(page):
    """Pictures were counted from 0."""
    graph = old_graph("Reward-guided text to image", {"DRMTracePlot": [1, "as given", 600, 300]})
    widgets = page.open_workflow(graph, "older_plot").widgets("DRMTracePlot")
    assert widgets == {"scores": "as given", "width": 600, "height": 300, "picture": 2}


def test_an_older_search_keeps_what_is_left(page):
    graph = json.loads((ROOT / "workflows" / "Reward-guided text to image.json").read_text())
    old = ["softmax", 0.25, 3, 0.5, 7, 2, 0.9, 0.1, True, 0.5, 0.1]
    ids = max(entry["id"] for entry in graph["nodes"]) + 1
    graph["nodes"].append(
        {
            "id": ids,
            "type": "DRMSearch",
            "pos": [0, 0],
            "size": [300, 300],
            "flags": {},
            "order": 0,
            "mode": 0,
        }
        | {"properties": {}, "inputs": [], "outputs": [], "widgets_values": old}
    )
    report = page.open_workflow(graph, "older_search")
    assert report.console_errors == []
    assert report.widgets("DRMSearch") == {"choice": "softmax", "temperature": 0.25, "stride": 7}


def test_a_new_node_starts_with_a_preset(page):
    added = page.page.evaluate("""() => {
        const node = LiteGraph.createNode("StepwiseKSampler");
        return Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]));
    }""")
    assert added["preset"] != "custom"
    assert added["seconds"] == 0
