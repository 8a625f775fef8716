"""Step-GRPO's arithmetic: advantages and clip by hand, gradients against a closed form, ratios exactly 1."""

import dataclasses
import math

import pytest
import torch

from drm import grpo
from drm.flow import schedule
from drm.grpo import Figures, GRPOSettings, clipped_surrogate, gated_advantages, group_advantages

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    # mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / (math.sqrt(3.5) + 1e-4)
    found = group_advantages(rewards)
    assert torch.allclose(found[0], expected)
    assert found[1].tolist() == [0.0] * 4


def test_two_siblings_get_plus_and_minus_one_whatever_the_gap():
    found = group_advantages(torch.tensor([[0.0, 0.3], [2.0, -2.0]]), eps=0.0)
    assert torch.allclose(found, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_groups_that_hardly_differ_are_gated_and_counted():
    figures = Figures()
    rewards = torch.tensor([[0.0, 1e-4], [0.0, 1.0], [3.0, 3.0]])
    found = gated_advantages(rewards, GRPOSettings(num_branches=2, min_std=1e-3), figures)
    assert found[0].tolist() == found[2].tolist() == [0.0, 0.0]
    assert found[1, 1] > 0.99
    assert (figures.groups, figures.gated) == (3, 2)


def test_advantages_are_clipped():
    rewards = torch.zeros(1, 40)
    rewards[0, 0] = 100.0
    found = gated_advantages(rewards, GRPOSettings(num_branches=40, advantage_clip=2.0), Figures())
    assert found[0, 0] == 2.0


def test_a_reward_that_is_not_a_number_teaches_nothing():
    with pytest.raises(ValueError, match="NaN or infinity"):
        gated_advantages(torch.tensor([[1.0, math.nan]]), GRPOSettings(num_branches=2), Figures())


def test_the_clipped_surrogate_by_hand():
    ratio = torch.tensor([1.0, 1.3, 1.3, 0.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])
    # max(-A r, -A clip(r, 0.8, 1.2))
    expected = torch.tensor([-2.0, -2.4, 2.6, -1.0, 1.6])
    assert torch.allclose(
        clipped_surrogate(ratio.log(), torch.zeros(5), advantages, 0.2), expected, atol=1e-6
    )


def test_kl_by_hand():
    mean, other = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 2.0)
    std = torch.full((1, 1, 1, 1), 0.5)
    assert grpo.kl_to_reference(mean, other, std, -0.1, "sde").item() == pytest.approx(1 / (2 * 0.25 / 0.1))
    assert grpo.kl_to_reference(mean, other, std, -0.1, "cps").item() == pytest.approx(1 / (2 * 0.25))


class Linear:
    """velocity = w x + b on one pixel: everything about a step is known in closed form."""

    def __init__(self, w: float, b: float) -> None:
        self.w = torch.tensor(w, dtype=torch.float32, requires_grad=True)
        self.b = torch.tensor(b, dtype=torch.float32, requires_grad=True)
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        return self.w * x + self.b

    def gradients(self) -> tuple[float, float]:
        return self.w.grad.item(), self.b.grad.item()


