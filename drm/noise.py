"""The noise streams that make branches reproducible anywhere.

Noise is a pure function of (seed, step, item, branch, element): counter-based Philox4x32-10 (Salmon et al.
2011, "Parallel Random Numbers: As Easy as 1, 2, 3") and Box-Muller, with Triton's arithmetic throughout. For
the elements 4 i .. 4 i + 3 of a row-major (C, H, W) latent, a Triton kernel draws the same numbers by

    i0, i1, i2, i3 = tl.philox(seed, i, step, item, branch)              # counter words c0..c3, key = seed
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(i0), tl.uint_to_uniform_float(i1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(i2), tl.uint_to_uniform_float(i3))

with uint32 counters and a 64-bit seed; for step = item = branch = 0 that is `tl.randn4x(seed, i)`. The
integers are equal bit for bit on every device and in our own kernel (noise_triton.py), the normals to 1e-6.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# Triton's constant: the largest float with 2^31 * scale < 1.
_SCALE = 4.6566127342e-10
_ROUNDS = np.array([[_ROUND_A], [_ROUND_B]], dtype=np.uint64)
_WORD_MASK, _WORD_BITS = np.uint64(_MASK), np.uint64(32)
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


def check_streams(values: Sequence[int], name: str) -> list[int]:
    values = [int(value) for value in values]
    for value in values:
        if not 0 <= value <= _MASK:
            raise ValueError(f"{name} is {value}: noise streams are numbered from 0 to {_MASK}")
    return values


def _normals(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> Tensor:
    """Four normals of every counter, side by side: (rows, len(c0), 4)."""
    u = [uint_to_uniform(word) for word in philox4x32(c0, c1, c2, c3, seed & _MASK, seed >> 32)]
    (n0, n1), (n2, n3) = uniform_pair_to_normal(u[0], u[1]), uniform_pair_to_normal(u[2], u[3])
    return torch.stack((n0, n1, n2, n3), dim=-1)


def _round_keys(seed: int, rounds: int = 10) -> np.ndarray:
    keys = [((seed + i * _KEY_A) & _MASK, ((seed >> 32) + i * _KEY_B) & _MASK) for i in range(rounds)]
    return np.array(keys, dtype=np.uint64).reshape(rounds, 2, 1)


def _cpu_words(
    c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """`philox4x32` of every row and counter as int32 bits (4, rows * counters), ordered w0, w2, w1, w3.

    c0: the counters; c1, c2, c3: one value a row, (rows, 1). Both halves of the state go through each
    operation together and in place: at a few thousand counters a call costs as much as its arithmetic.
    """
    shape = (2, len(c2), len(c0))
    multiplied, mixed, product = (np.empty(shape, np.uint64) for _ in range(3))
    multiplied[0], multiplied[1], mixed[0], mixed[1] = c0, c2, c1, c3
    multiplied, mixed, product = (array.reshape(2, -1) for array in (multiplied, mixed, product))
    for key in keys:
        np.multiply(multiplied, _ROUNDS, out=product)
        np.bitwise_xor(mixed, key, out=mixed)
        np.right_shift(product, _WORD_BITS, out=multiplied)
        multiplied = multiplied[::-1]
        np.bitwise_xor(multiplied, mixed, out=multiplied)
        np.bitwise_and(product, _WORD_MASK, out=product)
        mixed, product = product[::-1], mixed
    words = np.empty((4, mixed.shape[1]), np.uint32)
    np.copyto(words[:2], multiplied, casting="unsafe")
    np.copyto(words[2:], mixed, casting="unsafe")
    return words.view(np.int32)


def _cpu_normals(bits: np.ndarray, out: np.ndarray) -> None:
    """Box-Muller in place on `_cpu_words` (4, n), into out (n, 4): the arithmetic of `_normals`, bit for bit.

    log, sqrt, cos and sin are torch's, because numpy's differ in the last place.
    """
    bits ^= bits >> 31  # folds as uint_to_uniform does: the complement of a negative number
    uniform = bits.astype(np.float32)
    uniform *= np.float32(_SCALE)
    radius, angle = uniform[:2], uniform[2:]
    np.maximum(radius, np.float32(1.0e-7), out=radius)
    torch.from_numpy(radius).log_().mul_(-2.0).sqrt_()
    angle *= np.float32(2 * math.pi)
    cosine = torch.from_numpy(angle).cos().numpy()
    torch.from_numpy(angle).sin_()
    for pair in range(2):
        np.multiply(radius[pair], cosine[pair], out=out[:, 2 * pair])
        np.multiply(radius[pair], angle[pair], out=out[:, 2 * pair + 1])


def _cpu_noise(size: int, seed: int, steps: range, items: list[int], branches: list[int]) -> Tensor:
    """(len(steps) * len(items) * len(branches), size) normals, made in pieces that stay in a core's cache."""
    counters, keys = (size + 3) // 4, _round_keys(seed)
    grid = np.meshgrid(steps, items, branches, indexing="ij")
    step, item, branch = (axis.astype(np.uint64).reshape(-1, 1) for axis in grid)
    rows = max(1, _CPU_COUNTERS // max(counters, 1))
    normals = np.empty((len(item), counters, 4), np.float32)
    for row in range(0, len(item), rows):
        some = slice(row, row + rows)
        for first in range(0, counters, _CPU_COUNTERS):
            c0 = np.arange(first, min(first + _CPU_COUNTERS, counters), dtype=np.uint64)
            bits = _cpu_words(c0, step[some], item[some], branch[some], keys)
            _cpu_normals(bits, normals[some, first : first + len(c0)].reshape(-1, 4))
    return torch.from_numpy(normals).flatten(1)[:, :size]


@functools.lru_cache(maxsize=2)
def _cpu_ahead(size: int, seed: int, steps: range, items: tuple[int, ...], branch: int) -> Tensor:
    """One branch's noise for several steps, (len(steps), len(items), size)."""
    return _cpu_noise(size, seed, steps, list(items), [branch]).reshape(len(steps), len(items), size)


def noise_of_one(shape: Sequence[int], seed: int, step: int, items: Sequence[int], branch: int) -> Tensor:
    """`candidate_noise` of one branch on the CPU, for reading only, by drawing a few steps ahead.

    A small latent's noise is mostly the overhead of calls, which the steps then share.
    """
    size = math.prod(shape)
    ahead = max(1, min(8, 2 * _CPU_COUNTERS // max(1, len(items) * size // 4)))
    steps = range(step - step % ahead, min(step - step % ahead + ahead, _MASK + 1))
    drawn = _cpu_ahead(size, seed, steps, tuple(items), branch)
    return drawn[step % ahead].reshape(len(items), 1, *shape)


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
    size, device, seed = math.prod(shape), torch.device(device), int(seed) % 2**64
    (step,) = check_streams([step], "step")
    items, branches = check_streams(items, "item"), check_streams(branches, "branch")
    if device.type == "cpu":
        normals = _cpu_noise(size, seed, range(step, step + 1), items, branches)
    else:
        c0, c1, c2, c3 = (
            torch.as_tensor(words, dtype=torch.int64, device=device)
            for words in (range((size + 3) // 4), step, items, branches)
        )
        c2, c3 = c2.repeat_interleave(len(c3)).unsqueeze(1), c3.repeat(len(c2)).unsqueeze(1)
        normals = _normals(c0, c1, c2, c3, seed).flatten(1)[:, :size]
    return normals.reshape(len(items), len(branches), *shape)


def branch_noise(
    shape: Sequence[int], seed: int, step: int, item: int, branch: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Unit noise of one branch: float32 of `shape`, a pure function of (seed, step, item, branch, element).

    seed: any integer, taken modulo 2^64. step, item, branch: 0 to 2^32 - 1, ValueError otherwise.
    """
    return candidate_noise(shape, seed, step, [item], [branch], device)[0, 0]
