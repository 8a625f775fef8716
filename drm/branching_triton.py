"""The CUDA half of `branching.branch_step`: one Triton kernel from x and velocity to k candidates.

    mean_i, std_i = sde.py's transition of item i                   read x and velocity once
    x'_ij         = mean_i + std_i * noise_scale * eps(seed, step, item_i, branch_j, element)

The noise lives in registers only (noise_triton.py). Sigmas are read on the device or come by value, so that
nothing waits for the host. The float32 state of a winner is drawn a second time from its counters instead of
keeping k of them.

Floating-point contraction is off: the kernel then rounds as the twin in torch does, and a state as its
candidate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branching import Candidates
from .noise_triton import noise_of

WARPS = 4


@triton.jit
def _sigma_of(source, row, STRIDE: tl.constexpr):
    if STRIDE < 0:
        value = source
    else:
        value = tl.load(source + row * STRIDE)
    return value


@triton.jit
def _transition(x, velocity, sigma, sigma_next, sigma_max, level, kept, CPS: tl.constexpr):
    """sde.py's mean and std. level: noise_level^2, or sin of its angle for CPS; kept: that angle's cos."""
    if CPS:
        mean = (x - sigma * velocity) * (1 - sigma_next) + (x + (1 - sigma) * velocity) * (sigma_next * kept)
        std = sigma_next * level
    else:
        dt = sigma_next - sigma
        length, moves = -dt, dt < 0
        denominator = tl.maximum(1 - sigma, length - (1 - sigma))
        g_squared = tl.div_rn(level * sigma, tl.where(moves, denominator, 1.0))
        first = (sigma > sigma_max) & (sigma_next <= sigma_max) & moves & (sigma > 0.8)
        most = 2 * sigma * (tl.sqrt_rn(length * length + tl.div_rn(sigma_next * sigma_next, 3.0)) - length)
        fade = tl.where(first, tl.minimum((sigma - 0.8) * 10, 1.0), 1.0)
        most = tl.div_rn(tl.div_rn(most, fade), tl.where(moves, length, 1.0))
        g_squared = tl.where(first, tl.minimum(g_squared, most), g_squared)
        drift = tl.div_rn(g_squared, 2 * sigma)
        mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        std = tl.sqrt_rn(g_squared * -dt)
    return mean, std


@triton.jit(do_not_specialize=["count", "seed_low", "seed_high", "step"])
def _candidates_kernel(
    x,
    velocity,
    drawn,
    stds,
    rows,
    items,
    branches,
    count,
    sigma,
    sigma_next,
    sigma_max,
    level,
    kept,
    noise_scale,
    seed_low,
    seed_high,
    step,
    elements,
    STRIDE: tl.constexpr,
    STRIDE_NEXT: tl.constexpr,
    STRIDE_MAX: tl.constexpr,
    CPS: tl.constexpr,
    EVEN: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """One program: one block of one latent, all its branches.

    rows: None for every row of x, each with the branches (count,); else n rows, with branches (n, count).
    """
    block, place = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if rows is None:
        row = place
    else:
        row = tl.load(rows + place).to(tl.int64)
        branches += place * count
    counter = block * COUNTERS + tl.arange(0, COUNTERS)
    element = counter[:, None] * 4 + tl.arange(0, 4)[None, :]
    # Nothing to mask where whole blocks fill a latent, as they do at the usual sizes.
    mask = (element < elements) | EVEN
    source = row * elements + element
    mean, std = _transition(
        tl.load(x + source, mask=mask, other=0.0).to(tl.float32),
        tl.load(velocity + source, mask=mask, other=0.0).to(tl.float32),
        _sigma_of(sigma, row, STRIDE),
        _sigma_of(sigma_next, row, STRIDE_NEXT),
        _sigma_of(sigma_max, row, STRIDE_MAX),
        level,
        kept,
        CPS,
    )
    if block == 0:
        tl.store(stds + place, std)
    item, scale = tl.load(items + row).to(tl.uint32), std * noise_scale
    for j in range(count):
        branch = tl.load(branches + j).to(tl.uint32)
        noise = noise_of(seed_low, seed_high, step, item, branch, counter.to(tl.uint32))
        candidate = tl.fma(scale, noise, mean).to(drawn.dtype.element_ty)
        tl.store(drawn + (place * count + j) * elements + element, candidate, mask=mask)


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Stream numbers as int64, copied once: a run asks for the same ones at every step."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _streams(numbers: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    if isinstance(numbers, Tensor):
        return numbers.to(device, torch.int64).contiguous()
    return _on_device(tuple(int(number) for number in numbers), device)


def _sigma(sigma: float | Tensor, device: torch.device) -> tuple[float | Tensor, int]:
    """What the kernel gets, and its stride: -1 for a number by value, 0 for one on the device, 1 for (B,)."""
    if not isinstance(sigma, Tensor) or (sigma.numel() == 1 and sigma.device.type == "cpu" != device.type):
        return float(sigma), -1
    sigma = sigma.to(device, torch.float32).contiguous()
    return sigma, int(sigma.numel() > 1)


def counters_of(elements: int) -> int:
    """How many counters, of four elements each, a program of WARPS warps takes, given an item's size."""
    return 512 if elements >= 2**18 else 256


def signed(word: int) -> int:
    """A uint32 as the int32 of the same bits, so that every seed has the same type for the compiler."""
    return (word ^ 0x80000000) - 0x80000000


def branch_step(
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
    """See `branching.branch_step`, which checks the arguments. sigmas: sigma, sigma_next, sigma_max."""
    device, batch, elements = x.device, len(x), math.prod(x.shape[1:])
    x, velocity = x.contiguous(), velocity.contiguous()
    items, branches = _streams(items, device), _streams(branches, device)
    sigmas, strides = zip(*(_sigma(sigma, device) for sigma in sigmas), strict=True)
    cps, angle = kind == "cps", noise_level * math.pi / 2
    level, kept = (math.sin(angle), max(math.cos(angle), 0.0)) if cps else (noise_level**2, 0.0)
    address = (signed(seed & 0xFFFFFFFF), signed(seed >> 32), signed(step))
    shared = (*sigmas, float(level), kept, float(noise_scale), *address, elements)
    counters = counters_of(elements)
    options = dict(zip(("STRIDE", "STRIDE_NEXT", "STRIDE_MAX"), strides, strict=True))
    options |= {"CPS": cps, "EVEN": elements % (4 * counters) == 0, "COUNTERS": counters}
    options |= {"num_warps": WARPS, "enable_fp_fusion": False}
    blocks = triton.cdiv(elements, 4 * counters)

    def draw(rows: Tensor | None, branches: Tensor, places: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        count = branches.shape[-1]
        drawn = torch.empty(places, count, *x.shape[1:], dtype=dtype, device=device)
        stds = torch.empty(places, *[1] * (x.ndim - 1), device=device)
        with torch.cuda.device_of(x):
            _candidates_kernel[(blocks, places)](
                x, velocity, drawn, stds, rows, items, branches, count, *shared, **options
            )
        return drawn, stds

    def state(branch: Tensor, rows: Tensor | None) -> Tensor:
        rows = _on_device(tuple(range(batch)), device) if rows is None else rows.to(device)
        return draw(rows, branch.to(device).unsqueeze(1), len(branch), torch.float32)[0][:, 0]

    return Candidates(*draw(None, branches, batch, dtype), state)
