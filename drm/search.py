"""Where Step-wise Sampling spends its candidates: settings, presets and the small decisions, all pure.

    plan        k of every step: num_branches, falling linearly to last_branches over the steps that branch
    good enough score > mean(sigma) + z std(sigma), z the normal quantile of `good_enough`: draw no more
    flat        best - worst < skip_below std(sigma): siblings the scorer cannot tell apart
    out         more than lead(depth, sigma) behind the best after that many blocks: score it no deeper
    softmax     argmax_j score_j / T + g_j with g_j Gumbel is a draw from softmax(score / T); the P highest
                are P draws without replacement (Gumbel-top-k; Kool et al. 2019)

mean and std are the reward model's calibration: its scores of real pictures, by sigma. Tables are (b, m): b
items, m candidates each. Every decision reads one item's row only, so that a batch equals its items.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist

import torch
from torch import Tensor

from .branching import philox4x32, uint_to_uniform
from .preference import interpolate

CHOICES = ("greedy", "softmax")
# Branch numbers of a kept path begin here: path p draws the streams p * PATH_STREAMS + j.
PATH_STREAMS = 1 << 16
# The element counter of the softmax's noise, which no latent is large enough to reach.
_CHOICE_COUNTER = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a run spends and chooses; the default draws every candidate and continues with the best.

    choice, temperature: "greedy", or "softmax" of score / temperature (in the score's own units, above 0).
    paths: states kept of each item, a beam: each has its own velocity and draws num_branches candidates, and
        the best `paths` of all of an item's continue. beam_end: the part of the steps after which only the
        best path goes on; at 1 all of them arrive and the best finished latent is taken.
    stride: branch at every stride-th step of the window, the others are Euler steps.
    last_branches: k at the window's last branching step; a step whose k comes to 1 is an Euler step.
    sigma_window: (high, low), branch only while low <= sigma <= high.
    early_exit: where the scorer has depths, stop scoring a candidate once it is decisively behind.
    good_enough: a quantile in (0, 1): candidates are drawn in rounds of round_size, and an item stops at one
        that scores above this share of real pictures at that sigma.
    skip_below: stop scoring an item's siblings, and branching for it from then on, once their scores differ
        by less than this many stds of real pictures' scores. 0 never does.
    """

    choice: str = "greedy"
    temperature: float = 0.0
    paths: int = 1
    beam_end: float = 1.0
    stride: int = 1
    last_branches: int | None = None
    sigma_window: tuple[float, float] | None = None
    early_exit: bool = True
    good_enough: float | None = None
    round_size: int = 2
    skip_below: float = 0.0

    def __post_init__(self) -> None:
        for wrong, message in _rules(self):
            if wrong:
                raise ValueError(message)

    def as_dict(self) -> dict:
        """Plain values, as a trace keeps them."""
        window = None if self.sigma_window is None else list(self.sigma_window)
        return asdict(self) | {"sigma_window": window}


def _rules(search: Search) -> list[tuple[bool, str]]:
    """(broken, what to say) of every rule; written so that NaN breaks them too."""
    temperature, window = search.temperature, search.sigma_window
    warm = search.choice == "softmax"
    return [
        (
            search.choice not in CHOICES,
            f"choice is '{search.choice}': it must be one of {', '.join(CHOICES)}",
        ),
        (
            warm and not (math.isfinite(temperature) and temperature > 0),
            f"temperature is {temperature}: softmax needs one above 0, in the units of the score",
        ),
        (
            not warm and temperature != 0,
            f"temperature is {temperature} and choice {search.choice!r}: set choice to 'softmax', or"
            " temperature to 0",
        ),
        (not search.paths >= 1, f"paths is {search.paths}: at least 1 path is kept"),
        (not 0 <= search.beam_end <= 1, f"beam_end is {search.beam_end}: it is a part of the steps, 0 to 1"),
        (not search.stride >= 1, f"stride is {search.stride}: 1 branches at every step of the window"),
        (
            search.last_branches is not None and not search.last_branches >= 1,
            f"last_branches is {search.last_branches}: at least 1 candidate is drawn",
        ),
        (
            window is not None and not (len(window) == 2 and 0 <= window[1] <= window[0] <= 1 + 1e-4),
            f"sigma_window is {window}: wanted (high, low) with 1 >= high >= low >= 0",
        ),
        (
            search.good_enough is not None and not 0 < search.good_enough < 1,
            f"good_enough is {search.good_enough}: it is a quantile above 0 and below 1, such as 0.9",
        ),
        (not search.round_size >= 2, f"round_size is {search.round_size}: a round draws at least 2"),
        (
            not (math.isfinite(search.skip_below) and search.skip_below >= 0),
            f"skip_below is {search.skip_below}: it is a number of stds, at least 0",
        ),
    ]


