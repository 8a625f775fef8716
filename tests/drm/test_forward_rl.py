"""NFT and AWM by hand, their gradients against closed forms, the walk over noise levels, and the samples."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from drm.collect import collect
from drm.flow import add_noise, schedule
from drm.forward_rl import (
    ForwardSettings,
    awm_loss,
    learn_forward,
    matching_log_prob,
    nft_loss,
    noise_levels,
    old_decay,
    velocity_distance,
)
from drm.grpo import FORWARD_METHODS, GRPOSettings, group_advantages, roll_out
from drm.stepwise import sample_stepwise

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
# One sample of two pixels: x0, its noise, and x at sigma 0.5, whose true velocity is (-1, 3).
X0, NOISE, X = (torch.tensor(row).reshape(1, 1, 1, 2) for row in ([1.0, -1.0], [0.0, 2.0], [0.5, 0.5]))
VELOCITY, OLD = (torch.tensor(row).reshape(1, 1, 1, 2) for row in ([0.0, 1.0], [-2.0, 2.0]))


def test_the_example_is_a_noised_sample():
    assert torch.equal(add_noise(X0, NOISE, 0.5), X)


def nft(velocity, advantage, beta=0.5):
    return nft_loss(velocity, OLD, X, X0, 0.5, torch.tensor([advantage]), beta=beta, advantage_clip=5.0)


@pytest.mark.parametrize(("advantage", "expected"), [(2.0, 7.8), (7.0, 7.5), (-9.0, 8.5), (0.0, 8.0)])
def test_nft_by_hand(advantage: float, expected: float):
    # v_plus (-1, 1.5), x0 off by (0, 0.75): 0.28125 / 0.375 = 0.75
    # v_minus (-3, 2.5), x0 off by (1, 0.25): 0.53125 / 0.625 = 0.85
    # advantage 2: r = 0.7, (0.7 * 0.75 + 0.3 * 0.85) / 0.5 * 5
    assert nft(VELOCITY, advantage).item() == pytest.approx(expected, rel=1e-6)


def test_nft_s_gradient_by_hand():
    velocity, old = VELOCITY.clone().requires_grad_(), OLD.clone().requires_grad_()
    nft_loss(velocity, old, X, X0, 0.5, torch.tensor([2.0]), beta=0.5, advantage_clip=5.0).sum().backward()
    # (0.7 * (0, -0.5) + 0.3 * (0.4, 0.1)) * 10, the divisors constant
    assert velocity.grad.flatten().tolist() == pytest.approx([1.2, -3.2], rel=1e-5)
    assert old.grad is None


def test_nft_at_the_old_policy_moves_by_the_advantage_alone():
    def gradient(advantage):
        velocity = OLD.clone().requires_grad_()
        nft(velocity, advantage).sum().backward()
        return velocity.grad.flatten()

    assert gradient(0.0).tolist() == [0.0, 0.0]
    assert torch.allclose(gradient(5.0), -gradient(-5.0))
    # x0 off by (0.5, 0.5): 5 / 0.5 * (err * -0.5 * 0.5 / 0.5)
    assert gradient(5.0).tolist() == pytest.approx([-2.5, -2.5], rel=1e-5)


def test_nft_of_a_velocity_that_is_right_is_nothing_and_finite():
    right = (NOISE - X0).requires_grad_()
    loss = nft_loss(right, NOISE - X0, X, X0, 0.5, torch.tensor([5.0]))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert bool(torch.isfinite(right.grad).all())


def test_awm_s_log_prob_by_hand():
    target = NOISE - X0  # off by (1, -2): 2.5
    assert matching_log_prob(VELOCITY, target, 0.5, "uniform").item() == pytest.approx(-2.5)
    assert matching_log_prob(VELOCITY, target, 0.5, "t").item() == pytest.approx(-1.25)
    huber = -0.5 * (2.5**0.25 - 1e-10**0.25) / 0.25
    assert matching_log_prob(VELOCITY, target, 0.5, "ghuber").item() == pytest.approx(huber, rel=1e-5)


def test_awm_by_hand():
    ratio = math.exp(-2.5 + 1.0)  # the old one is off by (-1, -1)

    def loss(advantage):
        found = awm_loss(
            VELOCITY, OLD, X0, NOISE, 0.5, torch.tensor([advantage]), clip=0.2, weighting="uniform"
        )
        return found.item()

    assert loss(2.0) == pytest.approx(-2 * ratio, rel=1e-5)  # max(-2 * 0.22, -2 * 0.8)
    assert loss(-2.0) == pytest.approx(1.6, rel=1e-5)


def test_awm_s_gradient_by_hand():
    """On policy it is A (v - target), whatever the clip; ghuber's is that times t e^(p - 1)."""
    velocity = VELOCITY.clone().requires_grad_()
    arguments = (velocity, velocity, X0, NOISE, 0.5, torch.tensor([2.0]))
    loss = awm_loss(*arguments, clip=1e-4, weighting="uniform")
    loss.sum().backward()
    assert loss.item() == -2.0  # a ratio of exactly 1
    assert velocity.grad.flatten().tolist() == pytest.approx([2.0, -4.0])
    velocity.grad = None
    awm_loss(*arguments, clip=1e-4, weighting="ghuber").sum().backward()
    scale = 0.5 * 2.5**-0.75
    assert velocity.grad.flatten().tolist() == pytest.approx([2 * scale, -4 * scale], rel=1e-5)


