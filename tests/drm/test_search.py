"""The small decisions of a search, against values worked out by hand."""

import math

import pytest
import torch

from drm.branching import philox4x32, uint_to_uniform
from drm.search import (
    PRESETS,
    Search,
    best_of_n,
    best_places,
    branching_plan,
    calibrated,
    fit_to_scorer,
    good_enough_score,
    gumbel,
    rounds,
    spread,
    survivors,
)

TABLE = {"sigma": [0.2, 0.6], "mean": [1.0, 3.0], "std": [2.0, 4.0]}
# Ten steps, sigma 1.0, 0.9 ... 0.1, 0.
EVEN = [1 - i / 10 for i in range(10)] + [0.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4] * 9 + [0]),
        ({"end": 0.5}, [4] * 5 + [0] * 5),
        ({"start": 0.2, "end": 0.5}, [0, 0, 4, 4, 4, 0, 0, 0, 0, 0]),
        ({"stride": 3}, [4, 0, 0, 4, 0, 0, 4, 0, 0, 0]),
        ({"start": 0.1, "stride": 3}, [0, 4, 0, 0, 4, 0, 0, 4, 0, 0]),
        ({"sigma_window": (0.9, 0.7)}, [0, 4, 4, 4, 0, 0, 0, 0, 0, 0]),
        ({"sigma_window": (1.0, 0.95)}, [4] + [0] * 9),
        # 4, 3.5, 3, 2.5, 2 with Python's rounding of halves to even numbers.
        ({"end": 0.5, "last_branches": 2}, [4, 4, 3, 2, 2, 0, 0, 0, 0, 0]),
        ({"end": 0.4, "last_branches": 1}, [4, 3, 2, 0, 0, 0, 0, 0, 0, 0]),
        ({"end": 0.4, "last_branches": 7}, [4, 5, 6, 7, 0, 0, 0, 0, 0, 0]),
        ({"end": 0.1, "last_branches": 2}, [4] + [0] * 9),
        ({"start": 0.5, "end": 0.5}, [0] * 10),
        ({"num_branches": 1}, [1] * 9 + [0]),
    ],
)
def test_branches_of_every_step(settings, expected):
    window = {name: settings.pop(name, default) for name, default in (("start", 0.0), ("end", 1.0))}
    count = settings.pop("num_branches", 4)
    assert branching_plan(EVEN, count, **window, search=Search(**settings)) == expected


def test_a_bound_of_the_sigma_window_holds_its_float32_self():
    sigmas = torch.tensor(EVEN).tolist()
    assert sigmas[1] != 0.9
    assert branching_plan(sigmas, 4, 0, 1, Search(sigma_window=(0.9, 0.9)))[:3] == [0, 4, 0]


def test_calibration_lies_on_straight_lines_between_its_bins():
    assert calibrated(TABLE, 0.4) == (pytest.approx(2.0), pytest.approx(3.0))
    assert calibrated(TABLE, 0.05) == (1.0, 2.0)
    assert calibrated(TABLE, 0.95) == (3.0, 4.0)


def test_good_enough_is_a_normal_quantile_at_that_sigma():
    assert good_enough_score(TABLE, 0.2, 0.5) == pytest.approx(1.0)
    # Phi(1.2816) = 0.9
    assert good_enough_score(TABLE, 0.2, 0.9) == pytest.approx(1 + 1.2815516 * 2)
    assert good_enough_score(TABLE, 0.6, 0.1) == pytest.approx(3 - 1.2815516 * 4)


def test_spread_is_best_minus_worst():
    assert spread(torch.tensor([[1.0, 4.0, 2.0], [5.0, 5.0, 5.0]])).tolist() == [3, 0]


def test_survivors_are_within_the_lead_of_the_keep_th_best():
    scores = torch.tensor([[5.0, 1.0, 4.5, 3.9], [5.0, 1.0, 2.0, 3.0]])
    everyone = torch.ones(2, 4, dtype=torch.bool)
    # Row 0: 5 leads, 4.5 and 3.9 lie within 1.2. Row 1 is decided: nobody needs another look.
    assert survivors(scores, everyone, 1.2, 1, False).tolist() == [[True, False, True, True], [False] * 4]
    # The same where the leader's score is needed at full depth.
    assert survivors(scores, everyone, 1.2, 1, True).tolist() == [
        [True, False, True, True],
        [True, False, False, False],
    ]
    # Two are kept: the bars are 4.5 - 0.7 and 3 - 0.7. Row 1's two are clear of the third.
    assert survivors(scores, everyone, 0.7, 2, False).tolist() == [[True, False, True, True], [False] * 4]
    # Without a lead nobody is out; the dead stay out and do not set the bar.
    alive = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert torch.equal(survivors(scores, alive, None, 1, False), alive)
    assert survivors(scores, alive, 0.7, 1, False)[0].tolist() == [False, False, True, True]


