"""What the report says of two short runs, by hand."""

import pytest

from benchmarks.step_grpo_report import best_judge, compare, reached, spread


def run(*rows):
    """Rows of (updates, reward, judge)."""
    return [
        {"updates": n, "passes": 10 * n, "seconds": 2.0 * n, "drm": drm, "judge": judge, "diversity": 0.05}
        for n, drm, judge in rows
    ]


GRPO = run((0, -2.0, 0.4), (10, -1.5, 0.41), (20, -1.0, 0.42))
STEP = run((0, -2.0, 0.4), (10, 0.0, 0.44), (20, 3.0, 0.2))


def test_a_level_is_reached_between_two_rows_in_proportion():
    assert reached(STEP, -1.0, "updates") == 5
    assert reached(STEP, 1.5, "passes") == 150
    assert reached(GRPO, 0.0, "updates") is None


def test_ways_are_compared_at_the_baselines_final_reward():
    found = compare({("grpo", 4): GRPO, ("step-grpo", 4): STEP})
    assert found["grpo 4"]["passes_saved"] == 1
    step = found["step-grpo 4"]
    assert (step["updates_saved"], step["passes_saved"], step["seconds_saved"]) == (4, 4, 4)
    assert step["judge_change"] == pytest.approx(0.02)
    assert step["diversity_change"] == 0


def test_a_way_that_never_gets_there_is_known_by_its_end():
    slow = run((0, -2.0, 0.4), (10, -1.9, 0.43))
    found = compare({("grpo", 4): GRPO, ("step-grpo", 2): slow})["step-grpo 2"]
    assert "passes_saved" not in found
    assert found["last"] == -1.9
    assert found["last_judge_change"] == pytest.approx(0.03)
    assert found["last_diversity_change"] == 0


def test_over_optimisation_begins_behind_the_judges_best():
    gain, reward = best_judge(STEP)
    assert gain == pytest.approx(0.04)
    assert reward == 0.0


def test_spread_is_mean_least_and_most():
    assert spread([1.0, 2.0, 6.0]) == [3.0, 1.0, 6.0]
