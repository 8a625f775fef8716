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

In both x' = mean + std * eps. At sigma = 1 the SDE's denominator 1 - sigma vanishes, so the next sigma of the
run's own schedule (`sigma_max`) stands in for sigma there, which makes the first std exactly a.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .flow import expand_sigma

KINDS = ("sde", "cps")

# Schedulers working in float32 start at 0.99999994 as often as at 1; g would be in the hundreds there.
NEARLY_ONE = 1 - 1e-4


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
    """Raises ValueError for a step that does not fall within [0, 1], or from 1 without a sigma_max below."""
    if not bool(((sigma > 0) & (sigma <= 1 + 1e-4) & (sigma_next >= 0) & (sigma_next <= sigma)).all()):
        raise ValueError(
            f"a step from sigma {sigma.flatten().tolist()} to {sigma_next.flatten().tolist()}: wanted"
            " 1 >= sigma > 0 and sigma >= sigma_next >= 0"
        )
    if kind == "sde" and bool(((sigma >= NEARLY_ONE) & (sigma_max >= 1)).any()):
        raise ValueError("a step from sigma 1 needs sigma_max, the schedule's next sigma, below 1")


def _as_numbers(sigmas: tuple[float | Tensor, ...]) -> list[np.float32] | None:
    """The sigmas where no device need be asked for them: float32 numbers cost a CPU less than tensors."""
    if any(isinstance(s, Tensor) and (s.ndim > 0 or s.device.type != "cpu") for s in sigmas):
        return None
    return [np.float32(float(sigma)) for sigma in sigmas]


def _sde_by_numbers(
    x: Tensor, velocity: Tensor, sigmas: list[np.float32], noise_level: float
) -> tuple[Tensor, Tensor]:
    """`_sde_transition` of one sigma below 1 for all, operation by operation in the same float32."""
    sigma, sigma_next = sigmas
    dt = sigma_next - sigma
    g_squared = np.float32(noise_level**2) * sigma / (1 - sigma)
    drift = g_squared / (2 * sigma)
    mean = x * float(1 + drift * dt) + velocity * float(1 + drift * (1 - sigma)) * float(dt)
    variance = torch.full((1,) * x.ndim, float(g_squared * -dt), device=x.device)
    return mean, torch.sqrt(variance)


def _sde_transition(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: Tensor
) -> tuple[Tensor, Tensor]:
    dt = sigma_next - sigma
    denominator = 1 - torch.where(sigma >= NEARLY_ONE, torch.minimum(sigma, sigma_max), sigma)
    g_squared = noise_level**2 * sigma / denominator
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
    numbers = _as_numbers((sigma, sigma_next))
    if kind == "sde" and numbers and 0 <= numbers[1] <= numbers[0] < NEARLY_ONE and numbers[0] > 0:
        return _sde_by_numbers(x, velocity, numbers, noise_level)
    sigma, sigma_next = expand_sigma(sigma, x), expand_sigma(sigma_next, x)
    sigma_max = sigma_next if sigma_max is None else expand_sigma(sigma_max, x)
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
    sigma_max: the schedule's second sigma, used at sigma = 1 only; sigma_next when not given.
    Raises ValueError for sigmas out of order or outside [0, 1], an unknown kind, or a bad noise level.
    """
    mean, std = transition(latents, velocity, sigma, sigma_next, noise_level, kind, sigma_max)
    sample = mean + std * noise.float()
    return SDEStep(sample, mean, std, transition_log_prob(sample, mean, std, kind))