def test_distance_by_hand():
    assert velocity_distance(VELOCITY, OLD).tolist() == [2.5]


def test_the_old_policy_trails():
    assert [old_decay(n, "nft") for n in (0, 100, 900)] == pytest.approx([0.0, 0.1, 0.5])
    assert [old_decay(n, "step-awm") for n in (0, 100, 900)] == pytest.approx([0.0, 0.1, 0.3])
    assert [old_decay(n, "nft", "late") for n in (0, 75, 95, 900)] == pytest.approx([0.0, 0.0, 0.15, 0.999])


def test_noise_levels_are_strata_of_the_schedule_without_its_ends():
    settings = GRPOSettings(method="awm")
    assert noise_levels(SIGMAS, settings, 3, seed=4) == [0.75, 0.5, 0.25]
    sigmas = schedule(13)
    drawn = torch.tensor([noise_levels(sigmas, settings, 4, seed=4, draw=draw) for draw in range(200)])
    for column, part in zip(drawn.T, sigmas[1:-1].split(3), strict=True):
        counts = [(column == level).float().mean().item() for level in part]
        assert counts == pytest.approx([1 / 3] * 3, abs=0.12)
    assert noise_levels(sigmas, settings, 4, seed=4, draw=7) == drawn[7].tolist()
    assert noise_levels(sigmas, settings, 4, seed=5, draw=7) != drawn[7].tolist()
    window = dataclasses.replace(settings, start=0.25, end=0.5)
    assert noise_levels(SIGMAS, window, 2, seed=4) == [0.5, 0.5]


class Linear:
    """velocity = w x + b on one pixel."""

    def __init__(self, w: float, b: float, name: str = "", calls: list | None = None) -> None:
        self.w = torch.tensor(w, requires_grad=True)
        self.b = torch.tensor(b, requires_grad=True)
        self.name, self.calls = name, [] if calls is None else calls

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        self.calls.append((self.name, len(x), torch.is_grad_enabled()))
        return self.w * x + self.b

    def gradients(self) -> list[float]:
        return [self.w.grad.item(), self.b.grad.item()]


