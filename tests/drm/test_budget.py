"""Finishing in time, on a clock that the policy and the scorer move."""

import pytest
import torch

from drm.flow import schedule
from drm.stepwise import sample_stepwise

POLICY, CANDIDATE = 1.0, 0.25


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def denoise(self, x, sigma):
        self.now += POLICY
        return 0.5 * x

    def score(self, candidates, sigma, item_index):
        self.now += CANDIDATE * len(candidates)
        return candidates.mean(dim=(1, 2, 3))


def run(seconds, steps=8, clock=None, **settings):
    clock = clock or Clock()
    x = torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    sigmas = schedule(steps)
    latents, trace = sample_stepwise(
        clock.denoise, clock.score, x, sigmas, seconds=seconds, clock=clock, **settings
    )
    assert latents.isfinite().all()
    return trace, [0 if step.scores is None else len(step.scores[0]) for step in trace.steps]


@pytest.mark.parametrize("seconds", [9.5, 10.0, 11.0, 12.3, 14.0, 15.0])
def test_it_finishes_in_time_and_early_steps_come_first(seconds):
    trace, drawn = run(seconds)
    assert trace.spent["seconds"] <= seconds
    assert trace.spent["seconds"] == pytest.approx(8 * POLICY + CANDIDATE * sum(drawn))
    assert drawn == sorted(drawn, reverse=True)
    # What is left would not pay for two more candidates.
    assert seconds - trace.spent["seconds"] < 2 * CANDIDATE + 1e-9 or drawn == [4] * 7 + [0]


def test_with_time_enough_it_is_what_was_asked_for():
    assert run(100.0)[1] == run(0.0)[1] == [4] * 7 + [0]


def test_with_no_time_at_all_the_first_branching_step_is_what_tells():
    assert run(0.5)[1] == [4] + [0] * 7
    assert run(0.5, start=0.5)[1] == [0, 0, 0, 0, 4, 0, 0, 0]


def test_a_slower_scorer_is_noticed():
    class Slowing(Clock):
        calls = 0

        def score(self, candidates, sigma, item_index):
            self.calls += 1
            self.now += (self.calls > 2) * 0.5 * len(candidates)
            return super().score(candidates, sigma, item_index)

    trace, drawn = run(16.0, clock=Slowing())
    assert sum(drawn) < sum(run(16.0)[1])
    assert drawn[0] == 4
    assert trace.spent["seconds"] <= 16.0


def test_one_branch_costs_nothing_to_leave_out():
    _, drawn = run(0.5, num_branches=1)
    assert drawn == [0] * 8
