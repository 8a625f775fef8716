"""Reinforcement on the forward process: finished samples are noised afresh, and the velocity learns there.

    x_t = (1 - t) x0 + t eps,    v* = eps - x0,    v = policy(x_t, t)

No trajectories are kept and no step needs a log-probability, so any sampler may have drawn x0 (collect.py).
Two losses, as their authors' code has them:

    nft  DiffusionNFT (2025): towards the samples that are better than the policy that drew them, and away
         from the others, through two policies implied by v and v_old
    awm  Advantage Weighted Matching (2025): flow matching's own error as -log p in the clipped surrogate

Both know one terminal reward, which every noise level gets. step-nft and step-awm ask a reward that knows
noise: a group is noised by one eps at one t, each x_t is scored as it is, and the advantages are local,

    A_i = (r_i - mean) / (std + eps),   r_i = score(x_t of i, t)           inside one prompt at one t

The noise is equal for the whole group and so are its good and bad luck; what is left differs by the sample.
Learning needs an old policy: v_old trails v after every update (`old_decay`). One update follows one
collection, so AWM's ratio is exactly 1, as in grpo.py, whose Policy, Score and Backward these are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from .flow import add_noise, denoised_from_velocity
from .grpo import Backward, Figures, GRPOSettings, Policy, Score, clipped_surrogate, gated_advantages
from .noise import candidate_noise, philox4x32, uint_to_uniform
from .ranges import Range, check_ranges

COLLECTORS = ("euler", "best-of", "step-wise")
WEIGHTINGS = ("ghuber", "t", "uniform")
HUBER_POWER, _HUBER_FLOOR = 0.25, 1e-10
_ERROR_FLOOR = 1e-5
# The largest decay of the old policy, by loss.
_MOST_DECAY = {"nft": 0.5, "awm": 0.3}
# Of kl_weight, which here weighs a distance of velocities: its default of 0.01 comes to what the authors of
# each loss take, 1e-4 and 1e-3.
_DISTANCE_SCALE = {"nft": 0.01, "awm": 0.1}
# Noise streams that no candidate and no survivor has.
_NOISE_BRANCH, _LEVEL_BRANCH = 0xFFFFFFFE, 0xFFFFFFFD


@dataclass(frozen=True, kw_only=True)
class ForwardSettings:
    """noise_levels: of each sample an iteration. beta: NFT's, the step from v_old that the implied policies
    take. weighting: AWM's, see `matching_log_prob`. old_weight: AWM's squared distance of v from v_old's.
    trailing: see `old_decay`. collector, collector_branches: what draws the samples, see collect.py.
    Raises ValueError for what is out of range.
    """

    noise_levels: Annotated[int, Range(1, 1000)] = 6
    beta: Annotated[float, Range(0, 100, above=True)] = 1.0
    weighting: Literal["ghuber", "t", "uniform"] = "ghuber"
    old_weight: Annotated[float, Range(0, 1e6)] = 1.0
    trailing: Literal["early", "late"] = "early"
    collector: Literal["euler", "best-of", "step-wise"] = "euler"
    collector_branches: Annotated[int, Range(2, 1024)] = 4

    def __post_init__(self) -> None:
        check_ranges(self)
        wrong = [
            (self.weighting, "weighting", WEIGHTINGS),
            (self.trailing, "trailing", ("early", "late")),
            (self.collector, "collector", COLLECTORS),
        ]
        for value, name, wanted in wrong:
            if value not in wanted:
                raise ValueError(f"{name} is {value}: wanted one of {', '.join(wanted)}")


def asks_old(settings: GRPOSettings, forward: ForwardSettings) -> bool:
    """Whether a noise level takes a pass of the old policy."""
    return settings.method.endswith("nft") or forward.old_weight > 0


def _relative_error(denoised: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error over the detached mean absolute one, both over C, H, W: (B,)."""
    error = denoised - x0
    size = error.detach().abs().mean(dim=(1, 2, 3)).clamp_min(_ERROR_FLOOR)
    return error.square().mean(dim=(1, 2, 3)) / size


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x: Tensor,
    x0: Tensor,
    sigma: float,
    advantages: Tensor,
    *,
    beta: float = 1.0,
    advantage_clip: float = 5.0,
) -> Tensor:
    """DiffusionNFT's loss of each sample, (B,), from velocities (B, C, H, W) at x, which is x0 noised to
    sigma. advantages: (B,). No gradient flows through old_velocity.

        r       = clip(A / (2 A_max) + 1/2, 0, 1)
        v_plus  = beta v + (1 - beta) v_old,   v_minus = (1 + beta) v_old - beta v
        L       = mean (x - sigma v_. - x0)^2 / max(mean |x - sigma v_. - x0|, 1e-5)     the divisor detached
        loss    = (r L_plus + (1 - r) L_minus) / beta * A_max

    At v = v_old a sample of advantage 0 has no gradient; r = 1 is matching it, r = 0 leads away from it.
    """
    old = old_velocity.detach()
    positive = beta * velocity + (1 - beta) * old
    negative = (1 + beta) * old - beta * velocity
    share = (advantages / (2 * advantage_clip) + 0.5).clamp(0, 1)
    plus = _relative_error(denoised_from_velocity(x, positive, sigma), x0)
    minus = _relative_error(denoised_from_velocity(x, negative, sigma), x0)
    return (share * plus + (1 - share) * minus) / beta * advantage_clip


