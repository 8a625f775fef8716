"""One branching step: candidates of every kept path, scored as deep as it takes, the best continue.

    x'_pj = mean(x_p, velocity_p) + std * eps_pj       paths p, branches j; drawn in rounds when `good_enough`
    kept  = the P best x'_pj by score(x'_pj, sigma_next), for each batch item on its own

Scores come to the CPU once a round and every decision is made there, so that a GPU is waited for no oftener.
Shapes: b rows of the batch B, m candidates a row (path after path), P kept; states (C, H, W) float32.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .branching import Candidates, branch_step
from .search import (
    PATH_STREAMS,
    Search,
    best_places,
    calibrated,
    good_enough_score,
    gumbel,
    rounds,
    spread,
    survivors,
)

DEFAULT_CHUNK = 16


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
    sigma_max: Tensor
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


def _with_kept_region(setup: Setup, x: Tensor, rows: list[int], whole: Tensor, sigma_next: Tensor) -> Tensor:
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
    at: "Step",
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
    stages: "_Stages | None" = None,
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
    if not bool(table.isfinite().all()):
        row, column = (~table.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"the scorer returned {table[row, column].item()} for batch item {rows[row]} at sigma"
            f" {sigma:.4g}: the reward model overflowed or got bad input; try it in float32"
        )
    return table, torch.cat(depths).reshape(batch, count).cpu() if depths else None


def flat_below(setup: Setup, sigma: float) -> float:
    """The spread of scores at sigma below which siblings count as alike; none is below -1."""
    if not setup.search.skip_below:
        return -1.0
    return setup.search.skip_below * calibrated(setup.score.calibration, sigma)[1]


class _Stages:
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


class _Kept:
    """The best candidates of every row so far: states (B, P, C, H, W) and what they are ranked by (B, P)."""

    def __init__(self, states: Tensor) -> None:
        shape = states.shape[:2]
        self.states = states
        self.keys = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.depth = torch.full(shape, -1)
        self.place = torch.full(shape, -1)

    def offer(
        self, rows: list[int], keys: Tensor, depth: Tensor | None, places: list[int], drawn: Callable
    ) -> None:
        """Candidates (b, m) of those places enter; drawn(columns (b,)) -> their states (b, C, H, W)."""
        index, keep = torch.tensor(rows), self.keys.shape[1]
        new_depth = torch.zeros(keys.shape, dtype=torch.long) if depth is None else depth
        all_keys = torch.cat([self.keys[index], keys.double()], dim=1)
        all_depth = torch.cat([self.depth[index], new_depth], dim=1)
        all_places = torch.cat([self.place[index], torch.tensor(places).expand_as(new_depth)], dim=1)
        # Equal scores go by place, however the candidates were split into calls.
        by_place = all_places.argsort(dim=1)
        best = best_places(all_keys.gather(1, by_place), all_depth.gather(1, by_place), keep)
        order = by_place.gather(1, best)
        self.keys[index], self.depth[index] = all_keys.gather(1, order), all_depth.gather(1, order)
        self.place[index] = all_places.gather(1, order)
        self._move(index, order, drawn)

    def _move(self, index: Tensor, order: Tensor, drawn: Callable) -> None:
        keep = self.keys.shape[1]
        on_device = index.to(self.states.device)
        before = self.states[on_device] if keep > 1 else None
        for slot in range(keep):
            is_new = order[:, slot] >= keep
            if before is not None and bool((~is_new).any()):
                old = order[:, slot].clamp(max=keep - 1).to(on_device)
                self.states[on_device, slot] = before[torch.arange(len(index), device=on_device.device), old]
            if bool(is_new.any()):
                states = drawn((order[:, slot] - keep).clamp_min(0))
                chosen = is_new.nonzero().flatten().to(on_device.device)
                self.states[on_device[chosen], slot] = states[chosen]


def one_branch(setup: Setup, x: Tensor, velocity: Tensor, at: Step) -> Tensor:
    """Branch 0 of every item, which nothing competes with."""
    every = list(range(len(x)))
    states = draw(setup, x, velocity, at, every, [0], torch.float32).scored[:, 0]
    return _with_kept_region(setup, states, every, x, at.sigma_next)


def best_path(setup: Setup, paths: list[Tensor], sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best of every item's P paths at sigma: (B, C, H, W), its number (B,) and all scores (B, P)."""
    states = torch.stack(paths, dim=1)
    scores, _ = score_rows(setup, states.to(setup.dtype), sigma, list(range(len(states))))
    best = best_places(scores, None, 1).flatten()
    rows = torch.arange(len(states), device=states.device)
    return states[rows, best.to(states.device)], best, scores


