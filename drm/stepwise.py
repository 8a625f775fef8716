"""Step-wise Sampling: at every step k candidates from one velocity, scored at sigma_next, the best continues.

    denoised  = denoise(x, sigma)                       once a step, whatever k; CFG, if any, is inside
    velocity  = (x - denoised) / sigma
    x'_j      = mean(x, velocity) + std * eps_j         j = 1..k, see sde.py and branching.py
    x         = x'_argmax_j score(x'_j, sigma_next)     for each batch item on its own

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) The last step, sigma_next = 0, draws
no noise and scores nothing: it returns the denoised latent. Latents are (B, C, H, W) in model space, float32.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from .branching import branch_candidates
from .flow import velocity_from_denoised
from .sde import check_noise_level, transition

DEFAULT_CHUNK = 16

Denoise = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, float, Tensor], Tensor]


@dataclass
class TraceStep:
    """One step: its sigmas, candidates' scores (B, k) or None where nothing was scored, winners (B,)."""

    sigma: float
    sigma_next: float
    scores: list[list[float]] | None
    winner: list[int]


@dataclass
class Trace:
    """What a run did: its settings and its steps. to_json and from_json are exact inverses."""

    num_branches: int
    noise_level: float
    kind: str
    seed: int
    start: float
    end: float
    noise_scale: float
    item_ids: list[int]
    steps: list[TraceStep] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Raises ValueError when the text is not a trace."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "steps": [TraceStep(**step) for step in fields["steps"]]})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a step-wise sampling trace: {error}") from error


@dataclass(frozen=True)
class _Branching:
    """How a step branches: the settings that stay the same through a run."""

    num_branches: int
    noise_level: float
    kind: str
    seed: int
    noise_scale: float
    item_ids: list[int]
    chunk_size: int
    sigma_max: Tensor


def _check_settings(
    num_branches: int, noise_level: float, noise_scale: float, kind: str, window: tuple
) -> None:
    check_noise_level(noise_level, kind)
    start, end = window
    if num_branches < 1:
        raise ValueError(
            f"num_branches is {num_branches}: at least 1 candidate a step is needed (4 is usual)"
        )
    if not (math.isfinite(noise_scale) and noise_scale >= 0):
        raise ValueError(f"noise_scale is {noise_scale}: it must be a number of at least 0 (1 is usual)")
    if num_branches > 1 and noise_level * noise_scale == 0:
        raise ValueError(
            f"noise_level {noise_level} with noise_scale {noise_scale} makes all {num_branches} candidates"
            " equal: raise the noise (noise_level 0.7 is usual) or set num_branches to 1"
        )
    if not 0 <= start <= end <= 1:
        raise ValueError(f"the branching window is {start} to {end}: wanted 0 <= start <= end <= 1")


def _check_inputs(latents: Tensor, sigmas: Tensor, item_ids: list[int]) -> None:
    if latents.ndim != 4 or latents.numel() == 0:
        raise ValueError(f"latents have shape {tuple(latents.shape)}: wanted a non-empty (B, C, H, W)")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents hold NaN or infinity: look at what made them (a broken VAE or model)")
    if len(item_ids) != len(latents):
        raise ValueError(f"{len(item_ids)} item_ids for a batch of {len(latents)}: give one per item")
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas have shape {tuple(sigmas.shape)}: wanted one falling row of numbers")
    # Not `sigma < 0 or sigma > 1`: written so that NaN fails too.
    if not bool(((sigmas >= 0) & (sigmas <= 1 + 1e-4)).all()):
        raise ValueError(
            f"sigmas run from {sigmas.max():.4g} to {sigmas.min():.4g}: step-wise sampling needs a"
            " flow-matching model, whose sigmas lie in [0, 1] (SD3 and SD3.5 do, SD1.5 and SDXL do not)"
        )
    if bool((sigmas.diff() > 0).any()) or bool((sigmas[:-1] == 0).any()):
        raise ValueError("sigmas must fall from step to step and reach 0 only at the end")