FULL = Search(early_exit=False)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that belong together: how many branches, where, and the search among them."""

    num_branches: int
    start: float = 0.0
    end: float = 1.0
    search: Search = field(default_factory=Search)


# Measured by benchmarks/stepwise.py: the first and last steps give least for their time.
PRESETS = {
    "fast": Preset(num_branches=4, start=0.3, end=0.8),
    "balanced": Preset(num_branches=4, start=0.1, end=0.9),
    "thorough": Preset(num_branches=4, search=Search(early_exit=False)),
}


def fit_to_scorer(search: Search, score: object) -> tuple[Search, list[str]]:
    """The search without the controls that need what this scorer lacks, and the names of those left out."""
    if getattr(score, "calibration", None):
        return search, []
    dropped = [name for name in ("good_enough", "skip_below") if getattr(search, name)]
    return replace(search, good_enough=None, skip_below=0.0), dropped


def branching_plan(
    sigmas: Sequence[float], num_branches: int, start: float, end: float, search: Search
) -> list[int]:
    """k of every step of the schedule `sigmas` (N + 1,); 0 is an Euler step, as the last one is,
    and one of no length."""
    steps = len(sigmas) - 1
    high, low = search.sigma_window or (math.inf, -math.inf)
    # Schedules are float32: a bound that is written as 0.9 must hold the sigma that is meant by it.
    inside = [
        step
        for step in range(steps)
        if 0 < sigmas[step + 1] < sigmas[step]
        and start <= step / steps < end
        and low - 1e-6 <= sigmas[step] <= high + 1e-6
    ][:: search.stride]
    last = num_branches if search.last_branches is None else search.last_branches
    plan = [0] * steps
    for place, step in enumerate(inside):
        fallen = place / (len(inside) - 1) if len(inside) > 1 else 0
        plan[step] = round(num_branches + (last - num_branches) * fallen)
    return [0 if k == 1 < num_branches else k for k in plan]


def calibrated(table: dict[str, list[float]], sigma: float) -> tuple[float, float]:
    """Mean and std of real pictures' scores at sigma, between the table's bins by straight lines."""
    mean, std = (interpolate(sigma, table["sigma"], table[name]) for name in ("mean", "std"))
    return mean, std


def good_enough_score(table: dict[str, list[float]], sigma: float, quantile: float) -> float:
    """The score that this share of real pictures stays below at sigma, taking them for normal."""
    mean, std = calibrated(table, sigma)
    return mean + NormalDist().inv_cdf(quantile) * std


def spread(scores: Tensor) -> Tensor:
    """Best minus worst of every row: (b, m) -> (b,)."""
    return scores.amax(dim=1) - scores.amin(dim=1)


def survivors(scores: Tensor, alive: Tensor, lead: float | None, keep: int, decided_too: bool) -> Tensor:
    """Which candidates the next depth must see: (b, m) bool.

    scores, alive: (b, m), what this depth says of the candidates that came this far. Those more than `lead`
    behind the keep-th best are out; None puts nobody out. A row with no more than `keep` left is decided and
    goes no deeper, unless decided_too says that its scores are needed at full depth.
    """
    if lead is None:
        return alive.clone()
    standing = scores.masked_fill(~alive, -torch.inf)
    bar = standing.topk(min(keep, scores.shape[1]), dim=1).values[:, -1:]
    left = alive & (standing >= bar - lead)
    return left if decided_too else left & (left.sum(dim=1, keepdim=True) > keep)


def best_places(keys: Tensor, depth: Tensor | None, keep: int) -> Tensor:
    """Places (b, keep) of the highest keys, best first, earlier places first among equals.

    Where candidates were scored to several depths, only a row's deepest compare; the others come last.
    """
    if depth is not None:
        keys = keys.masked_fill(depth < depth.amax(dim=1, keepdim=True), -torch.inf)
    if keep == 1:
        return keys.argmax(dim=1, keepdim=True)
    return keys.sort(dim=1, descending=True, stable=True).indices[:, :keep]


def gumbel(seed: int, step: int, items: Sequence[int], branches: Sequence[int]) -> Tensor:
    """Standard Gumbel noise (items, branches), float64, from the Philox stream of each branch's noise.

    A pure function of (seed, step, item, branch), so a choice does not depend on who else is drawn.
    """
    item = torch.tensor(list(items), dtype=torch.int64).reshape(-1, 1)
    branch = torch.tensor(list(branches), dtype=torch.int64).reshape(1, -1)
    counter, step_word = torch.tensor(_CHOICE_COUNTER), torch.tensor(step)
    key = int(seed) % 2**64
    bits, *_ = philox4x32(counter, step_word, item, branch, key & 0xFFFFFFFF, key >> 32)
    uniform = uint_to_uniform(bits.expand(len(item), branch.shape[1])).double()
    return -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-10)))


def rounds(total: int, size: int) -> list[range]:
    """Ranges of one length that cover 0..total; the last may reach beyond, so that all have one shape."""
    count = math.ceil(total / size)
    length = math.ceil(total / count)
    return [range(first, first + length) for first in range(0, total, length)]


def best_of_n(
    sample: Callable[[int], Tensor], score_clean: Callable[[Tensor], Tensor], n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Best-of-N: for each item the finished latent that scores highest among n runs.

    sample: run number 0..n-1 -> (B, C, H, W), a seed of its own for each. score_clean: those -> (B,).
    Returns the latents (B, C, H, W), all scores (n, B) and which run each item is from (B,).
    """
    if n < 1:
        raise ValueError(f"n is {n}: at least 1 run is needed to choose from")
    best, scores = sample(0), []
    scores.append(score_clean(best))
    highest, which = scores[0], torch.zeros(len(best), dtype=torch.long)
    for run in range(1, n):
        latents = sample(run)
        scores.append(score_clean(latents))
        better = scores[-1] > highest
        best = torch.where(better.to(best.device).reshape(-1, 1, 1, 1), latents, best)
        highest = torch.where(better, scores[-1], highest)
        which = torch.where(better.cpu(), run, which)
    return best, torch.stack(scores), which
