"""The benchmark's arithmetic, by hand, and its loop on a small run of the shipped models."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import stepwise
from benchmarks.stepwise import Setting, choose_prompts, interval, passes
from training.demo.export import load_family

MODELS = Path(__file__).resolve().parents[2] / "models"
SETTING = Setting(steps=20, cfg=1.5, noise_level=0.7, kind="sde", start=0.0, end=1.0)


def test_passes_are_two_a_step_with_cfg_and_three_quarters_a_candidate():
    assert passes(SETTING, 0) == 40
    assert passes(SETTING, 1) == 40
    assert passes(SETTING, 4) == 40 + 0.75 * 4 * 19
    half = Setting(steps=20, cfg=1.0, noise_level=0.7, kind="sde", start=0.25, end=0.5)
    assert passes(half, 2) == 20 + 0.75 * 2 * 5


def test_interval_brackets_the_mean_and_narrows_with_more_prompts():
    rng = np.random.default_rng(0)
    few, many = rng.normal(2, 1, 50), rng.normal(2, 1, 5000)
    mean, low, high = interval(few, np.random.default_rng(1))
    assert mean == pytest.approx(few.mean())
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 50**0.5, rel=0.15)
    _, low_many, high_many = interval(many, np.random.default_rng(1))
    assert high_many - low_many < (high - low) / 5


@pytest.fixture(scope="module")
def family():
    return load_family(MODELS)


def test_prompts_take_every_concept_before_any_twice(family):
    count = len(family.concepts)
    prompts = choose_prompts(family, count + 5)
    assert {prompt.concept for prompt in prompts[:count]} == set(range(count))
    assert len({prompt.caption for prompt in prompts}) == count + 5


def test_a_small_table_has_a_row_for_every_way(family):
    setting = Setting(steps=4, cfg=1.5, noise_level=0.7, kind="sde", start=0.0, end=1.0)
    rows = stepwise.run(family, choose_prompts(family, 2), setting, [0, 1, 2], [2], 2, 4)
    assert [(row["way"], row["k"]) for row in rows] == [
        ("plain", 0),
        ("stepwise", 1),
        ("stepwise", 2),
        ("best-of", 2),
    ]
    assert rows[0]["time_ratio"] == 1
    assert rows[0]["judge_gain"] == [0, 0, 0]
    # best-of-N chooses by the DRM among N pictures that include the plain one
    assert rows[3]["drm_gain"][0] >= 0
    assert stepwise.as_markdown(rows).count("\n") == 5
