"""Finishing in time: the plan worked out by hand, and runs against a clock that the test moves."""

import pytest
import torch

from drm.budget import Budget, affordable, expected_best
from drm.search import Search
from drm.stepwise import Trace, sample_stepwise
from tests.drm.searching import SIGMAS, Brightness, Plain, denoise, noise


def test_expected_best_is_near_the_exact_values():
    """Exact means of the largest of k standard normals: 0, 0.564, 0.846, 1.029, 1.267."""
    for k, exact in ((1, 0.0), (2, 0.564), (3, 0.846), (4, 1.029), (6, 1.267)):
        assert expected_best(k) == pytest.approx(exact, abs=0.03)


def test_affordable_takes_the_pair_with_most_gain():
    """Three branching steps, weights 1, 2/3, 1/3, a candidate costs 1.

    With 4 to spend: k = 2 twice gains 0.589 * 5/3 = 0.98, k = 4 once 1.05. With 6: k = 2 thrice 1.18, k = 3
    twice 0.869 * 5/3 = 1.45, k = 6 once 1.28.
    """
    plan = [4, 0, 4, 4, 0]
    assert affordable(plan, 1.9, 1.0) == [0] * 5
    assert affordable(plan, 2.0, 1.0) == [2, 0, 0, 0, 0]
    assert affordable(plan, 4.0, 1.0) == [4, 0, 0, 0, 0]
    assert affordable(plan, 6.0, 1.0) == [3, 0, 3, 0, 0]
    assert affordable(plan, 1000.0, 1.0, largest=9) == [9, 0, 9, 9, 0]
    assert affordable(plan, 0.006, 0.001) == [3, 0, 3, 0, 0]


def test_affordable_keeps_a_falling_plans_shape():
    assert affordable([4, 3, 2], 1000.0, 1.0, largest=8) == [8, 6, 4]
    assert affordable([0, 0], 1000.0, 1.0) == [0, 0]
    assert affordable([4, 4], -1.0, 1.0) == [0, 0]


class Clock:
    """Time that moves when the policy or the scorer works: `policy` and `candidate` seconds each."""

    def __init__(self, policy=1.0, candidate=0.25):
        self.now, self.policy, self.candidate = 0.0, policy, candidate

    def __call__(self):
        return self.now

    def denoise(self, x, sigma):
        self.now += self.policy
        return denoise(x, sigma)

    def score(self, candidates, sigma, item_index):
        self.now += self.candidate * len(candidates)
        return Plain()(candidates, sigma, item_index)


def run(seconds, clock=None, score=None, **settings):
    """One item over 8 steps, plainly 8 s; full k = 4 costs 1 s more at 7 of them."""
    clock = clock or Clock()
    score = clock.score if score is None else score
    return sample_stepwise(clock.denoise, score, noise(1), SIGMAS, seconds=seconds, clock=clock, **settings)


@pytest.mark.parametrize("seconds", [10.5, 11.0, 12.0, 13.5, 15.0, 20.0, 30.0])
def test_a_run_ends_in_time(seconds):
    _, trace = run(seconds)
    assert trace.spent["seconds"] <= seconds
    assert trace.budget["seconds"] == seconds
    drawn = [step.drawn[0] for step in trace.steps]
    assert drawn == trace.budget["branches"]
    assert drawn[:2] == [4, 4]
    assert trace.spent["seconds"] == pytest.approx(8 + 0.25 * sum(drawn))
    # Nothing is left over that another candidate a branching step would have fitted in.
    assert trace.spent["seconds"] > 0.95 * seconds - 1.5 or max(drawn) == 16


def test_the_plan_after_two_steps_by_hand():
    """11.2 s: two steps took 4; six of 1 s remain, 0.95 * 11.2 - 10 = 0.64 s are left: 2 candidates, once."""
    assert run(11.2)[1].budget["branches"] == [4, 4, 2, 0, 0, 0, 0, 0]
    # 12 s leave 1.4, five candidates: all in one step (gain 1.18), or two steps of 2 (0.589 * 1.8 = 1.06).
    assert run(12.0)[1].budget["branches"] == [4, 4, 5, 0, 0, 0, 0, 0]


def test_too_little_time_is_plain_sampling_from_the_third_step():
    _, trace = run(5.0)
    assert trace.budget["branches"] == [4, 4] + [0] * 6
    assert trace.spent["seconds"] == 10


def test_a_machine_that_slows_down_stops_branching():
    clock = Clock()

    def slower(x, sigma):
        clock.policy = 1.0 if sigma > SIGMAS[3] else 1.5
        return clock.denoise(x, sigma)

    _, trace = sample_stepwise(slower, clock.score, noise(1), SIGMAS, seconds=15.0, clock=clock)
    planned = run(15.0)[1].budget["branches"]
    assert trace.budget["branches"][:3] == planned[:3]
    assert trace.budget["branches"] != planned
    assert trace.spent["seconds"] <= 15.0


def test_a_window_that_begins_later_is_measured_there():
    _, trace = run(10.0, start=0.5)
    assert trace.budget["branches"][:5] == [0, 0, 0, 0, 4]
    assert trace.spent["seconds"] <= 10.0


def test_paths_that_do_not_fit_become_one():
    class Timed(Plain):
        def __call__(self, candidates, sigma, item_index):
            clock.now += 0.01 * len(candidates)
            return super().__call__(candidates, sigma, item_index)

    clock = Clock()
    _, trace = run(11.0, clock, Timed(), search=Search(paths=2))
    assert trace.spent["denoise"] == 1 + 2 + 6
    assert trace.spent["seconds"] <= 11.0
    clock = Clock()
    _, trace = run(30.0, clock, Timed(), search=Search(paths=2))
    assert trace.spent["denoise"] == 1 + 2 * 7


def test_plenty_of_time_is_the_largest_k_and_no_budget_is_no_clock():
    assert max(run(1e6)[1].budget["branches"]) == 16
    _, trace = sample_stepwise(denoise, Brightness(), noise(1), SIGMAS)
    assert trace.budget is None
    assert trace.spent["seconds"] >= 0


def test_the_same_branches_again_without_a_clock():
    """What a budget chose is in the trace, and the candidates are those of any run with that k."""
    result, trace = run(1e6, num_branches=16)
    again, other = sample_stepwise(denoise, Plain(), noise(1), SIGMAS, num_branches=16)
    assert trace.budget["branches"] == [16] * 7 + [0]
    assert torch.equal(result, again)
    assert Trace.from_json(trace.to_json()) == trace
    assert [step.scores for step in trace.steps] == [step.scores for step in other.steps]


def test_laps_by_hand():
    """Step 0: policy 2 s for 2 paths, 3 s for 6 candidates."""
    now = [10.0]
    budget = Budget(100.0, lambda: now[0], [3, 3, 3])
    for later, mark in ((2.0, lambda: budget.policy_done(2)), (3.0, lambda: budget.race_done(6))):
        now[0] += later
        mark()
    assert (budget.policy_cost, budget.candidate_cost, budget.elapsed()) == (1.0, 0.5, 5.0)