def matching_log_prob(velocity: Tensor, target: Tensor, sigma: float, weighting: str = "ghuber") -> Tensor:
    """AWM's log p of each sample, (B,), from velocity and target = eps - x0, both (B, C, H, W).

    e       = mean (v - target)^2                               over C, H, W
    log p   = -e                                                uniform
              -t e                                              t
              -t ((e + 1e-10)^p - 1e-10^p) / p,   p = 0.25      ghuber, the generalised Huber power
    """
    error = (velocity - target).square().mean(dim=(1, 2, 3))
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -sigma * error
    power = HUBER_POWER
    return -sigma * ((error + _HUBER_FLOOR) ** power - _HUBER_FLOOR**power) / power


def awm_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma: float,
    advantages: Tensor,
    *,
    clip: float,
    weighting: str = "ghuber",
) -> Tensor:
    """Advantage weighted matching's loss of each sample, (B,), from two velocities (B, C, H, W) at the same
    x0, noise and sigma. advantages: (B,). No gradient flows through old_velocity.

        ratio = exp(log p - log p_old)                              log p: `matching_log_prob`
        loss  = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
    """
    target = noise - x0
    log_prob = matching_log_prob(velocity, target, sigma, weighting)
    old_log_prob = matching_log_prob(old_velocity.detach(), target, sigma, weighting)
    return clipped_surrogate(log_prob, old_log_prob, advantages, clip)


def velocity_distance(velocity: Tensor, other: Tensor) -> Tensor:
    """mean (v - v_other)^2 over C, H, W: (B,)."""
    return (velocity - other).square().mean(dim=(1, 2, 3))


def _loss_of(method: str) -> str:
    return method.removeprefix("step-")


def old_decay(update: int, method: str, trailing: str = "early") -> float:
    """Decay d of v_old <- d v_old + (1 - d) v after update number `update`, which counts from 0.

    early  min(0.001 update, 0.5), for AWM 0.3: v_old is v at first, and never far behind it
    late   0 for 75 updates, then min(0.0075 (update - 75), 0.999): in the end it hardly moves
    """
    if trailing == "late":
        return min(0.0075 * max(0, update - 75), 0.999)
    return min(0.001 * update, _MOST_DECAY[_loss_of(method)])


def noise_levels(
    sigmas: Tensor, settings: GRPOSettings, count: int, *, seed: int, draw: int = 0
) -> list[float]:
    """`count` sigmas of the schedule (N + 1,), one from each of as many equal strata of those that the steps
    of the window lead to: without the first, which is noise alone, and the last, which has none. With more
    strata than sigmas, some come twice.

    A pure function of seed and draw, the number of what learns together. Raises ValueError for an empty
    window and a schedule of fewer than 2 steps.
    """
    steps = len(sigmas) - 1
    found = [float(sigmas[step + 1]) for step in range(steps) if settings.learns(step, steps)]
    if not found:
        raise ValueError(
            f"no step of {steps} is in the window from {settings.start} to {settings.end}: take at least 2"
            " steps and a wider window"
        )
    stratum = torch.arange(count)
    zero = torch.zeros_like(stratum)
    bits, *_ = philox4x32(
        stratum, zero, zero + draw, zero + _LEVEL_BRANCH, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    )
    places = (stratum + uint_to_uniform(bits).double()) / count * len(found)
    return [found[min(int(place), len(found) - 1)] for place in places]


def score_groups(score: Score, x: Tensor, sigma: float, count: int) -> Tensor:
    """Rewards (B,) of x (B, C, H, W), one group a call: a score never depends on the rest of the batch."""
    rows = torch.arange(len(x), device=x.device)
    found = torch.cat([score(x[part], sigma, part) for part in rows.split(count)])
    return found.to(x.device, torch.float32)


def check_items(latents: Tensor, items: Sequence[int]) -> None:
    """ValueError unless every latent has the number of its noise stream."""
    if len(items) != len(latents):
        raise ValueError(f"{len(items)} item numbers for {len(latents)} latents: give one each")


