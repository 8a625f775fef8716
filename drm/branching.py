"""k candidates from one mean, and the noise streams that make them reproducible anywhere.

Noise is a pure function of (seed, step, item, branch, element): counter-based Philox4x32-10 (Salmon et al.
2011, "Parallel Random Numbers: As Easy as 1, 2, 3") and Box-Muller, with Triton's arithmetic throughout. For
the elements 4 i .. 4 i + 3 of a row-major (C, H, W) latent, a Triton kernel draws the same numbers by

    i0, i1, i2, i3 = tl.philox(seed, i, step, item, branch)              # counter words c0..c3, key = seed
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(i0), tl.uint_to_uniform_float(i1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(i2), tl.uint_to_uniform_float(i3))

with uint32 counters and a 64-bit seed; for step = item = branch = 0 that is `tl.randn4x(seed, i)`. The
integers are equal bit for bit on every device, the normals to the last places of log, cos and sin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sde import transition

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# Triton's constant: the largest float with 2^31 * scale < 1.
_SCALE = 4.6566127342e-10
# Counters at a time on a CPU: they stay in cache, and below the size where torch wakes its other threads.
_CPU_COUNTERS = 8192


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four words of random bits for every counter.

    c0..c3: int64 tensors holding uint32 values, of shapes that broadcast. k0, k1: the key, low word first.
    Returns four int64 tensors of the common shape with values in [0, 2^32).
    """
    for _ in range(rounds):
        # An int64 product wraps, yet its 64 bits are the unsigned one's; masking recovers the high word.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product_a >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_b & _MASK, product_a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def uint_to_uniform(bits: Tensor) -> Tensor:
    """uint32 values (as int64) to float32 in [0, 1), by Triton's folding of the sign bit."""
    folded = torch.where(bits > 0x7FFFFFFF, _MASK - bits, bits)
    return folded.to(torch.float32) * _SCALE


def uniform_pair_to_normal(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller: two uniform float32 tensors to two independent standard normal ones."""
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1.0e-7)))
    angle = (2 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _words(values: Sequence[int], name: str, device: torch.device | str) -> Tensor:
    for value in values:
        if not 0 <= value <= _MASK:
            raise ValueError(f"{name} is {value}: noise streams are numbered from 0 to {_MASK}")
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def _normals(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Four normals of every counter, side by side: (rows, len(c0), 4)."""
    words = philox4x32(c0, c1, c2, c3, seed & _MASK, seed >> 32)
    n0, n1 = uniform_pair_to_normal(uint_to_uniform(words[0]), uint_to_uniform(words[1]))
    n2, n3 = uniform_pair_to_normal(uint_to_uniform(words[2]), uint_to_uniform(words[3]))
    return torch.stack((n0, n1, n2, n3), dim=-1)


def candidate_noise(
    shape: Sequence[int],
    seed: int,
    step: int,
    items: Sequence[int],
    branches: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Unit noise of several items and branches at once: float32 (len(items), len(branches), *shape).

    Row [i, j] equals `branch_noise(shape, seed, step, items[i], branches[j])` bit for bit.
    """
    size, device = math.prod(shape), torch.device(device)
    counters = (size + 3) // 4
    c0 = torch.arange(counters, dtype=torch.int64, device=device)
    c1 = _words([step], "step", device)
    c2 = _words(items, "item", device).repeat_interleave(len(branches)).reshape(-1, 1)
    c3 = _words(branches, "branch", device).repeat(len(items)).reshape(-1, 1)
    rows = max(1, _CPU_COUNTERS // max(counters, 1)) if device.type == "cpu" else max(len(c2), 1)
    normals = torch.empty(len(c2), counters, 4, device=device)
    for part, item, branch in zip(normals.split(rows), c2.split(rows), c3.split(rows), strict=True):
        part.copy_(_normals(c0, c1, item, branch, int(seed) % 2**64))
    return normals.flatten(1)[:, :size].reshape(len(items), len(branches), *shape)


def branch_noise(
    shape: Sequence[int], seed: int, step: int, item: int, branch: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Unit noise of one branch: float32 of `shape`, a pure function of (seed, step, item, branch, element).

    seed: any integer, taken modulo 2^64. step, item, branch: 0 to 2^32 - 1, ValueError otherwise.
    """
    return candidate_noise(shape, seed, step, [item], [branch], device)[0, 0]


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
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device) * noise_scale
    std = std.unsqueeze(1) if std.ndim == mean.ndim else std
    return torch.addcmul(mean.float().unsqueeze(1), std, noise)


@dataclass(frozen=True)
class Candidates:
    """What one step drew from one mean, branch j of item i under the noise stream (seed, step, i, j).

    scored: (B, k, C, H, W) in the scorer's dtype. squared: (B, k) float32, mean over C, H, W of
    (x' - mean)^2, which `sde.log_prob_from_squared` needs. std: float32, (B, 1, 1, 1) or (1, 1, 1, 1).
    """

    scored: Tensor
    squared: Tensor
    std: Tensor
    _mean: Tensor
    _samples: Tensor
    _address: tuple[int, int, Sequence[int], Sequence[int], float]

    def state(self, branch: Tensor, rows: Tensor | None = None) -> Tensor:
        """The float32 candidate (n, C, H, W) of branch number branch[i] of batch row rows[i].

        branch: (n,) long, the numbers given as `branches` (positions, where those are range(k)); any other
        branch of the step can be had too, for it is drawn again. rows: (n,) long, every row once when None.
        """
        rows = torch.arange(len(self._mean), device=branch.device) if rows is None else rows
        seed, step, items, branches, noise_scale = self._address
        found = branch.unsqueeze(1) == torch.tensor(list(branches), device=branch.device)
        if bool(found.any(dim=1).all()):
            return self._samples[rows, found.int().argmax(dim=1)]
        drawn = [
            branch_candidates(
                self._mean[row : row + 1],
                self.std[row : row + 1] if len(self.std) > 1 else self.std,
                seed,
                step,
                [items[row]],
                [number],
                noise_scale,
            )[0, 0]
            for row, number in zip(rows.tolist(), branch.tolist(), strict=True)
        ]
        return torch.stack(drawn)


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
    """Draws the candidates of one stochastic step (sde.py) from sigma to sigma_next.

    x, velocity: (B, C, H, W), of any dtype. sigma, sigma_next, sigma_max: floats, 0-d or one per item (B,).
    items: B stream numbers; branches: k stream numbers; dtype: what `scored` comes in.
    """
    items = items.tolist() if isinstance(items, Tensor) else items
    mean, std = transition(x, velocity, sigma, sigma_next, noise_level, kind, sigma_max)
    samples = branch_candidates(mean, std, seed, step, items, branches, noise_scale)
    squared = ((samples - mean.unsqueeze(1)) ** 2).mean(dim=(-3, -2, -1))
    address = (seed, step, items, branches, noise_scale)
    return Candidates(samples.to(dtype), squared, std, mean, samples, address)
