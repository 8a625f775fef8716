"""k candidates from one mean, and the noise streams that make them reproducible anywhere.

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
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .flow import expand_sigma
from .sde import check_noise_level, check_sigmas, transition

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


def _check_streams(values: Sequence[int], name: str) -> list[int]:
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


def _cpu_words(c0: np.ndarray, c1: int, c2: np.ndarray, c3: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`philox4x32` of every row and counter as int32 bits (4, rows * counters), ordered w0, w2, w1, w3.

    c0: the counters; c2, c3: one value a row, (rows, 1). Both halves of the state go through each operation
    together and in place: at a few thousand counters a call costs as much as its arithmetic.
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


def _cpu_noise(size: int, seed: int, step: int, items: list[int], branches: list[int]) -> Tensor:
    """(len(items) * len(branches), size) normals, made in pieces that stay in a core's cache."""
    counters, keys = (size + 3) // 4, _round_keys(seed)
    item = np.repeat(np.array(items, np.uint64), len(branches)).reshape(-1, 1)
    branch = np.tile(np.array(branches, np.uint64), len(items)).reshape(-1, 1)
    rows = max(1, _CPU_COUNTERS // max(counters, 1))
    normals = np.empty((len(item), counters, 4), np.float32)
    for row in range(0, len(item), rows):
        some = slice(row, row + rows)
        for first in range(0, counters, _CPU_COUNTERS):
            c0 = np.arange(first, min(first + _CPU_COUNTERS, counters), dtype=np.uint64)
            bits = _cpu_words(c0, step, item[some], branch[some], keys)
            _cpu_normals(bits, normals[some, first : first + len(c0)].reshape(-1, 4))
    return torch.from_numpy(normals).flatten(1)[:, :size]


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
    (step,) = _check_streams([step], "step")
    items, branches = _check_streams(items, "item"), _check_streams(branches, "branch")
    if device.type == "cpu":
        normals = _cpu_noise(size, seed, step, items, branches)
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

    scored: (B, k, C, H, W) in the scorer's dtype. std: (B, 1, 1, 1) or (1, 1, 1, 1), before noise_scale.
    """

    scored: Tensor
    std: Tensor
    _squared: Callable[[], Tensor]
    _state: Callable[[Tensor, Tensor | None], Tensor]

    @property
    def squared(self) -> Tensor:
        """(B, k) float32: mean over C, H, W of (x' - mean)^2, which `sde.log_prob_from_squared` needs."""
        return self._squared()

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
    samples = branch_candidates(mean, std, seed, step, items, branches, noise_scale)
    position = {number: j for j, number in enumerate(branches)}

    def squared() -> Tensor:
        return ((samples - mean.unsqueeze(1)) ** 2).mean(dim=tuple(range(2, samples.ndim)))

    def drawn_again(row: int, branch: int) -> Tensor:
        own, address = std.expand(len(x), *std.shape[1:])[row], (seed, step, [items[row]], [branch])
        return branch_candidates(mean[row : row + 1], own, *address, noise_scale)[0, 0]

    def state(branch: Tensor, rows: Tensor | None) -> Tensor:
        rows = range(len(x)) if rows is None else rows.tolist()
        places = list(zip(rows, branch.tolist(), strict=True))
        if all(number in position for _, number in places):
            return samples[[row for row, _ in places], [position[number] for _, number in places]]
        return torch.stack([drawn_again(row, number) for row, number in places])

    return Candidates(samples.to(dtype), std, squared, state)


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
    sigmas = (sigma, sigma_next, sigma_next if sigma_max is None else sigma_max)
    kernel = _kernel(x.device) if x.device.type == "cuda" else None
    if kernel:
        _check_at_hand(x, sigmas, kind)
    return (kernel.branch_step if kernel else _twin)(
        x,
        velocity,
        sigmas,
        seed=int(seed) % 2**64,
        step=_check_streams([step], "step")[0],
        items=items if isinstance(items, Tensor) else _check_streams(items, "item"),
        branches=_check_streams(branches, "branch"),
        noise_level=noise_level,
        kind=kind,
        noise_scale=noise_scale,
        dtype=dtype,
    )