def test_the_deepest_scores_decide_and_the_first_of_equals_wins():
    keys = torch.tensor([[9.0, 2.0, 3.0, 3.0]])
    assert best_places(keys, None, 1).tolist() == [[0]]
    assert best_places(keys, torch.tensor([[1, 3, 3, 3]]), 2).tolist() == [[2, 3]]
    assert best_places(keys, torch.tensor([[1, 3, 3, 3]]), 4).tolist() == [[2, 3, 1, 0]]
    assert best_places(torch.zeros(1, 40), None, 1).tolist() == [[0]]


def test_rounds_have_one_length():
    assert rounds(5, 2) == [range(2), range(2, 4), range(4, 6)]
    assert rounds(7, 3) == [range(3), range(3, 6), range(6, 9)]
    assert rounds(4, 9) == [range(4)]


def test_gumbel_is_its_definition_on_a_philox_stream():
    got = gumbel(7 + 2**40, 3, [5], [2])
    words = philox4x32(*(torch.tensor(v) for v in (0xFFFFFFFF, 3, 5, 2)), 7, 2**8)
    uniform = uint_to_uniform(words[0]).double()
    assert got.item() == pytest.approx(-math.log(-math.log(uniform.item())))


def test_gumbel_belongs_to_its_branch():
    whole = gumbel(1, 2, [3, 9], range(6))
    assert whole.shape == (2, 6)
    assert torch.equal(whole[1:, 2:4], gumbel(1, 2, [9], [2, 3]))
    for other in (gumbel(2, 2, [3, 9], range(6)), gumbel(1, 3, [3, 9], range(6))):
        assert not (whole == other).any()


def test_gumbel_noise_draws_from_the_softmax():
    """20,000 draws among scores 0, 1, 2 at temperature 1: shares e^0 : e^1 : e^2, each within 0.015."""
    scores = torch.tensor([0.0, 1.0, 2.0])
    chosen = (scores + gumbel(0, 0, range(20_000), range(3))).argmax(dim=1)
    shares = chosen.bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, scores.softmax(0), atol=0.015, rtol=0)


def test_gumbel_moments():
    noise = gumbel(3, 1, range(300), range(300)).flatten()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)


def test_best_of_n_takes_each_items_best():
    runs = [torch.full((2, 1, 1, 1), float(i)) for i in range(3)]
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([4.0, 2.0]), torch.tensor([3.0, 5.0])]
    best, table, which = best_of_n(lambda i: runs[i], lambda latents: scores[int(latents[0])], 3)
    assert which.tolist() == [1, 0]
    assert best.flatten().tolist() == [1, 0]
    assert torch.equal(table, torch.stack(scores))
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n(lambda i: runs[i], lambda latents: scores[0], 0)


def test_a_scorer_without_calibration_leaves_controls_out():
    class Calibrated:
        calibration = TABLE

    search = Search(good_enough=0.9, skip_below=0.1, stride=2)
    assert fit_to_scorer(search, Calibrated()) == (search, [])
    fitted, dropped = fit_to_scorer(search, lambda *args: None)
    assert fitted == Search(stride=2)
    assert dropped == ["good_enough", "skip_below"]
    assert fit_to_scorer(Search(), None) == (Search(), [])


def test_presets_are_there_and_survive_json():
    assert list(PRESETS) == ["fast", "balanced", "thorough"]
    for preset in PRESETS.values():
        assert sum(branching_plan(EVEN, preset.num_branches, preset.start, preset.end, preset.search)) > 0
    assert Search(sigma_window=(0.9, 0.5)).as_dict()["sigma_window"] == [0.9, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "best"}, "choice is 'best'"),
        ({"choice": "softmax"}, "temperature is 0.0: softmax needs one above 0"),
        ({"choice": "softmax", "temperature": math.nan}, "softmax needs one above 0"),
        ({"temperature": 0.5}, "set choice to 'softmax'"),
        ({"paths": 0}, "paths is 0"),
        ({"beam_end": 1.5}, "beam_end is 1.5"),
        ({"stride": 0}, "stride is 0"),
        ({"last_branches": 0}, "last_branches is 0"),
        ({"sigma_window": (0.2, 0.8)}, r"sigma_window is \(0.2, 0.8\)"),
        ({"sigma_window": (math.nan, 0.1)}, "sigma_window is"),
        ({"good_enough": 1.0}, "good_enough is 1.0"),
        ({"round_size": 1}, "round_size is 1"),
        ({"skip_below": -1.0}, "skip_below is -1.0"),
        ({"skip_below": math.inf}, "skip_below is inf"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Search(**settings)
