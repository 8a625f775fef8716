"""Traces: found again by the LATENT, drawn, and kept in the metadata of pictures."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def drawn(inside):
    return inside.run(inside.latent(batch=2), num_branches=3, steps=5)


@pytest.fixture(scope="module")
def sampled(inside):
    """(LATENT, sampler log) of SamplerCustomAdvanced with Step-wise Sampler, for a noise seed."""
    from comfy_extras.nodes_custom_sampler import (
        BasicScheduler,
        CFGGuider,
        RandomNoise,
        SamplerCustomAdvanced,
    )

    node = inside.pack.module("nodes.sampler").StepwiseSampler
    with torch.inference_mode():
        sampler, log = node.execute(
            drm=inside.drm,
            positive=inside.positive,
            num_branches=3,
            noise_level=0.7,
            kind="sde",
            branch_start=0.0,
            branch_end=1.0,
            seed=11,
        ).result

    def run(seed):
        with torch.inference_mode():
            guider = CFGGuider.execute(inside.model, inside.positive, inside.negative, 2.0).result[0]
            sigmas = BasicScheduler.execute(inside.model, "simple", 5, 1.0).result[0]
            noise = RandomNoise.execute(seed).result[0]
            return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, inside.latent()).result, log

    return run


def test_sampler_and_ksampler_draw_the_same(inside, sampled):
    (output, denoised), log = sampled(11)
    ours, trace = inside.run(num_branches=3, steps=5)
    assert torch.equal(output["samples"], ours["samples"])
    find = inside.pack.module("nodes.traces").find_trace
    assert find(log, output).steps == trace.steps
    assert find(log, denoised).steps == trace.steps


def test_each_latent_finds_its_own_trace(inside, sampled):
    find = inside.pack.module("nodes.traces").find_trace
    ((first, _), log), ((second, _), _) = sampled(1), sampled(2)
    assert find(log, first).steps != find(log, second).steps
    with pytest.raises(ValueError, match="not drawn by the Step-wise Sampler"):
        find(log, {"samples": first["samples"] + 1})
    with pytest.raises(ValueError, match="connect the LATENT it drew"):
        find(log, None)


def test_sampler_brings_the_drm_into_memory_and_keeps_the_policy(inside, sampled):
    import comfy.model_management as mm

    mm.unload_all_models()
    sampled(3)
    loaded = [entry.model.model for entry in mm.current_loaded_models if entry.model is not None]
    assert any(model is inside.model.model for model in loaded)
    assert any(model is inside.drm.model for model in loaded)


def chosen_pixels(picture):
    """How many pixels have the colour of the chosen path."""
    red = (
        torch.tensor(list(picture.convert("RGB").tobytes()))
        .reshape(-1, 3)
        .sub(torch.tensor([0xD1, 0x49, 0x5B]))
    )
    return int((red.abs().sum(dim=1) < 12).sum())


@pytest.mark.parametrize("relative", [False, True])
def test_plot_shows_the_path_and_every_candidate(inside, drawn, relative):
    draw = inside.pack.module("nodes.trace_picture").draw_trace
    picture = draw(drawn[1], 1, relative, (900, 500))
    assert picture.size == (900, 500)
    assert chosen_pixels(picture) > 150


def test_plot_places_scores_where_the_axes_say(inside):
    axes = inside.pack.module("nodes.trace_picture").Axes(10, 20, 110, 220, steps=4, low=-1.0, high=3.0)
    assert [axes.x(step) for step in (0, 3)] == [22.5, 97.5]
    assert [axes.y(score) for score in (-1.0, 0.0, 3.0)] == [220, 170, 20]


def test_scores_above_the_mean(inside, drawn):
    item_rows = inside.pack.module("nodes.trace_picture").item_rows
    for row in item_rows(drawn[1], 0, True)[:-1]:
        assert sum(row.scores) == pytest.approx(0, abs=1e-6)
        assert row.scores[0] - row.scores[1] == pytest.approx(row.given[0] - row.given[1])
    assert item_rows(drawn[1], 0, False)[-1] is None


def test_scores_as_given_have_a_scale_a_step(inside, drawn):
    item_rows = inside.pack.module("nodes.trace_picture").item_rows
    for row, step in zip(item_rows(drawn[1], 1, False)[:-1], drawn[1].steps, strict=False):
        assert (min(row.scores), max(row.scores)) == (0.0, 1.0)
        assert row.given == step.scores[1]
        assert row.scores[row.winner] == 1.0


def test_a_trace_survives_json_and_an_older_one_is_read(inside, drawn):
    trace = inside.pack.module("drm.trace").Trace
    assert trace.from_json(drawn[1].to_json()) == drawn[1]
    older = {
        **{"num_branches": 3, "noise_level": 0.7, "kind": "sde", "seed": 5, "start": 0.0, "end": 1.0},
        **{"noise_scale": 1.0, "item_ids": [0], "preset": "custom", "budget": None},
        "search": {"choice": "softmax", "temperature": 0.5, "paths": 2, "stride": 3, "sigma_window": None},
        "spent": {"denoise": 3, "scored": {"full": 6}, "seconds": 1.0},
        "steps": [
            {"sigma": 1.0, "sigma_next": 0.0, "scores": [[1.0, 2.0]], "winner": [1]} | {"kept": [[1, 0]]}
        ],
    }
    read = trace.from_json(json.dumps(older))
    assert (read.settings.stride, read.settings.choice, read.settings.num_branches) == (3, "softmax", 3)
    assert read.steps[0].winner == [1]


def test_plot_shades_what_was_not_scored(inside):
    draw = inside.pack.module("nodes.trace_picture").draw_trace
    counts, shade = [], (0xF6, 0xF6, 0xF6)
    for end in (1.0, 0.5):
        _, trace = inside.run(num_branches=3, steps=5, branch_end=end)
        colours = {colour: count for count, colour in draw(trace, 0, False, (900, 500)).getcolors(1 << 20)}
        counts.append(colours.get(shade, 0))
    # The last step never scores; with half a window the one before it does not either.
    assert counts[1] > 1.9 * counts[0] > 60_000


def test_ticks_are_round_numbers_inside_the_range(inside):
    ticks = inside.pack.module("nodes.trace_picture").round_ticks
    assert ticks(-0.31, 0.52) == pytest.approx([-0.2, 0.0, 0.2, 0.4])
    assert ticks(1234.0, 1247.0) == pytest.approx([1235, 1240, 1245])


@pytest.mark.parametrize("settings", [{"num_branches": 1}, {"denoise": 0.0}, {"branch_end": 0.0}])
def test_a_run_without_branching_says_so(inside, settings):
    draw = inside.pack.module("nodes.trace_picture").draw_trace
    picture = draw(inside.run(**settings)[1], 0, False, (400, 240))
    assert chosen_pixels(picture) == 0
    assert len(picture.getcolors(100_000)) > 1


def test_an_item_that_is_not_there_is_refused(inside, drawn):
    execute = inside.pack.module("nodes.plot").DRMTracePlot.execute
    for picture in (0, 3):
        with pytest.raises(ValueError, match=rf"picture is {picture}: this run drew 2, give a number from 1"):
            execute(trace=drawn[1], scores="as given", width=400, height=240, picture=picture)


def test_signatures_follow_links_and_ignore_numbers(inside):
    signature = inside.pack.module("nodes.trace_metadata").upstream_signature

    def graph(source, sampler, seed=1, extra=""):
        return {
            source: {"class_type": "Loader", "inputs": {"name": "a"}},
            sampler: {"class_type": "Sampler", "inputs": {"model": [source, 0], "seed": seed}},
            "99": {"class_type": "Save", "inputs": {"x": [sampler, 0], "prefix": extra}},
        }

    one = signature(graph("1", "2"), "2")
    assert one == signature(graph("7", "8", extra="elsewhere"), "8")
    assert one != signature(graph("1", "2", seed=2), "2")
    changed = graph("1", "2")
    changed["1"]["inputs"]["name"] = "b"
    assert one != signature(changed, "2")
