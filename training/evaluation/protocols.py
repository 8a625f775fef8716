"""How preference accuracy is counted on the four public test sets, as pure functions on scores.

HPDv3        share of pairs whose preferred picture scores strictly higher
ImageReward  the same over all untied pairs of the 466 prompts together: sum of right pairs / sum of pairs
HPDv2        mean over prompts of 1 - inversions / (n (n - 1) / 2)
PickScore    p = softmax(s_0, s_1); a tie is predicted when |p_0 - p_1| <= threshold; 1 for a match, 0.5 when
             exactly one side is a tie, else 0. Official: on test_unique, with the threshold of 0, 0.1, ..., 1
             that does best on validation_unique (the first of equals). The two other forms leave label ties
             out and use threshold 0.

Everywhere a higher score and a lower rank are better. A scorer that gives two pictures exactly the same score
has not chosen: that is wrong in HPDv3 and ImageReward, worth one half in PickScore (by the rule above), and
half an inversion in HPDv2, whose published code breaks such ties by an arbitrary order, so half of them right
on average. A tie of ranks is no inversion, whatever the scores.

Intervals are 95 % bootstrap percentiles that resample prompts, not pairs: pairs of one prompt are not
independent, and a prompt is what ImageReward and HPDv2 collect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLDS = tuple(tenth / 10 for tenth in range(11))
_CHUNK = 4_000_000  # resampled numbers held at once

Array = NDArray[np.float64]


class ProtocolError(ValueError):
    """The scores cannot be counted; the message says which rule they break."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credits:
    """What each prompt adds to an accuracy: sum(right) / sum(counted), both (P,). skipped: pairs or prompts
    that the protocol leaves out (label ties, a single picture).
    """

    right: Array
    counted: Array
    skipped: int = 0

    @property
    def accuracy(self) -> float:
        """In 0 to 1."""
        return float(self.right.sum() / self.counted.sum())


def pair_credit(chosen: ArrayLike, rejected: ArrayLike) -> Array:
    """1 where chosen scores strictly above rejected, else 0: (N,). HPDv3's and ImageReward's rule."""
    chosen, rejected = _scores(chosen), _scores(rejected)
    return (chosen > rejected).astype(np.float64)


def by_prompt(credit: ArrayLike, prompts: Sequence[Hashable], skipped: int = 0) -> Credits:
    """Credits of pairs (N,) collected by the prompt of each."""
    credit = np.asarray(credit, dtype=np.float64)
    if len(credit) != len(prompts):
        raise ProtocolError(f"{len(credit)} pairs have {len(prompts)} prompts: wanted one each")
    places: dict[Hashable, int] = {}
    group = np.array([places.setdefault(prompt, len(places)) for prompt in prompts], dtype=np.int64)
    return _credits(
        np.bincount(group, weights=credit, minlength=len(places)),
        np.bincount(group, minlength=len(places)).astype(np.float64),
        skipped,
    )


def hpdv3(chosen: ArrayLike, rejected: ArrayLike, prompts: Sequence[Hashable]) -> Credits:
    """Pairs (N,) with the preferred picture's scores first."""
    return by_prompt(pair_credit(chosen, rejected), prompts)


def imagereward(scores: Sequence[ArrayLike], ranks: Sequence[ArrayLike]) -> Credits:
    """Every untied pair of each prompt's pictures; scores and ranks: one (n,) for each prompt."""
    right, counted, skipped = [], [], 0
    for score, rank in _prompts(scores, ranks):
        better, worse = np.nonzero(rank[:, None] < rank[None, :])
        right.append(pair_credit(score[better], score[worse]).sum())
        counted.append(len(better))
        skipped += len(rank) * (len(rank) - 1) // 2 - len(better)
    return _credits(np.array(right), np.array(counted, dtype=np.float64), skipped)


