"""Every protocol on cases small enough to be worked out by hand, ties included."""

import itertools
import math

import numpy as np
import pytest

from training.evaluation import protocols


def margin(difference):
    """The score margin at which a softmax over two scores gives p_0 - p_1 = difference."""
    return math.log((1 + difference) / (1 - difference))


def test_hpdv3_counts_a_strictly_higher_score_and_nothing_else():
    # Right, wrong, an exact tie (wrong), right.
    credits = protocols.hpdv3([2.0, 0.0, 1.0, -3.0], [1.0, 5.0, 1.0, -3.5], ["a", "b", "a", "c"])
    assert credits.accuracy == 0.5
    assert credits.right.tolist() == [1, 0, 1]
    assert credits.counted.tolist() == [2, 1, 1]


def test_imagereward_averages_pairs_not_prompts():
    # First prompt, ranks 1 < 2 = 2 < 4 (lower is better): 5 untied pairs, of which
    #   (A,B) 3 > 1 right, (A,C) 3 > 3 no: wrong, (A,D) right, (B,D) 1 > 1 no: wrong, (C,D) right.  3 of 5
    # Second prompt: one pair, wrong.                                                             0 of 1
    # Third: all tied, nothing to count.
    credits = protocols.imagereward(
        [[3.0, 1.0, 3.0, 1.0], [0.0, 1.0], [5.0, 6.0]], [[1, 2, 2, 4], [1, 2], [3, 3]]
    )
    assert credits.accuracy == 3 / 6
    assert credits.right.tolist() == [3, 0]
    assert credits.counted.tolist() == [5, 1]
    assert credits.skipped == 2


def test_hpdv2_averages_prompts():
    # Ranks 1, 2, 3, scores in order: no inversion, 1.      Reversed: 3 of 3 inversions, 0.
    # Scores 2, 3, 1: only the first two are turned, 1 - 1/3.
    scores, ranks = [[9.0, 8.0, 7.0], [7.0, 8.0, 9.0], [2.0, 3.0, 1.0]], [[1, 2, 3]] * 3
    credits = protocols.hpdv2(scores, ranks)
    assert credits.right.tolist() == [1, 0, pytest.approx(2 / 3)]
    assert credits.accuracy == pytest.approx((1 + 0 + 2 / 3) / 3)
    # Prompts weigh the same whatever their number of pictures.
    credits = protocols.hpdv2([[1.0, 2.0], [4.0, 3.0, 2.0, 1.0]], [[1, 2], [1, 2, 3, 4]])
    assert credits.accuracy == 0.5


def test_hpdv2_ties():
    # Ranks tie: never an inversion, whichever way or not at all the scores go.
    for scores in ([1.0, 2.0], [2.0, 1.0], [1.0, 1.0]):
        assert protocols.hpdv2([scores], [[1, 1]]).accuracy == 1
    # Ranks 1, 2, 2 and scores 1, 3, 0: one inversion (first, second) of 3 pairs.
    assert protocols.hpdv2([[1.0, 3.0, 0.0]], [[1, 2, 2]]).accuracy == pytest.approx(2 / 3)
    # Scores tie where ranks do not: half an inversion, so a scorer that says nothing is at chance.
    assert protocols.hpdv2([[1.0, 1.0]], [[1, 2]]).accuracy == 0.5
    assert protocols.hpdv2([[0.0] * 5], [[3, 1, 4, 2, 5]]).accuracy == 0.5
    # A single picture has no pairs.
    credits = protocols.hpdv2([[1.0], [2.0, 1.0]], [[1], [1, 2]])
    assert (credits.accuracy, credits.skipped) == (1, 1)


def test_hpdv2_scores_that_tie_give_the_mean_over_the_ways_to_break_them():
    ranks = [2, 1, 3, 3]
    broken = [
        protocols.hpdv2([[*np.add(5.0, nudge), 1.0]], [ranks]).accuracy
        for nudge in itertools.permutations([0.1, 0.2, 0.3])
    ]
    assert protocols.hpdv2([[5.0, 5.0, 5.0, 1.0]], [ranks]).accuracy == pytest.approx(np.mean(broken))


def test_pickscore_credit_table():
    # Rows: p_0 - p_1 = 0.5, -0.5, 0.05; columns: label first, second, tie; threshold 0.1.
    scores = np.repeat([margin(0.5), -margin(0.5), margin(0.05)], 3)
    labels = np.tile([1.0, 0.0, 0.5], 3)
    credit = protocols.pickscore_credit(scores, np.zeros(9), labels, 0.1)
    assert credit.reshape(3, 3).tolist() == [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]
    # At threshold 0 only an exact tie is one; at 1 everything is.
    assert protocols.pickscore_credit([1e-12, 0.0], [0.0, 0.0], [1, 1], 0.0).tolist() == [1, 0.5]
    assert protocols.pickscore_credit([1e4, -3.0], [0.0, 0.0], [1, 0.5], 1.0).tolist() == [0.5, 1]
    # A tie is predicted on the threshold itself.
    on = math.tanh(1.0)
    assert protocols.pickscore_credit([2.0], [0.0], [0.5], on).tolist() == [1]
    assert protocols.pickscore_credit([2.0], [0.0], [0.5], on - 1e-9).tolist() == [0.5]


