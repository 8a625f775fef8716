"""Finishing inside a number of seconds: a step draws as many candidates as still leave the policy its time.

    left = seconds - elapsed - (steps to come) * policy's last time
    k    = min(planned, left // (time of a candidate, as last measured));  fewer than 2: an Euler step

Early steps are paid for first, because there siblings differ most.
"""

from collections.abc import Callable

import torch


class Budget:
    """Times a run. Each step: `branches(planned, steps_left)`, the policy, `policy_done()`, the candidates,
    `scored(k)`.
    """

    def __init__(self, seconds: float, clock: Callable[[], float], device: torch.device) -> None:
        self.seconds, self.clock, self.device = seconds, clock, device
        self.begun = self.last = clock()
        self.policy_cost = self.candidate_cost = 0.0

    def branches(self, planned: int, steps_left: int) -> int:
        """k of the step ahead, one of steps_left; what is planned, until something was measured."""
        if planned < 2 or not self.seconds or not self.candidate_cost:
            return planned
        left = self.seconds - (self.last - self.begun) - steps_left * self.policy_cost
        affordable = int(left / self.candidate_cost)
        return 0 if affordable < 2 else min(planned, affordable)

    def policy_done(self) -> None:
        """The policy was called."""
        self.policy_cost = self._lap()

    def scored(self, count: int) -> None:
        """`count` candidates of every item were drawn and scored; 0 after an Euler step."""
        taken = self._lap()
        if count:
            self.candidate_cost = taken / count

    def _lap(self) -> float:
        if not self.seconds:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, self.clock()
        return self.last - before