def hpdv2(scores: Sequence[ArrayLike], ranks: Sequence[ArrayLike]) -> Credits:
    """1 - inversions / (n (n - 1) / 2) of each prompt; one with a single picture is skipped."""
    right, skipped = [], 0
    for score, rank in _prompts(scores, ranks):
        pairs = len(rank) * (len(rank) - 1) / 2
        if pairs == 0:
            skipped += 1
            continue
        better, worse = np.nonzero(rank[:, None] < rank[None, :])
        inversions = (score[better] < score[worse]).sum() + 0.5 * (score[better] == score[worse]).sum()
        right.append(1 - inversions / pairs)
    return _credits(np.array(right), np.ones(len(right)), skipped)


def pickscore_credit(score_0: ArrayLike, score_1: ArrayLike, label_0: ArrayLike, threshold: float) -> Array:
    """Credits (N,) of pairs; label_0: 1 when picture 0 was preferred, 0 when picture 1, 0.5 for a tie."""
    score_0, score_1, label_0 = _scores(score_0), _scores(score_1), _scores(label_0)
    if not np.isin(label_0, (0, 0.5, 1)).all():
        raise ProtocolError("labels must be 1 (first preferred), 0 (second) or 0.5 (tie)")
    margin = score_0 - score_1
    # p_0 - p_1 of a softmax over two scores.
    predicted = np.where(np.abs(np.tanh(margin / 2)) <= threshold, 0.5, (margin > 0).astype(np.float64))
    return 1 - np.abs(predicted - label_0)


def best_threshold(score_0: ArrayLike, score_1: ArrayLike, label_0: ArrayLike) -> float:
    """The first of THRESHOLDS with the highest mean credit, to be asked of validation_unique."""
    means = [pickscore_credit(score_0, score_1, label_0, threshold).mean() for threshold in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(means))]


def pickscore_official(
    score_0: ArrayLike,
    score_1: ArrayLike,
    label_0: ArrayLike,
    threshold: float,
    prompts: Sequence[Hashable],
) -> Credits:
    """All pairs of test_unique, ties included, with a threshold from `best_threshold`."""
    return by_prompt(pickscore_credit(score_0, score_1, label_0, threshold), prompts)


def pickscore_untied(
    score_0: ArrayLike, score_1: ArrayLike, label_0: ArrayLike, prompts: Sequence[Hashable]
) -> Credits:
    """Pairs whose label is no tie; the threshold is 0."""
    label_0 = np.asarray(label_0, dtype=np.float64)
    kept = np.flatnonzero(label_0 != 0.5)
    credit = pickscore_credit(_scores(score_0)[kept], _scores(score_1)[kept], label_0[kept], 0.0)
    return by_prompt(credit, [prompts[index] for index in kept], skipped=len(label_0) - len(kept))


def bootstrap_interval(
    credits: Credits, *, resamples: int = 2000, seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """The middle `share` of accuracies of `resamples` draws of P prompts with replacement."""
    generator = np.random.default_rng(seed)
    num_prompts, found = len(credits.right), []
    rows = max(1, _CHUNK // num_prompts)
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, num_prompts, (min(rows, resamples - start), num_prompts))
        found.append(credits.right[drawn].sum(axis=1) / credits.counted[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _credits(right: Array, counted: Array, skipped: int) -> Credits:
    kept = counted > 0
    if not kept.any():
        raise ProtocolError("no pair is left to count: every label is a tie, or there are no rows")
    return Credits(right=right[kept], counted=counted[kept], skipped=skipped)


def _prompts(scores: Sequence[ArrayLike], ranks: Sequence[ArrayLike]) -> list[tuple[Array, Array]]:
    if len(scores) != len(ranks):
        raise ProtocolError(f"{len(scores)} prompts have scores and {len(ranks)} have ranks")
    found = [(_scores(score), _scores(rank)) for score, rank in zip(scores, ranks, strict=True)]
    for score, rank in found:
        if score.shape != rank.shape or score.ndim != 1:
            raise ProtocolError(f"a prompt has scores {score.shape} and ranks {rank.shape}: wanted one each")
    return found


def _scores(values: ArrayLike) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ProtocolError(
            f"{(~np.isfinite(values)).sum()} of {values.size} scores are NaN or infinite: they rank nothing"
        )
    return values
