"""Bradley-Terry, accuracy and calibration, against values worked out by hand."""

import math

import pytest
import torch

from drm.preference import (
    accuracy_by_sigma,
    bradley_terry_loss,
    calibration,
    preference_accuracy,
    standard_score,
)


def test_loss_by_hand():
    loss = bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert bradley_terry_loss(torch.tensor([3.0]), torch.tensor([3.0])).item() == pytest.approx(math.log(2))


def test_loss_stays_finite_and_pulls_apart():
    win = torch.tensor([-500.0, 0.0], requires_grad=True)
    loss = bradley_terry_loss(win, torch.tensor([500.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx((1000 + math.log(2)) / 2)
    torch.testing.assert_close(win.grad, torch.tensor([-0.5, -0.25]))


def test_accuracy_counts_ties_as_half():
    win, lose = torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert preference_accuracy(win, lose) == 2.5 / 4
    with pytest.raises(ValueError, match="no pairs"):
        preference_accuracy(win[:0], lose[:0])


def test_accuracy_by_sigma_quarter():
    win, lose = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(4) + 0.5
    sigma = torch.tensor([0.0, 0.24, 0.25, 1.0])
    assert accuracy_by_sigma(win, lose, sigma) == [0.5, 1.0, None, 1.0]


def test_calibration():
    scores, sigma = torch.tensor([1.0, 3.0, 10.0, 14.0, 99.0]), torch.tensor([0.1, 0.2, 0.8, 0.9, 0.4])
    table = calibration(scores, sigma, num_bins=4)
    assert table == {"sigma": [0.125, 0.875], "mean": [2.0, 12.0], "std": [1.0, 2.0]}
    assert standard_score(torch.tensor([4.0]), 0.0, table).item() == 2.0
    assert standard_score(torch.tensor([14.0]), 1.0, table).item() == 1.0
    # Half-way between the centres: mean 7, std 1.5.
    assert standard_score(torch.tensor([10.0]), 0.5, table).item() == 2.0
    with pytest.raises(ValueError, match="score more"):
        calibration(scores[:1], sigma[:1])