def _chunks(total: int, size: int) -> list[range]:
    """Ranges of one length that cover 0..total; the last may reach beyond, so that all have one shape."""
    count = math.ceil(total / size)
    length = math.ceil(total / count)
    return [range(first, first + length) for first in range(0, total, length)]


def _score_chunk(score: Score, candidates: Tensor, sigma_next: Tensor, rows: range) -> Tensor:
    """Scores (b, k') of candidates (b, k', C, H, W) that belong to the batch rows `rows`."""
    count = candidates.shape[1]
    item_index = torch.tensor(rows, device=candidates.device).repeat_interleave(count)
    scores = torch.as_tensor(score(candidates.flatten(0, 1), float(sigma_next), item_index))
    if scores.shape != item_index.shape:
        raise ValueError(
            f"the scorer returned shape {tuple(scores.shape)} for {len(item_index)} candidates, not one each"
        )
    scores = scores.detach().to(candidates.device, torch.float32)
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise ValueError(
            f"the scorer returned {scores[bad].item()} for batch item {int(item_index[bad])} at sigma"
            f" {float(sigma_next):.4g}: the reward model overflowed or got bad input; try it in float32"
        )
    return scores.reshape(len(rows), count)


def _branch_step(
    score: Score | None,
    x: Tensor,
    velocity: Tensor,
    step: int,
    sigmas: tuple[Tensor, Tensor],
    settings: _Branching,
    reimpose: Callable[[Tensor, Tensor], Tensor] | None,
    interrupt: Callable[[], object] | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The best candidate of every item, (B, C, H, W), all scores (B, k) or None, and the winners (B,).

    Only the best candidate so far is kept, so memory is bounded by a chunk whatever k is.
    """
    sigma, sigma_next = sigmas
    batch, total = len(x), settings.num_branches
    mean, std = transition(
        x, velocity, sigma, sigma_next, settings.noise_level, settings.kind, settings.sigma_max
    )
    # Whole items of k candidates go together when they fit; a larger k is split evenly.
    rows_per_call = max(1, settings.chunk_size // total)
    best, best_scores = x, torch.full((batch,), -torch.inf, device=x.device)
    winner = torch.zeros(batch, dtype=torch.long, device=x.device)
    all_scores = []
    for branches in _chunks(total, settings.chunk_size):
        candidates = branch_candidates(
            mean, std, settings.seed, step, settings.item_ids, branches, settings.noise_scale
        )
        if reimpose is not None:
            candidates = torch.stack([reimpose(c, sigma_next) for c in candidates.unbind(1)], dim=1)
        if total == 1:
            return candidates[:, 0], None, winner
        scores = []
        for first in range(0, batch, rows_per_call):
            if interrupt is not None:
                interrupt()
            rows = range(first, min(first + rows_per_call, batch))
            scores.append(_score_chunk(score, candidates[rows.start : rows.stop], sigma_next, rows))
        # Candidates beyond k only fill the last chunk's shape.
        scores = torch.cat(scores)[:, : total - branches.start]
        chunk_best, chunk_winner = scores.max(dim=1)
        better = chunk_best > best_scores
        chosen = candidates[torch.arange(batch, device=x.device), chunk_winner]
        best = torch.where(better.reshape(-1, 1, 1, 1), chosen, best)
        winner = torch.where(better, chunk_winner + branches.start, winner)
        best_scores = torch.where(better, chunk_best, best_scores)
        all_scores.append(scores)
    return best, torch.cat(all_scores, dim=1), winner


@torch.no_grad()
def sample_stepwise(
    denoise: Denoise,
    score: Score | None,
    latents: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    num_branches: int = 4,
    noise_level: float = 0.7,
    kind: str = "sde",
    seed: int = 0,
    start: float = 0.0,
    end: float = 1.0,
    item_ids: Sequence[int] | None = None,
    noise_scale: float = 1.0,
    reimpose: Callable[[Tensor, Tensor], Tensor] | None = None,
    chunk_size: int | None = None,
    callback: Callable[[dict], object] | None = None,
    interrupt: Callable[[], object] | None = None,
) -> tuple[Tensor, Trace]:
    """Samples along `sigmas`, branching into num_branches candidates at every step of the window.

    denoise: (x (B, C, H, W), sigma 0-d tensor) -> x0, called exactly once a step.
    score: (candidates (n, C, H, W), sigma_next float, item_index (n,) long: the batch row of each) -> (n,),
        higher is better; never called, and may be None, when num_branches is 1.
    latents: x at sigmas[0]. sigmas: (N + 1,) falling within [0, 1]; with fewer than 2 nothing is done.
    num_branches: 1 continues the one stochastic branch; 1 with noise_level 0 is Euler's method bit for bit.
    start, end: the window; step i of N branches when start <= i / N < end, other steps are Euler steps.
    item_ids: number of each item's noise stream, by default its batch row. A batch equals its items run one
        by one under the same numbers.
    noise_scale: multiplies the noise that is added, as s_noise does elsewhere.
    reimpose: (x (B, C, H, W), sigma_next 0-d tensor) -> x with a mask's kept region put back; called on every
        candidate before it is scored, and after every Euler step and the last.
    chunk_size: most candidates a scorer call gets. By default each item's k go in one call of their own, 16
        at most, so that a score never depends on the rest of the batch.
    callback: called once a step with a dict of step, steps, x and denoised (tensors), sigma, sigma_next
        (floats), scores ((B, k) or None). interrupt: called before every scorer call; it raises to cancel.

    Returns the latents and the Trace. Raises ValueError for bad settings, latents, sigmas or scores.
    """
    item_ids = list(range(len(latents))) if item_ids is None else [int(i) for i in item_ids]
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device=latents.device)
    _check_settings(num_branches, noise_level, noise_scale, kind, (start, end))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: at least 1 candidate a call is needed")
    if num_branches > 1 and score is None:
        raise ValueError(
            f"num_branches is {num_branches} but no scorer was given to choose among the candidates"
        )
    trace = Trace(num_branches, noise_level, kind, seed, start, end, noise_scale, item_ids)
    steps = len(sigmas) - 1
    if steps < 1:
        return latents, trace
    _check_inputs(latents, sigmas, item_ids)

    chunk_size = chunk_size or min(num_branches, DEFAULT_CHUNK)
    settings = _Branching(num_branches, noise_level, kind, seed, noise_scale, item_ids, chunk_size, sigmas[1])
    euler_only = num_branches == 1 and noise_level * noise_scale == 0
    x = latents.float()
    for step in range(steps):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        entering, scores = x, None
        winner = torch.zeros(len(x), dtype=torch.long)
        denoised = denoise(x, sigma).float()
        # One sigma per item, because dividing by a scalar rounds differently from what k-diffusion does.
        velocity = velocity_from_denoised(x, denoised, sigma.expand(len(x)))
        last = bool(sigma_next == 0)
        if not last and not euler_only and start <= step / steps < end:
            x, scores, winner = _branch_step(
                score, x, velocity, step, (sigma, sigma_next), settings, reimpose, interrupt
            )
        else:
            x = denoised if last and not euler_only else x + velocity * (sigma_next - sigma)
            x = x if reimpose is None else reimpose(x, sigma_next)
        score_lists = None if scores is None else scores.tolist()
        trace.steps.append(TraceStep(float(sigma), float(sigma_next), score_lists, winner.tolist()))
        if callback is not None:
            callback(
                {
                    "step": step,
                    "steps": steps,
                    "x": entering,
                    "denoised": denoised,
                    "sigma": float(sigma),
                    "sigma_next": float(sigma_next),
                    "scores": scores,
                }
            )
    return x, trace
