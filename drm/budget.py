"""Finishing inside a number of seconds: measure two steps, then pick k and the window of the others.

    expected best of k siblings  = Phi^-1((k - 0.375) / (k + 0.25)) stds above their mean   (Blom 1958)
    gain of (k, n)               = sum over the first n branching steps of weight_i * expected best of k_i
    its cost                     = seconds a candidate * sum of k_i        beside what the policy takes anyway

weight_i falls linearly over the branching steps, because what siblings differ by does. Of all (k, n) that fit
the one with most gain is taken; a later step that no longer fits becomes an Euler step.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

LARGEST = 16
# Part of the seconds that is planned for; the rest is for what varies.
PLANNED = 0.95


def expected_best(num_branches: int) -> float:
    """How far the best of num_branches siblings lies above their mean, in stds; 0 for one."""
    return NormalDist().inv_cdf((num_branches - 0.375) / (num_branches + 0.25))


def affordable(
    plan: Sequence[int], seconds: float, candidate_cost: float, largest: int = LARGEST
) -> list[int]:
    """k of the steps in `plan` (0: Euler), scaled and cut off late so that scoring takes at most `seconds`.

    candidate_cost: seconds for one candidate of every item. k goes up to `largest` where time allows, and a
    plan that falls along the path keeps its shape. No step branches where nothing fits.
    """
    branching = [step for step, k in enumerate(plan) if k > 1]
    top = max((plan[step] for step in branching), default=1)
    best, best_gain = [0] * len(plan), 0.0
    for k in range(2, max(largest, top) + 1):
        scaled = [max(2, round(plan[step] * k / top)) for step in branching]
        gain, cost = 0.0, 0.0
        for count, branches in enumerate(scaled, start=1):
            cost += branches * candidate_cost
            gain += (1 - (count - 1) / len(branching)) * expected_best(branches)
            if cost <= seconds and gain > best_gain + 1e-9:
                best_gain, best = gain, [0] * len(plan)
                for step, chosen in zip(branching[:count], scaled, strict=False):
                    best[step] = chosen
    return best


class Budget:
    """Times a run's steps and says how many candidates the next may draw.

    Each step: `branches(step, paths)`, then the policy, `policy_done(paths)`, the race, `race_done(drawn)`.
    """

    def __init__(self, seconds: float, clock: Callable[[], float], plan: Sequence[int]) -> None:
        self.seconds, self.clock, self.plan = seconds, clock, list(plan)
        self.begun = self.last = clock()
        self.policy_cost: float | None = None
        self.candidate_cost: float | None = None
        self.planned = False

    def elapsed(self) -> float:
        return self.clock() - self.begun

    def policy_done(self, paths: int) -> None:
        """The policy was called for each path."""
        self.policy_cost = self._lap() / paths

    def race_done(self, drawn: int) -> None:
        """`drawn` candidates of every item were drawn and scored; 0 after an Euler step."""
        taken = self._lap()
        if drawn:
            self.candidate_cost = taken / drawn

    def _lap(self) -> float:
        before, self.last = self.last, self.clock()
        return self.last - before

    def fits(self, step: int, paths: int) -> bool:
        """Whether the policy alone can finish in time with this many paths."""
        if step < 2 or self.policy_cost is None:
            return True
        return self.elapsed() + (len(self.plan) - step) * paths * self.policy_cost <= PLANNED * self.seconds

    def branches(self, step: int, paths: int) -> int:
        """k of this step, 0 for an Euler step."""
        if step < 2 or self.candidate_cost is None or not self.plan[step]:
            return self.plan[step]
        left = self.seconds - self.elapsed() - (len(self.plan) - step) * paths * self.policy_cost
        cost = paths * self.candidate_cost
        if not self.planned:
            left -= (1 - PLANNED) * self.seconds
            self.plan[step:] = affordable(self.plan[step:], left, cost)
            self.planned = True
        elif self.plan[step] * cost > left:
            self.plan[step] = 0
        return self.plan[step]
