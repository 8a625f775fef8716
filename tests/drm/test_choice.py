"""Who continues: the best, or a draw from the softmax that belongs to its item and branch alone."""

import math

import pytest
import torch

from drm.branching import philox4x32, uint_to_uniform
from drm.choice import choose, greedy, gumbel, softmax
from drm.presets import Branching


def test_greedy_takes_the_first_of_equals():
    assert greedy(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]])).tolist() == [1, 0]
    assert greedy(torch.zeros(1, 40)).tolist() == [0]


def test_a_cold_softmax_is_greedy_and_a_hot_one_is_not():
    scores = torch.randn(200, 5)
    assert torch.equal(softmax(scores, 1e-4, 0, 0, range(200)), greedy(scores))
    hot = softmax(scores, 100.0, 0, 0, range(200))
    assert (hot.bincount(minlength=5) > 20).all()
    assert torch.equal(choose(scores, Branching(), 0, range(200)), greedy(scores))
    warm = Branching(choice="softmax", temperature=100.0, seed=0)
    assert torch.equal(choose(scores, warm, 0, range(200)), hot)


def test_a_choice_reads_its_own_row():
    scores = torch.randn(3, 6)
    whole = softmax(scores, 1.0, 3, 2, [4, 9, 1])
    for row, item in enumerate([4, 9, 1]):
        assert softmax(scores[row : row + 1], 1.0, 3, 2, [item]).tolist() == [whole[row]]


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
    chosen = softmax(scores.expand(20_000, 3), 1.0, 0, 0, range(20_000))
    shares = chosen.bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, scores.softmax(0), atol=0.015, rtol=0)


def test_gumbel_moments():
    noise = gumbel(3, 1, range(300), range(300)).flatten()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
