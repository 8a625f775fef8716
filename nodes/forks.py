"""What the candidates at some forks of a path would have become, kept while a step-wise sampler runs.

at a fork of the path:  x0_j = denoise(candidate_j, sigma_next)      one model pass each
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from torch import Tensor

MOST_FORKS, MOST_SHOWN = 4, 8


@dataclass(frozen=True)
class Fork:
    """One step of a batch: x0 (B, n, C, H, W) on the CPU as a LATENT has it, of the candidates whose places
    are `branches` (B, n).
    """

    step: int
    x0: Tensor
    branches: list[list[int]]


def check_film_strip(film_strip: int) -> int:
    """Raises ValueError past the widget's limits, which a linked value escapes."""
    if not 0 <= film_strip <= MOST_FORKS:
        raise ValueError(f"film_strip is {film_strip}: give a number of steps from 0 (none) to {MOST_FORKS}")
    return film_strip


def fork_steps(plan: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps that choose among candidates, evenly spread from the first of them on."""
    choosing = [step for step, k in enumerate(plan) if k > 1]
    wanted = min(most, len(choosing))
    return [choosing[i * len(choosing) // wanted] for i in range(wanted)]


class ForkKeeper:
    """Calls the model on the candidates of some steps: `sample_stepwise`'s on_fork.

    denoise: (x (B, C, H, W), sigma 0-d) -> x0 as the model has it. to_latent: that as a LATENT holds it.
    """

    def __init__(
        self, steps: Sequence[int], sigmas: Tensor, denoise: Callable, to_latent: Callable[[Tensor], Tensor]
    ) -> None:
        self.steps, self.sigmas, self.denoise, self.to_latent = set(steps), sigmas, denoise, to_latent
        self.forks: list[Fork] = []
        self.passes = 0

    def __call__(self, step: int, candidate: Callable, scores: Tensor, winner: list[int]) -> None:
        if step not in self.steps:
            return
        shown = [_shown(row, won) for row, won in zip(scores.tolist(), winner, strict=True)]
        predictions = []
        for places in zip(*shown, strict=True):
            mm.throw_exception_if_processing_interrupted()
            x0 = self.denoise(candidate(list(places)), self.sigmas[step + 1])
            predictions.append(self.to_latent(x0).float().cpu())
            self.passes += 1
        self.forks.append(Fork(step, torch.stack(predictions, dim=1), shown))


def _shown(scores: list[float], winner: int) -> list[int]:
    """Places of those that fit into a strip, in the order drawn: the winner, and those scored best."""
    best = sorted(range(len(scores)), key=lambda place: (place != winner, -scores[place]))
    return sorted(best[:MOST_SHOWN])
