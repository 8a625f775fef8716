"""Branching and its noise: known-answer vectors, dependence on the address alone, and the distribution."""

import math
import sys

import pytest
import torch

from drm.branching import (
    _check_at_hand,
    _kernel,
    branch_candidates,
    branch_noise,
    branch_step,
    candidate_noise,
    philox4x32,
    uint_to_uniform,
    uniform_pair_to_normal,
)
from drm.noise import _normals
from drm.sde import transition

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


def independent(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the correlation of two samples, of their squares too, is within 4.5 standard errors of 0."""
    pairs = torch.stack((a, b)).double().reshape(2, -1)
    limit = 4.5 / math.sqrt(pairs.shape[1])
    return all(abs(float(torch.corrcoef(both)[0, 1])) < limit for both in (pairs, pairs**2))


def kolmogorov_smirnov(sample: torch.Tensor) -> float:
    """sqrt(n) times the largest distance of the empirical distribution from the normal one."""
    ordered = torch.special.ndtr(sample.double().flatten().sort().values)
    count = len(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return float(distance) * math.sqrt(count)


def test_distribution():
    """Moments, Kolmogorov-Smirnov distance and neighbour correlation of a million normals."""
    noise = candidate_noise((64, 32, 32), 2024, 1, range(4), range(4)).flatten().double()
    count = len(noise)
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert kolmogorov_smirnov(noise) < 1.63  # the 1 % critical value
    for lag in (1, 2, 3, 4):
        assert independent(noise[lag:], noise[:-lag])


def test_the_distance_finds_what_is_not_normal():
    assert kolmogorov_smirnov(torch.linspace(-1.7, 1.7, 2000)) > 1.63
    assert kolmogorov_smirnov(branch_noise((65536,), 1, 0, 0, 0) * 1.05) > 1.63


def test_every_step_item_and_branch_is_normal_and_independent_of_its_neighbours():
    """(steps, items, branches, elements): a sampler's whole noise, looked at along every axis."""
    noise = torch.stack([candidate_noise((16, 32, 32), 7, step, range(3), range(4)) for step in range(8)])
    noise = noise.flatten(3)
    distances = [kolmogorov_smirnov(stream) for stream in noise.flatten(0, 2)]
    assert max(distances) < 2.23  # 1 % critical over all 96
    # Under the null they average 0.87 with a standard deviation of 0.26.
    assert abs(sum(distances) / len(distances) - 0.87) < 4 * 0.26 / math.sqrt(len(distances))
    for axis in range(4):
        for lag in (1, 2):
            first = noise.narrow(axis, 0, noise.shape[axis] - lag)
            assert independent(first, noise.narrow(axis, lag, noise.shape[axis] - lag))


def test_neighbouring_seeds_are_independent():
    noise = [branch_noise((16, 64, 64), seed, 0, 0, 0) for seed in (0, 1, 2, 2**32, 2**32 + 1)]
    assert all(independent(a, b) for i, a in enumerate(noise) for b in noise[:i])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8191 * 4 + 2, 8192 * 4 + 1])
def test_pieces_of_any_size_are_the_plain_torch_normals(size):
    """The CPU's own way in numpy, piece by piece, against the way of every other device."""
    items, branches, seed = [4, 2**32 - 1], [0, 9], 2**63 + 12345
    c0, c1, c2, c3 = (
        torch.arange((size + 3) // 4),
        torch.tensor([7]),
        torch.tensor(items),
        torch.tensor(branches),
    )
    words = _normals(c0, c1, c2.repeat_interleave(2).unsqueeze(1), c3.repeat(2).unsqueeze(1), seed)
    expected = words.flatten(1)[:, :size].reshape(2, 2, size)
    assert torch.equal(candidate_noise((size,), seed, 7, items, branches), expected)


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


@pytest.mark.parametrize("size", [(1, 2, 5), (16, 16, 16), (16, 64, 64)])
def test_one_branch_s_noise_is_the_same_drawn_ahead(size):
    """In any order of steps, batches and branches, up to the last step there is."""
    x = torch.zeros(2, *size)
    for step in (0, 1, 9, 3, 8, 2**32 - 1):
        for items, branch in (([0, 1], 0), ([5, 1], 0), ([0, 1], 3)):
            drawn = branch_step(x, x, 0.8, 0.6, seed=4, step=step, items=items, branches=[branch])
            noise = candidate_noise(size, 4, step, items, [branch])
            assert torch.equal(drawn.scored, drawn.std.unsqueeze(1) * noise)


def test_step_refuses_what_it_cannot_mean():
    x, address = torch.zeros(2, *SHAPE), {"seed": 0, "step": 0, "items": [0, 1], "branches": [0]}
    with pytest.raises(ValueError, match="one id per item"):
        branch_step(x, x, 0.8, 0.6, **{**address, "items": [0]})
    with pytest.raises(ValueError, match="two equal shapes"):
        branch_step(x, x[:, :3], 0.8, 0.6, **address)
    with pytest.raises(ValueError, match="from sigma"):
        branch_step(x, x, 0.6, 0.8, **address)
    with pytest.raises(ValueError, match="branch is -1"):
        branch_step(x, x, 0.8, 0.6, **{**address, "branches": [-1]})
    with pytest.raises(ValueError, match="step is -1"):
        branch_step(x, x, 0.8, 0.6, **{**address, "step": -1})
    with pytest.raises(ValueError, match="kind is 'ode'"):
        branch_step(x, x, 0.8, 0.6, **address, kind="ode")


def test_what_is_checked_before_the_kernel():
    x = torch.zeros(2, *SHAPE)
    _check_at_hand(x, (torch.tensor([0.8, 0.5]), 0.4, torch.tensor(0.9)), "sde")
    with pytest.raises(ValueError, match="from sigma"):
        _check_at_hand(x, (0.6, torch.tensor(0.8), 0.9), "sde")
    with pytest.raises(ValueError, match="sigma_max"):
        _check_at_hand(x, (1.0, 0.8, 1.0), "sde")
    with pytest.raises(ValueError, match="batch of 2"):
        _check_at_hand(x, (torch.full((3,), 0.8), 0.4, 0.9), "sde")


def test_without_a_kernel_the_reason_is_said_once_and_the_twin_draws(monkeypatch, caplog):
    """A device where the kernel cannot run: here a CPU in CUDA's place, with or without Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "drm.branching_triton", raising=False)
    caplog.set_level("INFO")
    _kernel.cache_clear()
    device = torch.device("cpu")
    assert _kernel(device) is None
    assert _kernel(device) is None
    assert len(caplog.records) == 1
    assert "plain torch" in caplog.text
    _kernel.cache_clear()
