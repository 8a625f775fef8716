"""Candidates of one step, drawn and scored: what goes into a race.

x'_j = mean(x, velocity) + std * eps_j     j: branch numbers, path p's from p * PATH_STREAMS on
scores (b, m) of b rows of the batch with m candidates each, at sigma_next, as deep as it takes
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .branching import Candidates, branch_step
from .scoring import check_finite
from .search import PATH_STREAMS, Search, calibrated, spread, survivors


class Step(NamedTuple):
    """Which step, counted from 0, and its two sigmas (0-d tensors)."""

    number: int
    sigma: Tensor
    sigma_next: Tensor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run's steps branch: what stays the same from step to step."""

    score: Callable | None
    noise_level: float
    kind: str
    seed: int
    noise_scale: float
    item_ids: list[int]
    chunk_size: int | None
    sigma_max: float
    search: Search
    reimpose: Callable[[Tensor, Tensor], Tensor] | None
    interrupt: Callable[[], object] | None

    @property
    def dtype(self) -> torch.dtype:
        """What the scorer wants its candidates in."""
        return getattr(self.score, "dtype", torch.float32)

    @property
    def staged(self) -> bool:
        """Whether candidates may leave the race before the scorer's last depth."""
        return self.search.early_exit and hasattr(self.score, "staged")

    def most_rows(self, count: int) -> int:
        """How many rows of `count` candidates go in one scorer call."""
        return max(1, (self.chunk_size or 0) // count)

    def check_interrupt(self) -> None:
        if self.interrupt is not None:
            self.interrupt()


def with_kept_region(setup: Setup, x: Tensor, rows: list[int], whole: Tensor, sigma_next: Tensor) -> Tensor:
    """`reimpose` on some rows x (b, C, H, W) of the batch; it knows only whole batches, like `whole`."""
    if setup.reimpose is None:
        return x
    if len(rows) == len(whole):
        return setup.reimpose(x, sigma_next)
    index = torch.tensor(rows, device=x.device)
    return setup.reimpose(whole.to(x.dtype).index_copy(0, index, x), sigma_next)[index]


def draw(
    setup: Setup,
    x: Tensor,
    velocity: Tensor,
    at: Step,
    rows: list[int],
    branches: list[int],
    dtype: torch.dtype,
) -> Candidates:
    """Branches, by number, of some rows of the batch from x (B, C, H, W)."""
    if len(rows) < len(x):
        x, velocity = x[rows], velocity[rows]
    return branch_step(
        x,
        velocity,
        at.sigma,
        at.sigma_next,
        seed=setup.seed,
        step=at.number,
        items=[setup.item_ids[row] for row in rows],
        branches=branches,
        noise_level=setup.noise_level,
        kind=setup.kind,
        sigma_max=setup.sigma_max,
        noise_scale=setup.noise_scale,
        dtype=dtype,
    )


def states_of(drawn: list[Candidates], branch: Tensor) -> Tensor:
    """(b, C, H, W) float32: row i's candidate of branch number branch[i], whichever path it is of."""
    device = drawn[0].scored.device
    if len(drawn) == 1:
        return drawn[0].state(branch.to(device))
    out = torch.empty_like(drawn[0].scored[:, 0], dtype=torch.float32)
    for path, candidates in enumerate(drawn):
        rows = (branch // PATH_STREAMS == path).nonzero().flatten()
        if len(rows):
            rows_there = rows.to(device)
            out[rows_there] = candidates.state(branch[rows].to(device), rows_there)
    return out


def _check_scores(scores: Tensor, count: int) -> Tensor:
    if scores.shape != (count,):
        raise ValueError(
            f"the scorer returned shape {tuple(scores.shape)} for {count} candidates, not one each"
        )
    return scores.detach().float()


def score_rows(
    setup: Setup,
    candidates: Tensor,
    sigma: float,
    rows: list[int],
    stages: "Stages | None" = None,
) -> tuple[Tensor, Tensor | None]:
    """Scores (b, m) of candidates (b, m, C, H, W) at sigma, and their depths; both on the CPU.

    Called for whole rows that fit the chunk. With `stages` as deep as it takes, else to the last depth, and
    the depths are None.
    """
    batch, count = candidates.shape[:2]
    size = setup.most_rows(count)
    scores, depths = [], []
    for first in range(0, batch, size):
        setup.check_interrupt()
        some = rows[first : first + size]
        part = candidates[first : first + size].flatten(0, 1)
        index = torch.tensor(some, device=candidates.device).repeat_interleave(count)
        if stages is None:
            scores.append(_check_scores(torch.as_tensor(setup.score(part, sigma, index)), len(index)))
        else:
            found, depth = setup.score.staged(part, sigma, index, stages.begin(len(some), count))
            scores.append(_check_scores(torch.as_tensor(found), len(index)))
            depths.append(depth)
    table = torch.cat(scores).reshape(batch, count).cpu()
    check_finite(table, sigma, rows)
    return table, torch.cat(depths).reshape(batch, count).cpu() if depths else None


def flat_below(setup: Setup, sigma: float) -> float:
    """The spread of scores at sigma below which siblings count as alike; none is below -1."""
    if not setup.search.skip_below:
        return -1.0
    return setup.search.skip_below * calibrated(setup.score.calibration, sigma)[1]


class Stages:
    """The decisions after each depth: `begin` one scorer call over whole rows, and hand it the result."""

    def __init__(self, setup: Setup, sigma: float, keep: int, whole: bool) -> None:
        """keep: how many of a row continue. whole: those must be scored to the last depth."""
        self.setup, self.sigma, self.keep, self.whole = setup, sigma, keep, whole

    def begin(self, rows: int, count: int) -> Callable[[int, Tensor], Tensor]:
        alive = torch.ones(rows, count, dtype=torch.bool)
        flat: Tensor | None = None

        def go_on(depth: int, scores: Tensor) -> Tensor:
            nonlocal flat
            table = scores.detach().float().cpu().reshape(rows, count)
            if flat is None:
                flat = spread(table) < flat_below(self.setup, self.sigma)
            lead = self.setup.score.decisive(depth, self.sigma)
            alive.copy_(survivors(table, alive, lead, self.keep, self.whole) & ~flat.unsqueeze(1))
            return alive.flatten().to(scores.device)

        return go_on
