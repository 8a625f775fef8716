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
    thurstone_loss,
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


WIN, LOSE = torch.tensor([1.5, -0.25, 0.75], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.75]).double()
LABEL, WEIGHT = torch.tensor([1.0, 0.25, 0.5]).double(), torch.tensor([1.0, 2.0, 5.0]).double()


def test_loss_without_options_is_the_mean_of_logsigmoid_to_the_bit():
    win, lose = torch.randn(257, generator=torch.Generator().manual_seed(0)), torch.linspace(-3, 3, 257)
    plain = -torch.nn.functional.logsigmoid(win - lose).mean()
    assert torch.equal(bradley_terry_loss(win, lose), plain)
    assert torch.equal(bradley_terry_loss(win, lose, label=torch.ones(257)), plain)


def test_soft_labels_and_weights_by_hand():
    # Margins 1, -1.25 and 0.
    first = math.log(1 + math.exp(-1))
    second = 0.25 * math.log(1 + math.exp(1.25)) + 0.75 * math.log(1 + math.exp(-1.25))
    loss = bradley_terry_loss(WIN, LOSE, LABEL)
    assert loss.item() == pytest.approx((first + second + math.log(2)) / 3, rel=1e-12)
    loss = bradley_terry_loss(WIN, LOSE, LABEL, WEIGHT)
    assert loss.item() == pytest.approx((first + 2 * second + 5 * math.log(2)) / 8, rel=1e-12)
    # The other way round with the other label is the same statement.
    assert bradley_terry_loss(LOSE, WIN, 1 - LABEL).item() == pytest.approx(
        bradley_terry_loss(WIN, LOSE, LABEL).item(), rel=1e-12
    )


def test_thurstone_by_hand():
    # sigma 0: v = 0.05, so the margin 1 is 1 / sqrt(0.1) deviations; Phi(x) = (1 + erf(x / sqrt 2)) / 2.
    one = torch.tensor([1.0], dtype=torch.float64)
    chance = (1 + math.erf(1 / math.sqrt(0.1) / math.sqrt(2))) / 2
    assert thurstone_loss(one, 0 * one, 0.0).item() == pytest.approx(1 - math.sqrt(chance), rel=1e-9)
    # sigma 1: v = 2.05.
    noisy = (1 + math.erf(1 / math.sqrt(4.1) / math.sqrt(2))) / 2
    assert thurstone_loss(one, 0 * one, one).item() == pytest.approx(1 - math.sqrt(noisy), rel=1e-9)
    soft = 1 - math.sqrt(0.25 * noisy) - math.sqrt(0.75 * (1 - noisy))
    assert thurstone_loss(one, 0 * one, 1.0, 0.25 * one).item() == pytest.approx(soft, rel=1e-9)
    # A tie at margin 0 is met exactly.
    assert thurstone_loss(one, one, 0.3, 0.5 * one).item() == pytest.approx(0, abs=1e-12)
    both = thurstone_loss(
        torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), 0.0, weight=torch.tensor([3.0, 1.0])
    )
    assert both.item() == pytest.approx((3 * (1 - math.sqrt(chance)) + 1 - math.sqrt(0.5)) / 4, rel=1e-5)


@pytest.mark.parametrize("label", [None, LABEL])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_gradients_are_those_of_finite_differences(label, weight):
    win, lose = WIN.clone().requires_grad_(), LOSE.clone().requires_grad_()
    sigma = torch.tensor([0.0, 0.4, 1.0]).double()
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, label, weight), (win, lose))
    assert torch.autograd.gradcheck(lambda a, b: thurstone_loss(a, b, sigma, label, weight), (win, lose))


def test_losses_stay_finite_far_out():
    for loss in (bradley_terry_loss, lambda a, b, y: thurstone_loss(a, b, 0.0, y)):
        for label in (None, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])):
            win = torch.tensor([-1000.0, 1000.0], requires_grad=True)
            value = loss(win, torch.zeros(2), label)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(win.grad).all()


def test_a_column_is_not_broadcast_into_a_square():
    with pytest.raises(ValueError, match=r"label has shape \(3, 1\)"):
        bradley_terry_loss(WIN, LOSE, LABEL[:, None])
    with pytest.raises(ValueError, match=r"weight has shape \(2,\)"):
        bradley_terry_loss(WIN, LOSE, weight=WEIGHT[:2])
    with pytest.raises(ValueError, match=r"sigma has shape \(3, 1\)"):
        thurstone_loss(WIN, LOSE, WEIGHT[:, None])


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
