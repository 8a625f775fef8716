"""k candidates from one mean, of the same noise anywhere: one fused kernel on CUDA, plain torch elsewhere.

    x'_ij = mean_i + std_i * noise_scale * eps(seed, step, item_i, branch_j)          mean and std: sde.py

`branch_step` chooses by device between its twin here and branching_triton.py. The streams are noise.py's.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .flow import expand_sigma
from .noise import (
    branch_noise,
    candidate_noise,
    check_streams,
    noise_of_one,
    philox4x32,
    uint_to_uniform,
    uniform_pair_to_normal,
)
from .sde import NO_SCHEDULE, check_noise_level, check_sigmas, transition

__all__ = [
    "Candidates",
    "branch_candidates",
    "branch_noise",
    "branch_step",
    "candidate_noise",
    "philox4x32",
    "uint_to_uniform",
    "uniform_pair_to_normal",
]


def branch_candidates(
    mean: Tensor,
    std: Tensor | float,
    seed: int,
    step: int,
    items: Sequence[int],
    branches: Sequence[int],
    noise_scale: float = 1.0,
) -> Tensor:
    """Candidates mean + std * noise_scale * eps of the given branches.

    mean: (B, C, H, W); std: a float or a tensor that broadcasts against it; items: B stream numbers.
    Returns (B, len(branches), C, H, W) float32. The noise-free mean is never among them: it carries less
    noise than sigma_next says, which a scorer mistakes for quality.
    """
    if len(items) != len(mean):
        raise ValueError(f"{len(items)} item ids for a batch of {len(mean)}: give one per item")
    noise = candidate_noise(mean.shape[1:], seed, step, items, branches, mean.device)
    return _add(mean, std, noise, noise_scale)


def _add(mean: Tensor, std: Tensor | float, noise: Tensor, noise_scale: float) -> Tensor:
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device) * noise_scale
    std = std.unsqueeze(1) if std.ndim == mean.ndim else std
    return torch.addcmul(mean.float().unsqueeze(1), std, noise)


@dataclass(frozen=True)
class Candidates:
    """What one step drew from one mean, branch j of item i under the noise stream (seed, step, i, j).

    scored: (B, k, C, H, W) in the scorer's dtype. std: (B, 1, 1, 1) or (1, 1, 1, 1), before noise_scale.
    """

    scored: Tensor
    std: Tensor
    _state: Callable[[Tensor, Tensor | None], Tensor]

    def state(self, branch: Tensor, rows: Tensor | None = None) -> Tensor:
        """The float32 candidate (n, C, H, W) of branch number branch[i] of batch row rows[i].

        branch: (n,) long, numbers as in `branches` (positions, where those are range(k)); any other branch
        of the step can be had too, for it is drawn again. rows: (n,) long, every row once when None.
        """
        return self._state(branch, rows)


@functools.cache
def _kernel(device: torch.device) -> ModuleType | None:
    """The CUDA kernel's module where it can be had and agrees with the twin, else None, said once."""
    try:
        from . import branching_triton

        x = torch.linspace(-2, 2, 2 * 4 * 3 * 3, device=device).reshape(2, 4, 3, 3)
        address = {"seed": 2**40 + 1, "step": 2, "items": [0, 5], "branches": [0, 3]}
        settings = {"noise_level": 0.7, "kind": "sde", "noise_scale": 1.0, "dtype": torch.float32}
        drawn = branching_triton.branch_step(x, -x, (0.8, 0.6, 0.6), **address, **settings)
        expected = _twin(x, -x, (0.8, 0.6, 0.6), **address, **settings)
        torch.testing.assert_close(drawn.scored, expected.scored, atol=1e-5, rtol=1e-5)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a missing compiler, driver or Triton raises
        # Windows has no Triton of its own: that is nothing to warn of.
        level = logging.INFO if isinstance(error, ImportError) else logging.WARNING
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.getLogger(__name__).log(level, "branching in plain torch, no Triton kernel here: %s", text)
        return None
    return branching_triton