class Race:
    """One step's race: `run` it for the rows that branch, then read `paths` and what it noted of each row.

    scores, depth: lists for each batch row, empty where nothing was scored. flat: rows whose siblings were
    too alike. scored: candidates by the depth they were scored to, "full" for a scorer without depths.
    """

    def __init__(
        self,
        setup: Setup,
        paths: list[Tensor],
        velocities: list[Tensor],
        at: Step,
        num_branches: int,
        resting: Callable[[], list[Tensor]],
    ) -> None:
        """paths, velocities: states (B, C, H, W) at at.sigma. resting: the paths after an Euler step, asked
        for when some rows do not race.
        """
        self.setup, self.before, self.velocities = setup, paths, velocities
        self.at, self.num_branches, self.resting = at, num_branches, resting
        self.keep = min(setup.search.paths, num_branches * len(paths))
        self._streams = [path * PATH_STREAMS for path in range(len(paths))]
        self.scores: list[list[float]] = [[] for _ in paths[0]]
        self.depth: list[list[int]] = [[] for _ in paths[0]]
        self.flat: set[int] = set()
        self.scored: Counter[str] = Counter()

    @property
    def paths(self) -> list[Tensor]:
        """The states that continue, best first."""
        return list(self.kept.states.unbind(1))

    def run(self, rows: list[int]) -> None:
        """Draws and scores until every row has one that is good enough, or all its candidates."""
        others = self.before if len(rows) == len(self.scores) else self.resting()
        self.kept = _Kept(torch.stack([others[slot % len(others)] for slot in range(self.keep)], dim=1))
        sigma_next, search = float(self.at.sigma_next), self.setup.search
        in_rounds = rounds(self.num_branches, self._round_size())
        stages = None
        if self.setup.staged:
            stages = _Stages(self.setup, sigma_next, self.keep, whole=len(in_rounds) > 1)
        enough, floor = math.inf, flat_below(self.setup, sigma_next)
        if search.good_enough is not None:
            enough = good_enough_score(self.setup.score.calibration, sigma_next, search.good_enough)
        for in_round in in_rounds:
            valid = range(in_round.start, min(in_round.stop, self.num_branches))
            self._make_room(rows, len(valid) * len(self.before))
            for branches in self._calls(in_round):
                self._enter(rows, branches, valid, stages)
            self.flat.update(row for row in rows if self._spread(row) < floor)
            rows = [row for row in rows if row not in self.flat and max(self._deepest(row)) <= enough]
            if not rows:
                return

    def _round_size(self) -> int:
        """Branches a path draws between two looks at the scores; whatever the chunk size."""
        search, paths = self.setup.search, len(self.before)
        size = search.round_size if search.good_enough is not None else self.num_branches
        if self.setup.staged:
            size = min(size, max(1, DEFAULT_CHUNK // paths))
        return max(size, math.ceil(self.keep / paths))

    def _calls(self, in_round: range) -> list[range]:
        """The parts of a round that are scored together. Those of one step have one length, so some may draw
        beyond num_branches; not so where depths compare siblings, which must be all there and no others.
        """
        if self.setup.staged:
            return [range(in_round.start, min(in_round.stop, self.num_branches))]
        size = max(1, (self.setup.chunk_size or DEFAULT_CHUNK) // len(self.before))
        parts = [
            range(in_round.start + part.start, in_round.start + part.stop)
            for part in rounds(len(in_round), size)
        ]
        return [part for part in parts if part.start < self.num_branches]

    def _enter(self, rows: list[int], branches: range, valid: range, stages: _Stages | None) -> None:
        """Draws and scores some branches of some rows, and keeps the best of the valid ones."""
        drawn = [
            draw(self.setup, x, velocity, self.at, rows, [first + j for j in branches], self.setup.dtype)
            for x, velocity, first in zip(self.before, self.velocities, self._streams, strict=True)
        ]
        candidates = torch.cat([c.scored for c in drawn], dim=1) if len(drawn) > 1 else drawn[0].scored
        if self.setup.reimpose is not None:
            masked = [self._masked(c, rows) for c in candidates.unbind(1)]
            candidates = torch.stack(masked, dim=1)
        scores, depth = score_rows(self.setup, candidates, float(self.at.sigma_next), rows, stages)
        # What lies beyond the valid ones only fills the call's shape.
        real = [j for j in branches if j in valid]
        columns = torch.arange(scores.shape[1]).reshape(len(drawn), -1)[:, : len(real)].flatten()
        scores, depth = scores[:, columns], None if depth is None else depth[:, columns]
        numbers = [first + j for first in self._streams for j in real]

        def states(column: Tensor) -> Tensor:
            return self._masked(_states(drawn, torch.tensor(numbers)[column]), rows)

        begin = len(self.scores[rows[0]]) - len(valid) * len(drawn)
        places = [begin + p * len(valid) + j - valid.start for p in range(len(drawn)) for j in real]
        self.kept.offer(rows, self._keys(scores, rows, numbers), depth, places, states)
        self._note(rows, places, scores, depth)

    def _masked(self, x: Tensor, rows: list[int]) -> Tensor:
        return _with_kept_region(self.setup, x, rows, self.before[0], self.at.sigma_next)

    def _keys(self, scores: Tensor, rows: list[int], numbers: list[int]) -> Tensor:
        """What candidates are ranked by: their scores, or the softmax's draw."""
        search = self.setup.search
        if search.choice == "greedy":
            return scores
        items = [self.setup.item_ids[row] for row in rows]
        return scores / search.temperature + gumbel(self.setup.seed, self.at.number, items, numbers)

    def _make_room(self, rows: list[int], count: int) -> None:
        """For a round's scores, path after path."""
        for row in rows:
            self.scores[row] += [math.nan] * count
            self.depth[row] += [0] * count if self.setup.staged else []

    def _note(self, rows: list[int], places: list[int], scores: Tensor, depth: Tensor | None) -> None:
        for i, row in enumerate(rows):
            for place, score in zip(places, scores[i].tolist(), strict=True):
                self.scores[row][place] = score
            for place, blocks in zip(places, [] if depth is None else depth[i].tolist(), strict=False):
                self.depth[row][place] = blocks
        if depth is None:
            self.scored["full"] += scores.numel()
        else:
            self.scored.update(str(blocks) for blocks in depth.flatten().tolist())

    def _deepest(self, row: int) -> list[float]:
        """Those of a row's scores that compare."""
        scores, depth = self.scores[row], self.depth[row]
        return [s for s, d in zip(scores, depth, strict=True) if d == max(depth)] if depth else scores

    def _spread(self, row: int) -> float:
        """Best minus worst of a row's siblings; infinite where there is one, or some were left behind."""
        scores = self._deepest(row)
        return max(scores) - min(scores) if 1 < len(scores) == len(self.scores[row]) else math.inf


def _states(drawn: list[Candidates], branch: Tensor) -> Tensor:
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
