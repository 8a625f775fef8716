"""The benchmark's arithmetic, by hand, and its loop on a small run of the shipped models."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import stepwise
from benchmarks.judging import (
    asked_prompts,
    choose_prompts,
    free_prompts,
    fresh_prompts,
    interval,
    unseen_prompts,
)
from benchmarks.stepwise import Bench, Setting, Way, all_ways, changed, default_k4, scored_passes
from drm import load_drm
from drm.presets import Branching
from training.demo.data import STYLES, asked_freely, held_out_concepts
from training.demo.export import REWARD, load_family

MODELS = Path(__file__).resolve().parents[2] / "models"
SETTING = Setting(steps=4, cfg=1.5, batch=4)


def test_scoring_costs_three_quarters_of_a_pass():
    assert scored_passes(8) == 6


def test_a_setting_can_be_changed_for_every_branching_way():
    way = changed(Way(name="x", settings=Branching(preset="fast")), "end", "0.5")
    assert (way.settings.start, way.settings.end, way.settings.num_branches) == (0.3, 0.5, 4)
    assert changed(Way(name="plain"), "end", "0.5") == Way(name="plain")


def test_interval_brackets_the_mean_and_narrows_with_more_prompts():
    rng = np.random.default_rng(0)
    few, many = rng.normal(2, 1, 50), rng.normal(2, 1, 5000)
    mean, low, high = interval(few, np.random.default_rng(1))
    assert mean == pytest.approx(few.mean())
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 50**0.5, rel=0.15)
    _, low_many, high_many = interval(many, np.random.default_rng(1))
    assert high_many - low_many < (high - low) / 5


def test_the_default_is_compared_with_greedy_at_every_step():
    rows = [
        {"way": "balanced", "time_ratio": 1.5, "drm_gain": [1.8, 0, 0], "judge_gain": [0.04, 0, 0]},
        {"way": "k = 4", "time_ratio": 2.5, "drm_gain": [2.0, 0, 0], "judge_gain": [0.05, 0, 0]},
    ]
    found = default_k4(rows)
    assert found["time_ratio"] == 1.5
    assert found["gain_share"] == pytest.approx(0.9)
    assert (found["judge_gain"], found["full_judge_gain"]) == (0.04, 0.05)


def test_rows_of_another_run_replace_their_namesakes():
    before = [{"way": "plain", "x": 1}, {"way": "fast", "x": 2}]
    found = stepwise.merged(before, [{"way": "fast", "x": 3}, {"way": "slow", "x": 4}])
    assert found == [{"way": "plain", "x": 1}, {"way": "fast", "x": 3}, {"way": "slow", "x": 4}]


def test_ways_have_names_of_their_own_and_begin_with_plain_sampling():
    names = [way.name for way in all_ways()]
    assert len(set(names)) == len(names)
    assert names[0] == "plain"
    assert {"balanced", "fast", "thorough", "k = 4"} <= set(names)


@pytest.fixture(scope="module")
def family():
    return load_family(MODELS)


@pytest.fixture(scope="module")
def bench(family):
    fast = load_drm(MODELS / REWARD, dtype=torch.bfloat16).requires_grad_(False)
    return Bench(family, fast, SETTING)


def test_prompts_take_every_concept_before_any_twice(family):
    count = len(family.concepts)
    prompts = choose_prompts(family, count + 5)
    assert {prompt.concept for prompt in prompts[:count]} == set(range(count))
    assert len({prompt.caption for prompt in prompts}) == count + 5


def test_unseen_prompts_are_the_held_out_pairs_in_two_halves(family):
    practised, rest = unseen_prompts(family)
    assert (len(practised), len(rest)) == (100, 100)
    assert len({prompt.concept for prompt in (*practised, *rest)}) == 200


def test_fresh_prompts_are_half_unknown_and_none_is_learned_from(family):
    practised, rest = unseen_prompts(family)
    prompts = fresh_prompts(family)
    captions = {prompt.caption for prompt in prompts}
    assert len(captions) == 200
    assert len(captions & {prompt.caption for prompt in rest}) == 100
    assert not captions & {prompt.caption for prompt in practised}
    known = [prompt for prompt in prompts if prompt not in rest]
    assert {prompt.concept for prompt in known} <= set(held_out_concepts(len(family.concepts)))


def test_free_prompts_name_a_concept_alone_and_every_second_was_never_learned_from(family):
    practised, asked = free_prompts(family)
    new = set(asked_freely(len(family.concepts)))
    assert len({prompt.concept for prompt in asked}) == 200
    assert {prompt.concept for prompt in asked[::2]} <= new
    assert not {prompt.concept for prompt in (*asked[1::2], *practised)} & new
    assert [prompt.learned for prompt in asked] == [False, True] * 100
    assert not set(asked) & set(practised)
    assert len(practised) == len(family.concepts) - 200 - 100
    assert not any(style in prompt.caption for prompt in asked for style in STYLES)


@pytest.mark.parametrize("kind", ["free", "styled", "known"])
def test_prompts_of_every_kind_come_in_the_number_asked_for(family, kind):
    prompts = asked_prompts(family, kind, 30)
    assert len({prompt.caption for prompt in prompts}) == 30
    assert all((", " in prompt.caption) == (kind != "free") for prompt in prompts)


def test_a_small_table_has_a_row_for_every_way(bench):
    ways = [
        Way(name="plain"),
        Way(name="k = 2", settings=Branching(num_branches=2), naive=True),
        Way(name="shared", settings=Branching(num_branches=2)),
        Way(name="every 2nd", settings=Branching(num_branches=2, stride=2)),
        Way(name="best of 2", runs=2),
    ]
    rows = stepwise.run(bench, fresh_prompts(bench.family, 2), ways, 2)
    by_name = {row["way"]: row for row in rows}
    assert list(by_name) == [way.name for way in ways]
    plain = by_name["plain"]
    assert plain["time_ratio"] == 1
    assert plain["judge_gain"] == [0, 0, 0]
    assert plain["passes"] == 8
    # two candidates on three of four steps, three of four blocks each
    assert bench.share == pytest.approx((16 + 20) / (64 + 20))
    scored = 0.75 * bench.share
    assert by_name["k = 2"]["passes"] == pytest.approx(8 + 2 * 3 * scored)
    assert by_name["shared"]["passes"] == by_name["k = 2"]["passes"]
    assert by_name["every 2nd"]["passes"] == pytest.approx(8 + 2 * 2 * scored)
    assert by_name["best of 2"]["passes"] == pytest.approx(2 * 8 + 2 * scored)
    # best-of-N chooses by the DRM among pictures that include the plain one
    assert by_name["best of 2"]["drm_gain"][0] >= -0.1
    assert stepwise.as_markdown(rows).count("\n") == 6


def test_best_of_n_shares_its_plain_runs(bench):
    prompts = [prompt.caption for prompt in fresh_prompts(bench.family, 2)]
    bench.plain.clear()
    two = bench.sample(prompts, [1, 2], Way(name="best of 2", runs=2))
    three = bench.sample(prompts, [1, 2], dataclasses.replace(Way(name="best of 3"), runs=3))
    assert len(bench.plain) == 3
    assert three.seconds > two.seconds
    bench.plain.clear()
