"""Rectified-flow identities and the shifted schedule, against values worked out by hand."""

import pytest
import torch

from drm import flow


def test_identities_by_hand():
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    x = flow.add_noise(x0, noise, 0.25)
    assert x.item() == 0.75 * 2 - 0.25
    velocity = flow.velocity_from_denoised(x, x0, 0.25)
    assert velocity.item() == -3.0
    assert flow.denoised_from_velocity(x, velocity, 0.25).item() == 2.0


def test_one_sigma_per_item():
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigma = torch.tensor([0.1, 0.5, 1.0])
    x = flow.add_noise(x0, noise, sigma)
    for row in range(3):
        single = flow.add_noise(x0[row : row + 1], noise[row : row + 1], float(sigma[row]))
        assert torch.equal(x[row : row + 1], single)
    assert torch.equal(x[2], noise[2])


def test_wrong_number_of_sigmas():
    with pytest.raises(ValueError, match="batch of 3"):
        flow.add_noise(torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), torch.tensor([0.1, 0.2]))


def test_schedule_by_hand():
    # 3 t / (1 + 2 t) at t = 1, 3/4, 1/2, 1/4, 0.
    expected = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    torch.testing.assert_close(flow.schedule(4), expected)
    torch.testing.assert_close(flow.schedule(4, shift=1.0), torch.linspace(1, 0, 5))


def test_schedule_rejects_bad_settings():
    with pytest.raises(ValueError, match="steps is 0"):
        flow.schedule(0)
    with pytest.raises(ValueError, match="shift is 0"):
        flow.schedule(4, shift=0)
