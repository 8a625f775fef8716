"""The noise streams: known-answer vectors, dependence on their address alone, and their distribution."""

import math

import pytest
import torch

from drm.branching import (
    branch_candidates,
    branch_noise,
    branch_step,
    candidate_noise,
    philox4x32,
    uint_to_uniform,
    uniform_pair_to_normal,
)
from drm.sde import log_prob_from_squared, transition, transition_log_prob

SHAPE = (16, 8, 6)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The published vectors of Random123 for ten rounds."""
    words = philox4x32(*(torch.tensor([c]) for c in counter), *key)
    assert [int(w) for w in words] == expected


def test_uniform_and_normal_by_hand():
    bits = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    expected = [0.0, 4.6566127342e-10, 2147483647 * 4.6566127342e-10, 2147483647 * 4.6566127342e-10, 0.0]
    torch.testing.assert_close(uint_to_uniform(bits), torch.tensor(expected))
    assert uint_to_uniform(bits).max() < 1
    first, second = uniform_pair_to_normal(torch.tensor([0.0, math.exp(-2)]), torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(
        first, torch.tensor([math.sqrt(-2 * math.log(1e-7)), 0.0]), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(second, torch.tensor([0.0, 2.0]), atol=1e-6, rtol=1e-6)


def test_element_order_is_four_normals_a_counter():
    """Elements 4i..4i+3 are the four normals of counter (i, step, item, branch) under the key (low, high)."""
    seed = (5 << 32) | 7
    noise = branch_noise((11,), seed, step=3, item=4, branch=2)
    for i in range(3):
        words = philox4x32(*(torch.tensor([c]) for c in (i, 3, 4, 2)), 7, 5)
        u = [uint_to_uniform(w) for w in words]
        normals = torch.cat((*uniform_pair_to_normal(u[0], u[1]), *uniform_pair_to_normal(u[2], u[3])))
        torch.testing.assert_close(noise[4 * i : 4 * i + 4], normals[: 11 - 4 * i])


def test_many_streams_equal_each_alone():
    items, branches = [0, 9, 2**32 - 1], [0, 3, 999]
    together = candidate_noise(SHAPE, 123, 17, items, branches)
    assert together.shape == (3, 3, *SHAPE)
    assert together.dtype == torch.float32
    for i, item in enumerate(items):
        for j, branch in enumerate(branches):
            assert torch.equal(together[i, j], branch_noise(SHAPE, 123, 17, item, branch))


@pytest.mark.parametrize("change", ["seed", "high seed", "step", "item", "branch"])
def test_every_part_of_the_address_counts(change):
    address = {"seed": 1, "step": 2, "item": 3, "branch": 4}
    other = {**address, "seed": 1 + 2**40} if change == "high seed" else {**address, change: 7}
    a, b = branch_noise(SHAPE, **address).flatten(), branch_noise(SHAPE, **other).flatten()
    assert not (a == b).any()
    assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 5 / math.sqrt(len(a))


def test_seed_is_64_bits():
    assert torch.equal(branch_noise(SHAPE, -1, 0, 0, 0), branch_noise(SHAPE, 2**64 - 1, 0, 0, 0))


def test_distribution():
    """Moments, Kolmogorov-Smirnov distance and neighbour correlation of a million normals."""
    noise = candidate_noise((64, 32, 32), 2024, 1, range(4), range(4)).flatten().double()
    count = len(noise)
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)
    ordered = torch.special.ndtr(noise.sort().values)
    distance = (ordered - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.63 / math.sqrt(count)  # the 1 % critical value
    for lag in (1, 2, 3, 4):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < 4 / math.sqrt(count)


def test_candidates():
    mean, std = torch.randn(2, *SHAPE), 0.3
    four = branch_candidates(mean, std, 11, 5, [0, 1], range(4))
    two = branch_candidates(mean, std, 11, 5, [0, 1], range(2))
    assert four.shape == (2, 4, *SHAPE)
    assert torch.equal(four[:, :2], two)
    torch.testing.assert_close(four[1, 3], mean[1] + std * branch_noise(SHAPE, 11, 5, 1, 3))
    halved = branch_candidates(mean, std, 11, 5, [0, 1], range(4), noise_scale=0.5)
    torch.testing.assert_close(halved - mean[:, None], (four - mean[:, None]) / 2, atol=1e-6, rtol=1e-5)


def test_candidates_with_one_std_an_item():
    mean, std = torch.randn(2, *SHAPE), torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1)
    together = branch_candidates(mean, std, 11, 5, [0, 1], range(3))
    alone = branch_candidates(mean[1:], 0.9, 11, 5, [1], range(3))
    assert torch.equal(together[1:], alone)


def test_bad_streams_are_refused():
    with pytest.raises(ValueError, match="item is -1"):
        branch_noise(SHAPE, 0, 0, -1, 0)
    with pytest.raises(ValueError, match="one per item"):
        branch_candidates(torch.zeros(2, *SHAPE), 0.1, 0, 0, [0], range(2))


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("sigmas", [(0.8, 0.6), (torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.1]))])
def test_step_is_the_transition_with_the_branches_noise(kind, sigmas):
    x, velocity = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    drawn = branch_step(
        x, velocity, *sigmas, seed=11, step=5, items=torch.tensor([4, 9]), branches=range(3), kind=kind
    )
    noise = candidate_noise(SHAPE, 11, 5, [4, 9], range(3))
    mean, std = transition(x, velocity, *sigmas, kind=kind)
    expected = mean.unsqueeze(1) + std.unsqueeze(1) * noise
    torch.testing.assert_close(drawn.scored, expected, atol=1e-6, rtol=1e-6)
    log_prob = transition_log_prob(drawn.scored, mean.unsqueeze(1), std.unsqueeze(1), kind)
    torch.testing.assert_close(
        log_prob_from_squared(drawn.squared, drawn.std, kind), log_prob, atol=1e-6, rtol=1e-6
    )


def test_step_gives_any_branch_s_state_in_float32():
    x, velocity = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    address = {"seed": 3, "step": 1, "items": [0, 7]}
    whole = branch_step(x, velocity, 0.8, 0.6, **address, branches=range(4))
    half = branch_step(x, velocity, 0.8, 0.6, **address, branches=range(2, 4), dtype=torch.bfloat16)
    assert half.scored.dtype == torch.bfloat16
    assert torch.equal(half.scored, whole.scored[:, 2:].bfloat16())
    for branch in ([2, 3], [0, 3]):
        expected = whole.scored[torch.arange(2), torch.tensor(branch)]
        assert torch.equal(half.state(torch.tensor(branch)), expected)
    several = half.state(torch.tensor([1, 2, 3]), rows=torch.tensor([1, 1, 0]))
    assert torch.equal(several, whole.scored[torch.tensor([1, 1, 0]), torch.tensor([1, 2, 3])])