def test_pickscore_softmax_does_not_depend_on_where_the_scores_lie():
    low = protocols.pickscore_credit([margin(0.25)], [0.0], [0.5], 0.2)
    high = protocols.pickscore_credit([margin(0.25) + 700], [700.0], [0.5], 0.2)
    assert low.tolist() == high.tolist() == [0.5]


def test_threshold_is_the_first_best_of_the_tenths():
    # |p_0 - p_1| is 0.15 for a tie, 0.45 for a right choice, 0.65 for a right choice, 0.35 for a wrong one.
    #   threshold 0, 0.1       0.5 + 1 + 1 + 0           = 2.5
    #   0.2, 0.3               1 + 1 + 1 + 0             = 3
    #   0.4                    1 + 1 + 1 + 0.5           = 3.5
    #   0.5, 0.6               1 + 0.5 + 1 + 0.5         = 3
    #   0.7 and above          1 + 0.5 + 0.5 + 0.5       = 2.5
    scores, labels = [margin(0.15), margin(0.45), -margin(0.65), margin(0.35)], [0.5, 1, 0, 0]
    zeros = [0.0] * 4
    assert protocols.best_threshold(scores, zeros, labels) == 0.4
    # Without the wrong one, 0.2 to 0.4 are equally good: the first is taken.
    assert protocols.best_threshold(scores[:3], zeros[:3], labels[:3]) == 0.2
    official = protocols.pickscore_official(scores, zeros, labels, 0.4, "abcd")
    assert official.accuracy == 3.5 / 4
    assert official.skipped == 0


def test_pickscore_without_ties_leaves_label_ties_out():
    # Right, a label tie (left out), wrong, an exact tie of scores (one half).
    credits = protocols.pickscore_untied([2.0, 9.0, 1.0, 4.0], [1.0, 0.0, 0.0, 4.0], [1, 0.5, 0, 1], "aabb")
    assert credits.accuracy == 1.5 / 3
    assert credits.skipped == 1
    assert credits.counted.tolist() == [1, 2]


def test_interval_of_every_resample_counted_out():
    # Three prompts with credits 0, 0 and 1 of one pair each: a resample's accuracy is Binomial(3, 1/3) / 3:
    # P(0) = 8/27 > 2.5 % and P(1) = 1/27 > 2.5 %.
    credits = protocols.Credits(right=np.array([0.0, 0.0, 1.0]), counted=np.ones(3))
    assert protocols.bootstrap_interval(credits, resamples=20_000) == (0.0, 1.0)
    # The middle half of it: P(0) = 0.296, P(<= 1/3) = 0.741 and P(<= 2/3) = 0.963.
    assert protocols.bootstrap_interval(credits, resamples=20_000, share=0.5) == pytest.approx((0.0, 2 / 3))


def test_interval_resamples_prompts():
    # A hundred pairs of one prompt are one draw, so nothing varies; of a hundred prompts they do.
    credit = np.tile([0.0, 1.0], 50)
    one = protocols.by_prompt(credit, ["same"] * 100)
    assert protocols.bootstrap_interval(one) == (0.5, 0.5)
    many = protocols.by_prompt(credit, list(range(100)))
    low, high = protocols.bootstrap_interval(many)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)


def test_interval_is_seeded_and_blind_to_chunks(monkeypatch):
    values = np.random.default_rng(5).random(50)
    credits = protocols.Credits(right=values, counted=np.ones(50))
    whole = protocols.bootstrap_interval(credits)
    assert protocols.bootstrap_interval(credits) == whole
    assert protocols.bootstrap_interval(credits, seed=1) != whole
    monkeypatch.setattr(protocols, "_CHUNK", 333 * 50)
    assert protocols.bootstrap_interval(credits) == whole


def test_ratio_of_sums_keeps_prompts_whole():
    # Prompts of 1 and 3 pairs: a draw of (first, second) is (1 + 0) / (1 + 3), never a mean of means.
    credits = protocols.Credits(right=np.array([1.0, 0.0]), counted=np.array([1.0, 3.0]))
    assert credits.accuracy == 0.25
    middle = protocols.bootstrap_interval(credits, resamples=4000, share=0.2)
    assert middle == (0.25, 0.25)


def test_what_cannot_be_counted():
    with pytest.raises(protocols.ProtocolError, match="1 of 2 scores are NaN or infinite"):
        protocols.hpdv3([1.0, math.nan], [0.0, 0.0], "ab")
    with pytest.raises(protocols.ProtocolError, match="no pair is left"):
        protocols.imagereward([[1.0, 2.0]], [[1, 1]])
    with pytest.raises(protocols.ProtocolError, match="no pair is left"):
        protocols.hpdv3([], [], "")
    with pytest.raises(protocols.ProtocolError, match="labels must be"):
        protocols.pickscore_credit([1.0], [0.0], [0.7], 0.1)
    with pytest.raises(protocols.ProtocolError, match="2 pairs have 1 prompts"):
        protocols.hpdv3([1.0, 2.0], [0.0, 0.0], "a")
    with pytest.raises(protocols.ProtocolError, match="wanted one each"):
        protocols.hpdv2([[1.0, 2.0]], [[1, 2, 3]])
