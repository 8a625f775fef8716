"""One branching step: candidates of every kept path, scored as deep as it takes, the best continue.

    x'_pj = mean(x_p, velocity_p) + std * eps_pj       paths p, branches j; drawn in rounds when `good_enough`
    kept  = the P best x'_pj by score(x'_pj, sigma_next), for each batch item on its own

Scores come to the CPU once a round and every decision is made there, so that a GPU is waited for no oftener.
Shapes: b rows of the batch B, m candidates a row (path after path), P kept; states (C, H, W) float32.
"""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from .candidates import Setup, Stages, Step, draw, flat_below, score_rows, states_of, with_kept_region
from .search import PATH_STREAMS, best_places, good_enough_score, gumbel, rounds

DEFAULT_CHUNK = 16


class _Kept:
    """The best candidates of every row so far: states (B, P, C, H, W) and what they are ranked by (B, P)."""

    def __init__(self, batch: int, keep: int, states: Callable[[], Tensor]) -> None:
        """states: (B, P, C, H, W) for rows that are never offered anything, asked for when there are any."""
        self.keep, self.first_states = keep, states
        self.states: Tensor | None = None
        self.keys = torch.full((batch, keep), -torch.inf, dtype=torch.float64)
        self.depth, self.place = torch.full((2, batch, keep), -1)

    def offer(
        self, rows: list[int], keys: Tensor, depth: Tensor | None, places: Tensor, drawn: Callable
    ) -> None:
        """Candidates (b, m) of those places (m,) enter; drawn(columns (b,)) -> their states (b, C, H, W)."""
        places = places.expand_as(keys)
        if self.states is None and len(rows) == len(self.keys) and keys.shape[1] >= self.keep:
            order = best_places(keys, depth, self.keep)
            depth = torch.zeros_like(places) if depth is None else depth
            self.keys, self.depth = keys.double().gather(1, order), depth.gather(1, order)
            self.place = places.gather(1, order)
            self.states = torch.stack([drawn(column) for column in order.unbind(1)], dim=1)
            return
        if self.states is None:
            self.states = self.first_states()
        index, depth = torch.tensor(rows), torch.zeros_like(places) if depth is None else depth
        all_keys = torch.cat([self.keys[index], keys.double()], dim=1)
        all_depth = torch.cat([self.depth[index], depth], dim=1)
        all_places = torch.cat([self.place[index], places], dim=1)
        # Equal scores go by place, however the candidates were split into calls.
        by_place = all_places.argsort(dim=1)
        best = best_places(all_keys.gather(1, by_place), all_depth.gather(1, by_place), self.keep)
        order = by_place.gather(1, best)
        self.keys[index], self.depth[index] = all_keys.gather(1, order), all_depth.gather(1, order)
        self.place[index] = all_places.gather(1, order)
        self._move(index, order, drawn)

    def _move(self, index: Tensor, order: Tensor, drawn: Callable) -> None:
        """Puts the states where the order says: columns below keep were kept before, the others are new."""
        there = index.to(self.states.device)
        before = self.states[there]
        each = torch.arange(len(index), device=there.device)
        for slot, column in enumerate(order.unbind(1)):
            self.states[there, slot] = before[each, column.clamp(max=self.keep - 1).to(there.device)]
            new = (column >= self.keep).nonzero().flatten()
            if len(new):
                states = drawn((column - self.keep).clamp_min(0))
                new = new.to(there.device)
                self.states[there[new], slot] = states[new]


def one_branch(setup: Setup, x: Tensor, velocity: Tensor, at: Step) -> Tensor:
    """Branch 0 of every item, which nothing competes with."""
    every = list(range(len(x)))
    states = draw(setup, x, velocity, at, every, [0], torch.float32).scored[:, 0]
    return with_kept_region(setup, states, every, x, at.sigma_next)


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
        self.kept = _Kept(len(self.scores), self.keep, lambda: self._unraced(everyone))
        everyone = len(rows) == len(self.scores)
        sigma_next, search = float(self.at.sigma_next), self.setup.search
        in_rounds = rounds(self.num_branches, self._round_size())
        stages = None
        if self.setup.staged:
            stages = Stages(self.setup, sigma_next, self.keep, whole=len(in_rounds) > 1)
        enough, floor = math.inf, flat_below(self.setup, sigma_next)
        if search.good_enough is not None:
            enough = good_enough_score(self.setup.score.calibration, sigma_next, search.good_enough)
        for in_round in in_rounds:
            valid = range(in_round.start, min(in_round.stop, self.num_branches))
            self._make_room(rows, len(valid) * len(self.before))
            for branches in self._calls(in_round):
                self._enter(rows, branches, valid, stages)
            if floor > 0:
                self.flat.update(row for row in rows if self._spread(row) < floor)
            if in_round is not in_rounds[-1]:
                rows = [row for row in rows if row not in self.flat and max(self._deepest(row)) <= enough]
            if not rows:
                return

    def _unraced(self, everyone: bool) -> Tensor:
        """(B, P, C, H, W) for rows that rest; for the others it does not matter."""
        paths = self.before if everyone else self.resting()
        return torch.stack([paths[slot % len(paths)] for slot in range(self.keep)], dim=1)

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

    def _enter(self, rows: list[int], branches: range, valid: range, stages: Stages | None) -> None:
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
            return self._masked(states_of(drawn, torch.tensor(numbers)[column]), rows)

        begin = len(self.scores[rows[0]]) - len(valid) * len(drawn)
        places = [begin + p * len(valid) + j - valid.start for p in range(len(drawn)) for j in real]
        self.kept.offer(rows, self._keys(scores, rows, numbers), depth, torch.tensor(places), states)
        self._note(rows, places, scores, depth)

    def _masked(self, x: Tensor, rows: list[int]) -> Tensor:
        return with_kept_region(self.setup, x, rows, self.before[0], self.at.sigma_next)

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