class Seen:
    """The mean of each latent as its score, and what was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, float, list[int]]] = []

    def __call__(self, latents: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        self.calls.append((latents.clone(), sigma, rows.tolist()))
        return latents.mean(dim=(1, 2, 3))


def samples(count: int, shape: tuple[int, ...] = (1, 2, 2), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def learn(method, x0, *, policy=None, score=None, old=None, forward=None, items=None, seed=3, **settings):
    """Figures of one iteration; groups of 2 unless told otherwise."""
    settings = GRPOSettings(**{"method": method, "num_branches": 2, "kl_weight": 0.0, **settings})
    return learn_forward(
        policy or Linear(0.3, -0.1),
        score or Seen(),
        x0,
        SIGMAS,
        settings,
        forward or ForwardSettings(noise_levels=3),
        seed=seed,
        items=range(len(x0)) if items is None else items,
        backward=lambda loss: loss.backward(),
        old=old or Linear(0.3, -0.1),
    )


@pytest.mark.parametrize("method", ["nft", "awm"])
def test_a_finished_sample_is_scored_once_and_clean(method: str):
    score, x0 = Seen(), samples(4)
    figures = learn(method, x0, score=score)
    assert [(sigma, rows) for _, sigma, rows in score.calls] == [(0.0, [0, 1]), (0.0, [2, 3])]
    assert torch.equal(torch.cat([latents for latents, *_ in score.calls]), x0)
    assert (figures.groups, figures.passes, figures.forwards) == (2, 12, 12)


@pytest.mark.parametrize("method", ["step-nft", "step-awm"])
def test_a_reward_that_knows_noise_scores_every_noised_group_under_one_noise(method: str):
    score, x0 = Seen(), samples(4)
    figures = learn(method, x0, score=score)
    assert [(sigma, rows) for _, sigma, rows in score.calls] == [
        (sigma, rows) for sigma in (0.75, 0.5, 0.25) for rows in ([0, 1], [2, 3])
    ]
    noises = [(x - (1 - t) * x0[rows]) / t for x, t, rows in score.calls]
    assert all(torch.allclose(noise[0], noise[1], atol=1e-5) for noise in noises)
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in pairwise(noises))
    assert figures.groups == 6


def test_without_it_every_sample_has_noise_of_its_own():
    """Two equal samples of a group are seen as different states, and with step-awm as one."""
    seen = []

    class Watching(Linear):
        def __call__(self, x, sigma):
            seen.append(x)
            return super().__call__(x, sigma)

    x0 = samples(1).expand(2, -1, -1, -1)
    learn("awm", x0, policy=Watching(0.3, 0.0))
    assert not any(torch.equal(x[0], x[1]) for x in seen)
    seen.clear()
    learn("step-awm", x0, policy=Watching(0.3, 0.0))
    assert all(torch.equal(x[0], x[1]) for x in seen)


def test_local_advantages_make_the_gradient_of_step_awm():
    """Against A (v - v*) dv / d(w, b) written out, averaged over samples and levels, A a share of 5."""
    score, policy, x0 = Seen(), Linear(0.3, -0.1), samples(3, (1, 1, 1))
    learn(
        "step-awm",
        x0,
        policy=policy,
        score=score,
        num_branches=3,
        forward=ForwardSettings(noise_levels=3, weighting="uniform", old_weight=0.0),
    )
    expected = torch.zeros(2)
    for x, t, _ in score.calls:
        x, clean = x.flatten(), x0.flatten()
        advantages = group_advantages(x)
        noise = (x - (1 - t) * clean) / t
        error = 2 * advantages / 5 * (0.3 * x - 0.1 - (noise - clean))
        expected += torch.stack([(error * x).mean(), error.mean()]) / 3
    assert policy.gradients() == pytest.approx(expected.tolist(), rel=1e-4)


def test_terminal_advantages_make_the_gradient_of_nft():
    """At v = v_old it is 5 (2 r - 1) of the matching error's, whose divisor is constant."""
    policy, x0, seen = Linear(0.3, -0.1), samples(3, (1, 1, 1)), []

    class Watching(Linear):
        def __call__(self, x, sigma):
            seen.append((x, sigma))
            return super().__call__(x, sigma)

    learn("nft", x0, policy=policy, old=Watching(0.3, -0.1), num_branches=3)
    expected, share = torch.zeros(2), group_advantages(x0.flatten()) / 5
    for x, t in seen:
        x = x.flatten()
        error = x - t * (0.3 * x - 0.1) - x0.flatten()
        slope = 5 * share * 2 * error / error.abs() * -t
        expected += torch.stack([(slope * x).mean(), slope.mean()]) / 3
    assert policy.gradients() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_a_batch_equals_its_groups(method: str):
    x0, whole, parts = samples(4), Linear(0.3, -0.1), Linear(0.3, -0.1)
    learn(method, x0, policy=whole, old=Linear(0.2, 0.0))
    for rows in ([0, 1], [2, 3]):
        learn(method, x0[rows], policy=parts, old=Linear(0.2, 0.0), items=rows)
    assert whole.gradients() == pytest.approx([g / 2 for g in parts.gradients()], rel=1e-5)


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_groups_that_hardly_differ_teach_nothing(method: str):
    policy = Linear(0.3, -0.1)
    figures = learn(method, samples(4), policy=policy, min_std=1e6)
    assert figures.summary()["gated"] == 1.0
    assert policy.gradients() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_reference_and_old_policy_pull_and_are_asked_first(method: str):
    calls: list = []
    policy, old = Linear(0.3, 0.5, "policy", calls), Linear(0.3, 0.0, "old", calls)
    figures = learn_forward(
        policy,
        Seen(),
        samples(2),
        SIGMAS,
        GRPOSettings(method=method, num_branches=2, min_std=1e6, kl_weight=0.1),
        ForwardSettings(noise_levels=1),
        seed=0,
        items=[0, 1],
        backward=lambda loss: loss.backward(),
        old=old,
        reference=Linear(0.3, 0.1, "reference", calls),
    )
    assert calls == [("old", 2, False), ("reference", 2, False), ("policy", 2, True)]
    # without kl_weight's share what is left is the old policy's: AWM's distance of 0.5, squared
    own = {"nft": 0.01, "awm": 0.1}[method.removeprefix("step-")]
    pull = policy.b.grad.item() - 0.1 * own * 2 * 0.4
    assert pull == pytest.approx(1.0, rel=1e-4) if "awm" in method else pull > 0
    assert figures.summary()["kl"] == pytest.approx(0.16, rel=1e-4)


