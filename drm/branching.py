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

import torch
from torch import Tensor

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
