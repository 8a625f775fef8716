"""One stochastic step of rectified-flow sampling, and the log-probability of where it landed.

dt = sigma_next - sigma < 0, a = noise_level, v = velocity, eps = unit noise; everything in float32.

SDE (Liu et al. 2025, Flow-GRPO), g = a * sqrt(sigma / (1 - sigma)):

    mean  = x * (1 + g^2 / (2 sigma) * dt) + v * (1 + g^2 (1 - sigma) / (2 sigma)) * dt
    std   = g * sqrt(-dt)
    log p = -(x' - mean)^2 / (2 std^2) - log std - log sqrt(2 pi)          averaged over C, H, W

CPS (coefficient-preserving), s = sigma_next * sin(a pi / 2), x0 = x - sigma v, x1 = x + (1 - sigma) v:

    mean  = x0 * (1 - sigma_next) + x1 * sqrt(sigma_next^2 - s^2)
    std   = s
    log p = -(x' - mean)^2                                                 averaged over C, H, W

In both x' = mean + std * eps. The SDE's denominator 1 - sigma vanishes at sigma = 1; there the next sigma of
the schedule stands in for sigma, which makes the first std exactly a. So that nothing jumps just below 1, and
a coarse start keeps the marginal, the denominator and the first step's std are in full, with l = -dt,

    1 - sigma  ->  max(1 - sigma, l - (1 - sigma))          differs where l > 2 (1 - sigma)
    std^2      <=  2 sigma (sqrt(l^2 + sigma_next^2 / 3) - l)           from sigma 0.9 up

Of noise alone a step leaves (sigma_next - h)^2 + std^2 = sigma_next^2 + 2 h l + h^2, h = std^2 / (2 sigma);
at the bound that is 4/3 of sigma_next^2, which a = 0.7 meets in schedules of three steps and fewer. Between
sigma 0.9 and 0.8 the bound fades out. A step of no length leads nowhere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .flow import expand_sigma

KINDS = ("sde", "cps")

# Schedulers working in float32 start at 0.99999994 as often as at 1.
NEARLY_ONE = 1 - 1e-4
# `sigma_max` of a step that belongs to no schedule: below every sigma.
NO_SCHEDULE = -1.0


class SDEStep(NamedTuple):
    """sample and mean (..., C, H, W); std broadcastable to them; log_prob (...)."""

    sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


def check_noise_level(noise_level: float, kind: str) -> None:
    """Raises ValueError for an unknown kind or a noise level outside its range."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: it must be 'sde' or 'cps'")
    if not (math.isfinite(noise_level) and noise_level >= 0):
        raise ValueError(f"noise_level is {noise_level}: it must be a number of at least 0 (0.7 is usual)")
    if kind == "cps" and noise_level > 1:
        raise ValueError(
            f"noise_level is {noise_level}: CPS is defined from 0 to 1, lower it or use kind 'sde'"
        )


def check_sigmas(sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor, kind: str) -> None:
    """Raises ValueError for a step that does not fall within [0, 1], or from 1 with a sigma_max not below."""
    if not bool(((sigma > 0) & (sigma <= 1 + 1e-4) & (sigma_next >= 0) & (sigma_next <= sigma)).all()):
        raise ValueError(
            f"a step from sigma {sigma.flatten().tolist()} to {sigma_next.flatten().tolist()}: wanted"
            " 1 >= sigma > 0 and sigma >= sigma_next >= 0"
        )
    leaves_one = (sigma >= NEARLY_ONE) & (sigma_next < sigma)
    if kind == "sde" and bool((leaves_one & (sigma_max >= 1)).any()):
        raise ValueError("a step from sigma 1 needs sigma_max, the schedule's next sigma, below 1")


def first_below(sigmas: Sequence[float] | Tensor) -> float:
    """`sigma_max` of a falling schedule (N + 1,): its first sigma below both its start and 1."""
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
    return next((s for s in levels if s < min(levels[0], NEARLY_ONE)), levels[-1])


def _sde_transition(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: Tensor
) -> tuple[Tensor, Tensor]:
    dt = sigma_next - sigma
    length, moves = -dt, dt < 0
    denominator = torch.maximum(1 - sigma, length - (1 - sigma))
    g_squared = noise_level**2 * sigma / torch.where(moves, denominator, 1.0)
    first = (sigma > sigma_max) & (sigma_next <= sigma_max) & moves
    most = 2 * sigma * (torch.sqrt(length**2 + sigma_next**2 / 3) - length)
    most = most / ((sigma - 0.8) * 10).clamp(0, 1) / torch.where(moves, length, 1.0)
    g_squared = torch.where(first, torch.minimum(g_squared, most), g_squared)
    drift = g_squared / (2 * sigma)
    mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
    return mean, torch.sqrt(g_squared * -dt)


def _cps_transition(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    angle = noise_level * math.pi / 2
    # sqrt(sigma_next^2 - s^2) = sigma_next * cos(angle), without the cancellation near a = 1.
    kept = sigma_next * max(math.cos(angle), 0.0)
    mean = (x - sigma * velocity) * (1 - sigma_next) + (x + (1 - sigma) * velocity) * kept
    return mean, sigma_next * math.sin(angle)


def transition(
    latents: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float = 0.7,
    kind: str = "sde",
    sigma_max: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean (..., C, H, W) and std of the Gaussian that the step draws from; see `sde_step`."""
    check_noise_level(noise_level, kind)
    x, velocity = latents.float(), velocity.float()
    sigma, sigma_next = expand_sigma(sigma, x), expand_sigma(sigma_next, x)
    sigma_max = expand_sigma(NO_SCHEDULE if sigma_max is None else sigma_max, x)
    check_sigmas(sigma, sigma_next, sigma_max, kind)
    if kind == "cps":
        return _cps_transition(x, velocity, sigma, sigma_next, noise_level)
    return _sde_transition(x, velocity, sigma, sigma_next, noise_level, sigma_max)


def transition_log_prob(sample: Tensor, mean: Tensor, std: Tensor, kind: str = "sde") -> Tensor:
    """log p(sample) of a step, averaged over C, H, W: (..., C, H, W) -> (...).

    CPS leaves out the normalisation and the variance, as its authors do. A step without noise (std 0) has no
    density; its log p is -(sample - mean)^2 too, which is 0 where the step itself leads.
    """
    squared = (sample.float() - mean) ** 2
    if kind == "cps":
        return -squared.mean(dim=(-3, -2, -1))
    std = torch.as_tensor(std, dtype=torch.float32, device=squared.device)
    noisy = std > 0
    safe = torch.where(noisy, std, torch.ones_like(std))
    density = -squared / (2 * safe**2) - torch.log(safe) - 0.5 * math.log(2 * math.pi)
    return torch.where(noisy, density, -squared).mean(dim=(-3, -2, -1))


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise: Tensor,
    noise_level: float = 0.7,
    kind: str = "sde",
    sigma_max: float | Tensor | None = None,
) -> SDEStep:
    """One stochastic step from sigma to sigma_next.

    latents, velocity, noise: (B, C, H, W), or shapes that broadcast, such as latents (B, 1, C, H, W) with
    noise (B, k, C, H, W) for k candidates from one mean. sigma, sigma_next: floats or one per item (B,).
    sigma_max: `first_below` of the schedule, which tells its first step; without it no std is bounded.
    Raises ValueError for sigmas out of order or outside [0, 1], an unknown kind, or a bad noise level.
    """
    mean, std = transition(latents, velocity, sigma, sigma_next, noise_level, kind, sigma_max)
    sample = mean + std * noise.float()
    return SDEStep(sample, mean, std, transition_log_prob(sample, mean, std, kind))