@pytest.mark.parametrize("method", FORWARD_METHODS)
def test_ascending_the_reward(method: str):
    """A policy of one bias learns to raise the mean of what it draws."""
    policy, settings = Linear(0.0, 0.0), GRPOSettings(method=method, num_branches=4, kl_weight=0.0)
    forward, sigmas = ForwardSettings(noise_levels=3, weighting="t"), schedule(6)
    old = Linear(0.0, 0.0)
    optimizer = torch.optim.SGD([policy.b], lr=0.05 if "nft" in method else 0.5)
    for number in range(10):
        known = {"seed": number, "items": range(8)}
        drawer = old if "nft" in method else policy
        x0, forwards = collect(drawer, Seen(), samples(8, seed=number), sigmas, settings, forward, **known)
        assert forwards == 8 * 6
        learn_forward(
            policy,
            Seen(),
            x0,
            sigmas,
            settings,
            forward,
            backward=lambda loss: loss.backward(),
            old=old,
            **known,
        )
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            old.b.lerp_(policy.b, 1 - old_decay(number, method))
    assert policy.b < -0.05  # the sample is the noise less the bias


def collected(collector: str, noise: torch.Tensor, items: list[int]) -> torch.Tensor:
    forward = ForwardSettings(collector=collector, collector_branches=3)
    settings = GRPOSettings(method="nft", num_branches=2)
    found, forwards = collect(Linear(0.2, 0.1), Seen(), noise, SIGMAS, settings, forward, seed=5, items=items)
    assert forwards == len(noise) * 4 * (3 if collector == "best-of" else 1)
    return found


@pytest.mark.parametrize("collector", ["euler", "best-of", "step-wise"])
def test_collected_a_batch_equals_its_items(collector: str):
    noise = samples(4)
    whole = collected(collector, noise, [0, 1, 2, 3])
    assert not whole.requires_grad
    assert torch.allclose(whole[2:], collected(collector, noise[2:], [2, 3]), atol=1e-6)


def test_better_collectors_bring_better_samples():
    noise, items = samples(16), list(range(16))
    plain, best, step = (
        collected(name, noise, items).mean(dim=(1, 2, 3)) for name in ("euler", "best-of", "step-wise")
    )
    assert bool((best >= plain).all())
    assert best.mean() > plain.mean() + 0.1
    assert step.mean() > plain.mean() + 0.1


def test_euler_is_the_plain_sampler_of_step_wise_sampling():
    policy, noise = Linear(0.2, 0.1), samples(2)
    with torch.no_grad():
        plain, _ = sample_stepwise(
            lambda x, sigma: x - sigma * policy(x, float(sigma)),
            None,
            noise,
            SIGMAS,
            num_branches=1,
            noise_level=0.0,
        )
    assert torch.allclose(collected("euler", noise, [0, 1]), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"noise_levels": 0}, "noise_levels is 0: wanted at least 1"),
        ({"beta": 0.0}, "beta is 0.0: wanted above 0"),
        ({"old_weight": math.nan}, "old_weight is nan"),
        ({"weighting": "cosine"}, "weighting is cosine: wanted one of ghuber, t, uniform"),
        ({"trailing": "never"}, "trailing is never: wanted one of early, late"),
        ({"collector": "dpm"}, "collector is dpm: wanted one of euler, best-of, step-wise"),
        ({"collector_branches": 1}, "collector_branches is 1: wanted at least 2"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ForwardSettings(**changes)


def test_samples_that_cannot_teach_are_refused():
    with pytest.raises(ValueError, match="3 latents are no whole groups of 2"):
        learn("nft", samples(3))
    with pytest.raises(ValueError, match="1 item numbers for 2 latents"):
        learn("nft", samples(2), items=[0])
    with pytest.raises(ValueError, match="finished samples hold NaN or infinity"):
        learn("nft", samples(2) / 0)
    with pytest.raises(ValueError, match=r"method is grpo: learn_forward takes nft, .*take grpo\.roll_out"):
        learn("grpo", samples(2))
    with pytest.raises(ValueError, match="the reward model gave NaN or infinity"):
        learn("step-nft", samples(2), score=lambda x, *_: x.mean(dim=(1, 2, 3)) * math.nan)
    with pytest.raises(ValueError, match="no step of 4 is in the window"):
        learn("awm", samples(2), start=0.9)
    with pytest.raises(ValueError, match=r"method is nft: .* take forward_rl\.learn_forward"):
        roll_out(
            Linear(0.1, 0.0),
            Seen(),
            samples(2),
            SIGMAS,
            GRPOSettings(method="nft"),
            seed=0,
            items=[0, 1],
            backward=lambda loss: None,
        )