def _twin(
    x: Tensor,
    velocity: Tensor,
    sigmas: tuple[float | Tensor, float | Tensor, float | Tensor],
    *,
    seed: int,
    step: int,
    items: Sequence[int] | Tensor,
    branches: Sequence[int],
    noise_level: float,
    kind: str,
    noise_scale: float,
    dtype: torch.dtype,
) -> Candidates:
    """The step in plain torch, for every device."""
    items = items.tolist() if isinstance(items, Tensor) else items
    mean, std = transition(x, velocity, *sigmas[:2], noise_level, kind, sigmas[2])
    if x.device.type == "cpu" and len(branches) == 1:
        noise = noise_of_one(x.shape[1:], seed, step, items, branches[0])
    else:
        noise = candidate_noise(x.shape[1:], seed, step, items, branches, x.device)
    samples = _add(mean, std, noise, noise_scale)
    position = {number: j for j, number in enumerate(branches)}

    def drawn_again(row: int, branch: int) -> Tensor:
        own, address = std.expand(len(x), *std.shape[1:])[row], (seed, step, [items[row]], [branch])
        return branch_candidates(mean[row : row + 1], own, *address, noise_scale)[0, 0]

    def state(branch: Tensor, rows: Tensor | None) -> Tensor:
        rows = range(len(x)) if rows is None else rows.tolist()
        places = list(zip(rows, branch.tolist(), strict=True))
        if all(number in position for _, number in places):
            return samples[[row for row, _ in places], [position[number] for _, number in places]]
        return torch.stack([drawn_again(row, number) for row, number in places])

    return Candidates(samples.to(dtype), std, state)


def _check_at_hand(x: Tensor, sigmas: tuple[float | Tensor, ...], kind: str) -> None:
    """What `transition` checks, as far as it can be known without waiting for the device."""
    tensors = [sigma for sigma in sigmas if isinstance(sigma, Tensor)]
    for sigma in tensors:  # their shape alone
        expand_sigma(sigma, torch.empty(len(x), 1, device=sigma.device))
    if all(sigma.device.type == "cpu" for sigma in tensors):
        check_sigmas(*(torch.as_tensor(sigma, dtype=torch.float32) for sigma in sigmas), kind)


@torch.no_grad()
def branch_step(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    seed: int,
    step: int,
    items: Sequence[int] | Tensor,
    branches: Sequence[int],
    noise_level: float = 0.7,
    kind: str = "sde",
    sigma_max: float | Tensor | None = None,
    noise_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Candidates:
    """Draws the candidates of one stochastic step (sde.py) from sigma to sigma_next, without gradients.

    x, velocity: (B, C, H, W), of any dtype and layout. sigma, sigma_next, sigma_max: floats, 0-d or one per
    item (B,). items: B stream numbers; branches: k stream numbers; dtype: what `scored` comes in.
    On CUDA one fused kernel does it, which leaves sigmas that lie there unchecked rather than wait for them;
    everywhere else, and where Triton is missing, plain torch.
    """
    if velocity.shape != x.shape or len(items) != len(x):
        raise ValueError(
            f"x {tuple(x.shape)}, velocity {tuple(velocity.shape)}, {len(items)} item ids: wanted two equal"
            " shapes and one id per item"
        )
    check_noise_level(noise_level, kind)
    sigmas = (sigma, sigma_next, NO_SCHEDULE if sigma_max is None else sigma_max)
    kernel = _kernel(x.device) if x.device.type == "cuda" else None
    if kernel:
        _check_at_hand(x, sigmas, kind)
    return (kernel.branch_step if kernel else _twin)(
        x,
        velocity,
        sigmas,
        seed=int(seed) % 2**64,
        step=check_streams([step], "step")[0],
        items=items if isinstance(items, Tensor) else check_streams(items, "item"),
        branches=check_streams(branches, "branch"),
        noise_level=noise_level,
        kind=kind,
        noise_scale=noise_scale,
        dtype=dtype,
    )
