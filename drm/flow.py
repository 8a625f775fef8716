"""Rectified-flow identities and sigma schedules.

    x_sigma  = (1 - sigma) * x0 + sigma * noise          sigma in [0, 1], 1 = pure noise
    velocity = noise - x0 = (x_sigma - x0) / sigma
    shifted  = shift * sigma / (1 + (shift - 1) * sigma)

(Liu et al. 2022, "Flow Straight and Fast"; the shift is equation 23 of Esser et al. 2024, SD3.)
Shapes: latents (B, C, H, W) in model space; a sigma is a float, a 0-d tensor or one per item (B,).
"""

import torch
from torch import Tensor


def expand_sigma(sigma: float | Tensor, like: Tensor) -> Tensor:
    """A sigma, or one per item, as a float32 tensor that broadcasts against `like` (B, ...).

    Raises ValueError when a 1-d sigma's length is neither 1 nor B.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=like.device)
    if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) not in (1, len(like))):
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)} for a batch of {len(like)}: give one or one per item"
        )
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_sigma of shape (B, C, H, W) from a clean latent and unit noise of the same shape."""
    sigma = expand_sigma(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_from_denoised(x: Tensor, denoised: Tensor, sigma: float | Tensor) -> Tensor:
    """The velocity noise - x0 at x_sigma whose clean prediction is `denoised`; sigma must not be 0."""
    return (x - denoised) / expand_sigma(sigma, x)


def denoised_from_velocity(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latent that `velocity` points to from x_sigma."""
    return x - expand_sigma(sigma, x) * velocity


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Moves sigmas towards 1 (shift > 1), as SD3 does for large pictures; keeps 0 and 1 in place."""
    if not shift > 0:
        raise ValueError(f"shift is {shift}: it must be above 0 (SD3 and SD3.5 use 3.0)")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def schedule(steps: int, shift: float = 3.0) -> Tensor:
    """`steps` shifted, evenly spaced sigmas from 1 and a final 0: float32 of shape (steps + 1,)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: a schedule needs at least 1 step")
    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift)