def _check_samples(samples: Tensor, settings: GRPOSettings, items: Sequence[int]) -> None:
    check_items(samples, items)
    if not settings.is_forward:
        raise ValueError(
            f"method is {settings.method}: learn_forward takes nft, awm, step-nft and step-awm; take"
            " grpo.roll_out"
        )
    if len(samples) % settings.num_branches:
        raise ValueError(f"{len(samples)} latents are no whole groups of {settings.num_branches}")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(
            "the finished samples hold NaN or infinity: nothing was learned from them; lower the learning"
            " rate, or try the model in float32"
        )


@dataclass(frozen=True)
class _Group:
    """What one noise level is learned from: samples, noise and x (B, C, H, W), advantages (B,)."""

    samples: Tensor
    noise: Tensor
    x: Tensor
    sigma: float
    advantages: Tensor


def _loss(
    velocity: Tensor,
    old: Tensor | None,
    reference: Tensor | None,
    group: _Group,
    settings: GRPOSettings,
    forward: ForwardSettings,
    figures: Figures,
) -> Tensor:
    """Mean loss of one noise level, whose figures are noted."""
    most, sigma = settings.advantage_clip, group.sigma
    if settings.method.endswith("nft"):
        own = {"beta": forward.beta, "advantage_clip": most}
        loss = nft_loss(velocity, old, group.x, group.samples, sigma, group.advantages, **own).mean()
    else:
        # The policy that drew the samples is the one that learns; its advantages are shares of the largest.
        own = {"clip": settings.clip, "weighting": forward.weighting}
        shares = group.advantages / most
        loss = awm_loss(velocity, velocity, group.samples, group.noise, sigma, shares, **own).mean()
        if old is not None:
            loss = loss + forward.old_weight * velocity_distance(velocity, old).mean()
    if reference is not None:
        distance = velocity_distance(velocity, reference).mean()
        figures.kl.append(distance.item())
        loss = loss + settings.kl_weight * _DISTANCE_SCALE[_loss_of(settings.method)] * distance
    figures.clipped.append((group.advantages.abs() >= most).float().mean().item())
    figures.passes += len(velocity)
    return loss


def learn_forward(
    policy: Policy,
    score: Score,
    samples: Tensor,
    sigmas: Tensor,
    settings: GRPOSettings,
    forward: ForwardSettings | None = None,
    *,
    seed: int,
    items: Sequence[int],
    backward: Backward,
    old: Policy,
    draw: int = 0,
    reference: Policy | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> Figures:
    """One iteration of settings.method on finished samples: `backward` is called with the loss of every noise
    level, divided by their number.

    samples: (B, C, H, W), the num_branches of a prompt side by side. sigmas: the schedule (N + 1,) whose
    noise levels are learned at. items: numbers of the noise streams, (B,); in step-nft and step-awm a group
    has its first one's. draw: of the noise levels, the same for all that learns together. old: the policy
    that trails; called, as reference is, before the policy whose gradients are wanted, so that both may be
    the same network with other weights. reference: the frozen policy, needed where kl_weight is above 0.
    on_step: called with a noise level's number and how many there are. In the figures kl is the squared
    distance from the reference, clipped the share of advantages at their bound.
    Raises ValueError for parts of groups, samples or rewards that are not finite, and an empty window.
    """
    forward = forward or ForwardSettings()
    _check_samples(samples, settings, items)
    figures, count, local = Figures(), settings.num_branches, settings.method.startswith("step-")
    levels = noise_levels(sigmas, settings, forward.noise_levels, seed=seed, draw=draw)
    streams = [items[row - row % count] if local else items[row] for row in range(len(items))]
    needs_old = asks_old(settings, forward)

    def advantages_of(x: Tensor, sigma: float) -> Tensor:
        rewards = score_groups(score, x, sigma, count).reshape(-1, count)
        return gated_advantages(rewards, settings, figures).flatten()

    with torch.no_grad():
        advantages = None if local else advantages_of(samples, 0.0)
    for number, sigma in enumerate(levels):
        if on_step:
            on_step(number, len(levels))
        noise = candidate_noise(samples.shape[1:], seed, number, streams, [_NOISE_BRANCH], samples.device)
        noise = noise[:, 0]
        x = add_noise(samples, noise, sigma)
        with torch.no_grad():
            here = advantages_of(x, sigma) if local else advantages
            trailing = old(x, sigma).float() if needs_old else None
            frozen = reference(x, sigma).float() if reference and settings.kl_weight else None
        figures.forwards += len(x) * needs_old
        group = _Group(samples, noise, x, sigma, here)
        loss = _loss(policy(x, sigma).float(), trailing, frozen, group, settings, forward, figures)
        backward(loss / len(levels))
    return figures