def likes_high(latents: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
    return latents.mean(dim=(1, 2, 3))


def by_hand(
    x: float, candidates: list[float], advantages: list[float], sigma: float, dt: float, g: float
) -> tuple[float, float]:
    """d loss / d(w, b) of a step: -mean_i A_i (x'_i - mean) / std^2 dmean, on policy, nothing clipped."""
    drift = g * g / (2 * sigma)
    coefficient = (1 + drift * (1 - sigma)) * dt  # the velocity's in the mean
    mean = x * (1 + drift * dt) + (0.3 * x - 0.1) * coefficient
    variance = g * g * -dt
    slope = -sum(a * (c - mean) for a, c in zip(advantages, candidates, strict=True)) / variance
    slope *= coefficient / len(candidates)
    return slope * x, slope


def test_step_grpo_s_gradient_is_the_closed_form_s():
    sigmas, settings = torch.tensor([0.8, 0.5, 0.0]), GRPOSettings(num_branches=3, kl_weight=0.0)
    policy, x = Linear(0.3, -0.1), torch.full((1, 1, 1, 1), 0.7)
    seen = {}

    def score(latents: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        seen["candidates"] = latents.flatten().tolist()
        return likes_high(latents, sigma, rows)

    figures = grpo.roll_out(
        policy, score, x, sigmas, settings, seed=1, items=[0], backward=lambda loss: loss.backward()
    )
    g = 0.7 * math.sqrt(0.8 / 0.2)
    advantages = group_advantages(torch.tensor(seen["candidates"])).tolist()
    expected = by_hand(0.7, seen["candidates"], advantages, 0.8, -0.3, g)
    assert policy.gradients() == pytest.approx(expected, rel=1e-4)
    assert policy.w.grad != 0
    assert (figures.passes, figures.forwards) == (1, 0)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("method", ["step-grpo", "grpo"])
def test_on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped(kind: str, method: str):
    settings = GRPOSettings(method=method, num_branches=4, kind=kind, kl_weight=0.0)
    figures = grpo.roll_out(
        Linear(0.3, -0.1),
        likes_high,
        torch.randn(8, 2, 4, 4),
        SIGMAS,
        settings,
        seed=3,
        items=range(8),
        backward=lambda loss: loss.backward(),
    )
    assert figures.ratio_error == 0.0
    assert figures.summary()["clipped"] == 0.0


def test_siblings_share_one_pass_and_trajectories_do_not():
    settings, noise = GRPOSettings(num_branches=4, kl_weight=0.0), torch.randn(4, 1, 2, 2)
    step, plain = Linear(0.3, 0.0), Linear(0.3, 0.0)
    arguments = {"seed": 0, "backward": lambda loss: loss.backward()}
    one = grpo.roll_out(step, likes_high, noise[:1], SIGMAS, settings, items=[0], **arguments)
    settings = dataclasses.replace(settings, method="grpo")
    many = grpo.roll_out(plain, likes_high, noise, SIGMAS, settings, items=range(4), **arguments)
    # three steps of four have noise; four candidates each either way
    assert step.calls == [(1, True)] * 3
    assert plain.calls == [(4, False)] * 4 + [(4, True)] * 3
    assert (one.passes, one.forwards, many.passes, many.forwards) == (3, 0, 12, 16)
    assert len(torch.cat(one.rewards).flatten()) == 12
    assert len(torch.cat(many.rewards).flatten()) == 4


def test_grpo_gives_every_step_its_trajectory_s_advantage():
    """Against log p written out: sum over steps of A grad log p, averaged over trajectories and steps."""
    settings = GRPOSettings(method="grpo", num_branches=2, kl_weight=0.0)
    noise = torch.tensor([[[[0.4]]], [[[-0.6]]]])
    policy = Linear(0.3, -0.1)
    grpo.roll_out(
        policy,
        likes_high,
        noise,
        SIGMAS,
        settings,
        seed=5,
        items=[0, 1],
        backward=lambda loss: loss.backward(),
    )
    final, path = grpo.walk(Linear(0.3, -0.1), noise, SIGMAS, settings, seed=5, items=[0, 1])
    advantages = group_advantages(final.flatten()[None])[0]
    w, b = (torch.tensor(value, requires_grad=True) for value in (0.3, -0.1))
    total = torch.zeros(())
    for found in path:
        sigma, dt = SIGMAS[found.step], SIGMAS[found.step + 1] - SIGMAS[found.step]
        g2 = 0.49 * sigma / (1 - (SIGMAS[1] if found.step == 0 else sigma))
        for row in range(2):
            x, sample = found.x[row].squeeze(), found.candidates[row].squeeze()
            velocity = w * x + b
            mean = x * (1 + g2 / (2 * sigma) * dt) + velocity * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
            total = total - advantages[row] * (-((sample - mean) ** 2) / (2 * g2 * -dt)) / (2 * len(path))
    total.backward()
    assert policy.gradients() == pytest.approx((w.grad.item(), b.grad.item()), rel=1e-4)


def test_kl_pulls_towards_the_reference():
    settings = GRPOSettings(num_branches=2, kl_weight=1.0, min_std=1e9)  # every group gated: KL alone is left
    policy, reference = Linear(0.3, 0.5), Linear(0.3, 0.0)
    figures = grpo.roll_out(
        policy,
        likes_high,
        torch.randn(2, 1, 2, 2),
        SIGMAS,
        settings,
        seed=0,
        items=[0, 1],
        backward=lambda loss: loss.backward(),
        reference=reference,
    )
    assert policy.b.grad > 0
    assert figures.summary()["kl"] > 0
    assert figures.summary()["gated"] == 1.0
    assert not any(with_gradients for _, with_gradients in reference.calls)


def test_the_window_and_the_sibling_that_goes_on():
    settings = GRPOSettings(num_branches=4, kl_weight=0.0, start=0.25, end=0.5, sibling="best")
    policy = Linear(0.3, 0.0)
    figures = grpo.roll_out(
        policy,
        likes_high,
        torch.randn(1, 1, 2, 2),
        SIGMAS,
        settings,
        seed=0,
        items=[0],
        backward=lambda loss: loss.backward(),
    )
    assert policy.calls == [(1, False), (1, True)]  # nothing after the window is walked
    assert (figures.passes, figures.forwards) == (1, 1)


def test_a_random_sibling_is_drawn_evenly_and_by_the_seed():
    settings, rewards, items = GRPOSettings(num_branches=4), torch.randn(1000, 4), range(1000)
    drawn = grpo._survivor(rewards, settings, 7, 2, items)
    assert torch.bincount(drawn, minlength=4).float().div(1000).tolist() == pytest.approx(
        [0.25] * 4, abs=0.05
    )
    assert torch.equal(drawn, grpo._survivor(rewards, settings, 7, 2, items))
    assert not torch.equal(drawn, grpo._survivor(rewards, settings, 8, 2, items))
    assert torch.equal(drawn[400:], grpo._survivor(rewards[400:], settings, 7, 2, items[400:]))


@pytest.mark.parametrize("method", ["step-grpo", "grpo"])
def test_ascending_the_reward(method: str):
    """A policy of one bias learns to raise the mean, whichever way the advantages come."""
    settings, sigmas = GRPOSettings(method=method, num_branches=8, kl_weight=0.0), schedule(6)
    policy = Linear(0.0, 0.0)
    optimizer = torch.optim.SGD([policy.b], lr=0.2)
    before = grpo.walk(policy, torch.zeros(64, 1, 2, 2), sigmas, settings, seed=9, items=range(64))[0].mean()
    for number in range(10):
        noise = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(number))
        grpo.roll_out(
            policy,
            likes_high,
            noise,
            sigmas,
            settings,
            seed=number,
            items=range(16),
            backward=lambda loss: loss.backward(),
        )
        optimizer.step()
        optimizer.zero_grad()
    after = grpo.walk(policy, torch.zeros(64, 1, 2, 2), sigmas, settings, seed=9, items=range(64))[0].mean()
    assert after > before + 0.05


def test_the_stochastic_path_keeps_the_ode_s_std():
    fine = grpo.std_against_ode(schedule(200), 0.7)
    assert all(ratio == pytest.approx(1.0, abs=0.08) for ratio in fine)
    assert grpo.std_against_ode(schedule(10), 0.0) == pytest.approx([1.0] * 9)
    assert min(grpo.std_against_ode(schedule(10), 0.8, "cps")) < 0.97  # CPS shrinks


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_branches": 1}, "num_branches is 1: wanted at least 2"),
        ({"method": "ppo"}, "method is ppo"),
        ({"noise_level": 0.0}, "noise_level is 0.0: wanted above 0"),
        ({"start": 0.5, "end": 0.5}, "the window"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"sibling": "worst"}, "sibling is worst"),
    ],
)
def test_settings_that_cannot_learn_are_refused(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        GRPOSettings(**changes)


def test_roll_outs_that_cannot_learn_are_refused():
    arguments = {"settings": GRPOSettings(), "seed": 0, "backward": lambda loss: None}
    policy, noise = Linear(0.1, 0.0), torch.randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match="1 steps: at least 2"):
        grpo.roll_out(policy, likes_high, noise, torch.tensor([1.0, 0.0]), items=[0, 1], **arguments)
    with pytest.raises(ValueError, match="1 item numbers for 2 latents"):
        grpo.roll_out(policy, likes_high, noise, SIGMAS, items=[0], **arguments)
    arguments["settings"] = GRPOSettings(method="grpo")
    with pytest.raises(ValueError, match="2 latents are no whole groups of 4"):
        grpo.roll_out(policy, likes_high, noise, SIGMAS, items=[0, 1], **arguments)
