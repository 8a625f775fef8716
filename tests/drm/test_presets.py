"""Which steps branch, what a preset stands for, and settings that make no sense."""

import math

import pytest

from drm.presets import PRESETS, Branching

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
        ({"start": 0.5, "end": 0.5}, [0] * 10),
        ({"num_branches": 1}, [1] * 9 + [0]),
        ({"num_branches": 1, "noise_level": 0.0}, [0] * 10),
    ],
)
def test_branches_of_every_step(settings, expected):
    assert Branching(**settings).plan(EVEN) == expected


def test_a_step_of_no_length_does_not_branch():
    assert Branching().plan([1.0, 1.0, 0.5, 0.5, 0.2, 0.0]) == [0, 4, 0, 4, 0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_the_place_of_k_window_and_choice(name):
    settings = Branching(
        preset=name, num_branches=9, start=0.9, end=0.1, choice="softmax", temperature=2.0, seed=5, kind="cps"
    )
    chosen = settings.chosen()
    assert (chosen.num_branches, chosen.choice, chosen.temperature) == (4, "greedy", 0.0)
    assert (chosen.seed, chosen.kind, chosen.preset) == (5, "cps", "custom")
    assert {key: getattr(chosen, key) for key in PRESETS[name]} == PRESETS[name]
    assert sum(chosen.plan(EVEN)) > 0
    assert Branching().chosen() == Branching()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "best"}, "choice is 'best'"),
        ({"choice": "softmax"}, "temperature is 0.0: softmax needs one above 0"),
        ({"choice": "softmax", "temperature": math.nan}, "softmax needs one above 0"),
        ({"temperature": 0.5}, "set choice to 'softmax'"),
        ({"stride": 0}, "stride is 0"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"preset": "best"}, "preset is 'best': choose one of custom, fast, balanced, thorough"),
        ({"start": math.nan}, "window is nan to 1.0"),
        ({"num_branches": 0}, "num_branches is 0"),
        ({"preset": "fast", "noise_level": 0.0}, "all 4 candidates"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Branching(**settings).chosen()
