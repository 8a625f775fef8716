"""How good a head learned from picks is on batches whose prompts it never learned from.

A picture is scored at four sigmas, the middles of the quarters of [0, 1], with noise of its own. Every pair
that picks imply is right or wrong at each. The pairs of a batch count together as one, and so do the batches
of a prompt. The 95 % interval is Wilson's (1927) for as many independent answers as the spread over prompts
speaks for: at least the number of prompts, at most that of pairs.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import preference

if TYPE_CHECKING:
    from .head_training import Compared

PARTS = 4
SIGMAS = tuple((part + 0.5) / PARTS for part in range(PARTS))
_AT_ONCE = 8
_Z = 1.96

# (rows of a batch, number of the sigma) -> scores (len(rows),)
Score = Callable[[Sequence[int], int], Tensor]


class Judged(NamedTuple):
    """scores (PARTS, count) of a batch's pictures; margins (PARTS, pairs) of its pairs."""

    prompt: str
    scores: Tensor
    margins: Tensor


def judge(batch: "Compared", score: Score) -> Judged:
    """A batch as a head sees it."""
    rows = range(batch.count)
    parts = [rows[first : first + _AT_ONCE] for first in rows[::_AT_ONCE]]
    scores = torch.stack([torch.cat([score(part, i) for part in parts]) for i in range(PARTS)])
    win, lose = torch.tensor(batch.pairs).unbind(1)
    return Judged(batch.prompt, scores, scores[:, win] - scores[:, lose])


def loss_of(judged: Sequence[Judged]) -> float:
    """Mean Bradley-Terry loss, each batch counting once."""
    return float(torch.stack([softplus(-batch.margins).mean() for batch in judged]).mean())


def accuracy_of(judged: Sequence[Judged]) -> float:
    """Share of right answers, each prompt counting once."""
    return float(_by_prompt(judged, _right).mean())


def _right(batch: Judged) -> Tensor:
    return (batch.margins > 0).double() + 0.5 * (batch.margins == 0).double()


def _by_prompt(judged: Sequence[Judged], of: Callable[[Judged], Tensor]) -> Tensor:
    """Means (prompts, PARTS) over the batches of each prompt."""
    found: dict[str, list[Tensor]] = {}
    for batch in judged:
        found.setdefault(batch.prompt, []).append(of(batch).mean(dim=1))
    return torch.stack([torch.stack(values).mean(dim=0) for values in found.values()])


def interval(values: Tensor, pairs: int) -> tuple[float, float]:
    """95 % interval of the mean of values (prompts,) in [0, 1], which come from so many pairs."""
    prompts, mean = len(values), float(values.mean())
    spread = float(values.var(correction=1)) if prompts > 1 else 0.0
    answers = prompts if spread == 0 else mean * (1 - mean) / spread * prompts
    return wilson(mean, min(max(answers, prompts), max(pairs, prompts)))


def wilson(share: float, answers: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share found in so many answers."""
    middle = (share + _Z**2 / (2 * answers)) / (1 + _Z**2 / answers)
    half = _Z * math.sqrt(share * (1 - share) / answers + _Z**2 / (4 * answers**2)) / (1 + _Z**2 / answers)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_table(judged: Sequence[Judged]) -> dict:
    """{pairs, prompts, accuracy, interval, by_sigma, said}; said: the mean probability that the head itself
    gives to its answers, which is the accuracy if it knows how sure to be.
    """
    right, said = (_by_prompt(judged, of) for of in (_right, lambda batch: batch.margins.abs().sigmoid()))
    pairs = sum(batch.margins.shape[1] for batch in judged)
    return {
        "pairs": pairs,
        "prompts": len(right),
        "accuracy": float(right.mean()),
        "interval": list(interval(right.mean(dim=1), pairs)),
        "by_sigma": right.mean(dim=0).tolist(),
        "said": float(said.mean()),
    }


def calibration_of(judged: Sequence[Judged]) -> dict[str, list[float]]:
    """Mean and std of the scores by sigma, for a file's header."""
    scores = torch.cat([batch.scores for batch in judged], dim=1)
    sigmas = torch.tensor(SIGMAS)[:, None].expand_as(scores)
    return preference.calibration(scores.flatten(), sigmas.flatten(), num_bins=PARTS)
