"""The settings of a step-wise run, which of its steps they let branch, and the presets that were measured.

step i of N branches    when start <= i / N < end, and then every stride-th of those; never the last
every other step        is a step of Euler's method
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .sde import check_noise_level

CHOICES = ("greedy", "softmax")


@dataclass(frozen=True, kw_only=True)
class Branching:
    """num_branches: candidates of a step (k); 1 continues the one stochastic branch, and with noise_level 0
    is Euler's method bit for bit.
    noise_level, kind: of the stochastic step, see sde.py. noise_scale: multiplies the noise that is added, as
    s_noise does elsewhere.
    start, end, stride: where it branches, see above.
    choice, temperature: see choice.py.
    seed: of the candidates' noise. seconds: finish in this time, see budget.py; 0 is no limit.
    preset: what `chosen` puts in place of num_branches, window and choice. Raises ValueError for settings
    that make no sense.
    """

    num_branches: int = 4
    noise_level: float = 0.7
    kind: str = "sde"
    start: float = 0.0
    end: float = 1.0
    stride: int = 1
    choice: str = "greedy"
    temperature: float = 0.0
    seed: int = 0
    seconds: float = 0.0
    noise_scale: float = 1.0
    preset: str = "custom"

    def __post_init__(self) -> None:
        if self.preset != "custom":
            known = ["custom", *PRESETS]
            if self.preset not in known:
                raise ValueError(f"preset is '{self.preset}': choose one of {', '.join(known)}")
            return
        check_noise_level(self.noise_level, self.kind)
        for wrong, message in self._rules():
            if wrong:
                raise ValueError(message)

    def _rules(self) -> list[tuple[bool, str]]:
        """(broken, what to say) of every rule; written so that NaN breaks them too."""
        scale, temperature, warm = self.noise_scale, self.temperature, self.choice == "softmax"
        return [
            (
                not self.num_branches >= 1,
                f"num_branches is {self.num_branches}: at least 1 candidate a step is needed (4 is usual)",
            ),
            (
                not (math.isfinite(scale) and scale >= 0),
                f"noise_scale is {scale}: it must be a number of at least 0 (1 is usual)",
            ),
            (
                self.num_branches > 1 and self.noise_level * scale == 0,
                f"noise_level {self.noise_level} with noise_scale {scale} makes all {self.num_branches}"
                " candidates equal: raise the noise (noise_level 0.7 is usual) or set num_branches to 1",
            ),
            (
                not 0 <= self.start <= self.end <= 1,
                f"the branching window is {self.start} to {self.end}: wanted 0 <= start <= end <= 1",
            ),
            (not self.stride >= 1, f"stride is {self.stride}: 1 branches at every step of the window"),
            (
                self.choice not in CHOICES,
                f"choice is '{self.choice}': it must be one of {', '.join(CHOICES)}",
            ),
            (
                warm and not (math.isfinite(temperature) and temperature > 0),
                f"temperature is {temperature}: softmax needs one above 0, in the units of the score",
            ),
            (
                not warm and temperature != 0,
                f"temperature is {temperature} and choice {self.choice!r}: set choice to 'softmax', or"
                " temperature to 0",
            ),
            (
                not (math.isfinite(self.seconds) and self.seconds >= 0),
                f"seconds is {self.seconds}: give 0 for no limit, or the time it may take",
            ),
        ]

    def chosen(self) -> "Branching":
        """The same with what the preset stands for."""
        if self.preset == "custom":
            return self
        return replace(self, preset="custom", **{**_EVERY_STEP, **PRESETS[self.preset]})

    def is_quiet(self) -> bool:
        """Whether nothing is drawn: Euler's method throughout."""
        return self.num_branches == 1 and self.noise_level * self.noise_scale == 0

    def plan(self, sigmas: Sequence[float]) -> list[int]:
        """k of every step of a schedule (N + 1,); 0 is an Euler step, as the last is, or one of no length."""
        steps = len(sigmas) - 1
        inside = [
            step
            for step in range(steps)
            if 0 < sigmas[step + 1] < sigmas[step] and self.start <= step / steps < self.end
        ][:: self.stride]
        branching = [] if self.is_quiet() else inside
        return [self.num_branches if step in branching else 0 for step in range(steps)]


_EVERY_STEP = {"start": 0.0, "end": 1.0, "stride": 1, "choice": "greedy", "temperature": 0.0}

# Measured by benchmarks/stepwise.py: the first and last steps give least for their time.
PRESETS = {
    "fast": {"num_branches": 4, "start": 0.3, "end": 0.8},
    "balanced": {"num_branches": 4, "start": 0.1, "end": 0.9},
    "thorough": {"num_branches": 4},
}
