"""Step-wise Sampling: at every step k candidates from one velocity, scored at sigma_next, the best continues.

    denoised  = denoise(x, sigma)                       once a step, whatever k; CFG, if any, is inside
    velocity  = (x - denoised) / sigma
    x'_j      = mean(x, velocity) + std * eps_j         j = 1..k, see sde.py and branching.py
    x         = x'_argmax_j score(x'_j, sigma_next)     for each batch item on its own

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) The last step, sigma_next = 0, draws
no noise and scores nothing: it returns the denoised latent. Latents are (B, C, H, W) in model space, float32.
presets.py says which steps branch, choice.py how else than by the best the next state may be chosen.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .branching import Candidates, branch_step
from .budget import Budget
from .choice import choose
from .flow import velocity_from_denoised
from .presets import Branching
from .scoring import check_finite
from .sde import first_below
from .trace import Trace, TraceStep

Denoise = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, float, Tensor], Tensor]
Reimpose = Callable[[Tensor, Tensor], Tensor]
DEFAULT_CHUNK = 16


@torch.no_grad()
def sample_stepwise(
    denoise: Denoise,
    score: Score | None,
    latents: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    settings: Branching | None = None,
    item_ids: Sequence[int] | None = None,
    reimpose: Reimpose | None = None,
    chunk_size: int | None = None,
    callback: Callable[[dict], object] | None = None,
    on_fork: Callable[[int, Callable, Tensor, list[int]], object] | None = None,
    interrupt: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **named: object,
) -> tuple[Tensor, Trace]:
    """Samples along `sigmas`, branching into num_branches candidates at every step of the window.

    denoise: (x (B, C, H, W), sigma 0-d tensor) -> x0, called exactly once a step.
    score: (candidates (n, C, H, W), sigma_next float, item_index (n,) long: the batch row of each) -> (n,),
        higher is better; never called, and may be None, when num_branches is 1. It may have `dtype`, what its
        candidates come in.
    latents: x at sigmas[0]. sigmas: (N + 1,) falling within [0, 1]; with fewer than 2 nothing is done.
    settings: see presets.Branching; or its fields by name, num_branches=4, noise_level=0.7, kind="sde",
        seed=0, ...
    item_ids: number of each item's noise stream, by default its batch row. A batch equals its items run one
        by one under the same numbers.
    reimpose: (x (B, C, H, W), sigma_next 0-d tensor) -> x with a mask's kept region put back; called on every
        candidate before it is scored, and after every Euler step and the last.
    chunk_size: most candidates a scorer call gets. By default each item's k go in one call of their own, 16
        at most, so that a score never depends on the rest of the batch.
    callback: called once a step with a dict of step, steps, x and denoised (tensors), sigma, sigma_next
        (floats), scores ((B, k) or None). on_fork: for who would look at those not chosen, called at every
        step that scored with the step, candidate(j) -> the j-th candidate of every item (B, C, H, W) at
        sigma_next, scores (B, k) and winner (B,).
    interrupt: called before every scorer call; it raises to cancel.
    clock: what `seconds` is measured with.

    Returns the latents and the Trace. Raises ValueError for bad settings, latents, sigmas or scores.
    """
    begun = clock()
    settings = settings or Branching(**named)
    run = settings.chosen()
    item_ids = list(range(len(latents))) if item_ids is None else [int(i) for i in item_ids]
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device=latents.device)
    _check_call(run, score, chunk_size)
    trace = Trace(settings, item_ids)
    levels = sigmas.tolist()
    steps = len(levels) - 1
    if steps < 1:
        return latents, trace
    _check_inputs(latents, sigmas, item_ids)

    x, plan = latents.float(), run.plan(levels)
    budget, scored = Budget(run.seconds, clock, latents.device), 0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        k = budget.branches(plan[step], steps - step)
        denoised = denoise(x, sigma).float()
        # One sigma per item, because dividing by a scalar rounds differently from what k-diffusion does.
        velocity = velocity_from_denoised(x, denoised, sigma.expand(len(x)))
        budget.policy_done()
        entering, scores, winner = x, None, [0] * len(x)
        if k == 0:
            last = levels[step + 1] == 0 and not run.is_quiet()
            x = _masked(denoised if last else x + velocity * (sigma_next - sigma), sigma_next, reimpose)
        else:
            drawn = _draw(run, x, velocity, sigmas, step, item_ids, k, score, chunk_size)
            if k > 1:
                scores = _scores(drawn, k, score, levels[step + 1], reimpose, chunk_size, interrupt)
                winner = choose(scores, run, step, item_ids).tolist()
                scored += scores.numel()
            candidate = _candidate(drawn, x, sigma_next, reimpose)
            if on_fork is not None and scores is not None:
                on_fork(step, candidate, scores, winner)
            x = candidate(winner)
        budget.scored(k)
        rows = None if scores is None else scores.tolist()
        trace.steps.append(TraceStep(levels[step], levels[step + 1], rows, winner))
        if callback is not None:
            seen = {"step": step, "steps": steps, "x": entering, "denoised": denoised, "scores": scores}
            callback({**seen, "sigma": levels[step], "sigma_next": levels[step + 1]})
    trace.spent = {"denoise": steps, "scored": scored, "seconds": clock() - begun}
    return x, trace


def _draw(
    run: Branching,
    x: Tensor,
    velocity: Tensor,
    sigmas: Tensor,
    step: int,
    items: list[int],
    k: int,
    score: Score | None,
    chunk_size: int | None,
) -> Candidates:
    """k candidates of every item, and as many more as fill the last call of the scorer."""
    dtype = getattr(score, "dtype", torch.float32) if k > 1 else torch.float32
    return branch_step(
        x,
        velocity,
        sigmas[step],
        sigmas[step + 1],
        seed=run.seed,
        step=step,
        items=items,
        branches=range(_even(k, chunk_size) * _calls(k, chunk_size)),
        noise_level=run.noise_level,
        kind=run.kind,
        sigma_max=first_below(sigmas),
        noise_scale=run.noise_scale,
        dtype=dtype,
    )


def _candidate(
    drawn: Candidates, x: Tensor, sigma_next: Tensor, reimpose: Reimpose | None
) -> Callable[[int | list[int]], Tensor]:
    """What gives the j-th candidate of every item of x, or to each item its own j, (B, C, H, W)."""

    def candidate(j: int | list[int]) -> Tensor:
        places = torch.tensor(j, device=x.device).expand(len(x))
        return _masked(drawn.state(places), sigma_next, reimpose)

    return candidate


def _calls(k: int, chunk_size: int | None) -> int:
    """Into how many calls of the scorer an item's candidates are parted."""
    return math.ceil(k / (chunk_size or DEFAULT_CHUNK))


def _even(k: int, chunk_size: int | None) -> int:
    """Candidates of one such call; all have one length, so that a network sees one shape."""
    return math.ceil(k / _calls(k, chunk_size))


def _scores(
    drawn: Candidates,
    k: int,
    score: Score,
    sigma_next: float,
    reimpose: Reimpose | None,
    chunk_size: int | None,
    interrupt: Callable[[], object] | None,
) -> Tensor:
    """(B, k) on the CPU: every candidate's score at sigma_next."""
    candidates, size = drawn.scored, _even(k, chunk_size)
    if reimpose is not None:
        at = torch.tensor(sigma_next, device=candidates.device)
        candidates = torch.stack([reimpose(branch, at) for branch in candidates.unbind(1)], dim=1)
    together, rows = max(1, (chunk_size or 0) // k), torch.arange(len(candidates), device=candidates.device)
    table = []
    for some in rows.split(together):
        found = []
        for part in candidates[some].split(size, dim=1):
            if interrupt is not None:
                interrupt()
            index = some.repeat_interleave(part.shape[1])
            column = _checked(score(part.flatten(0, 1), sigma_next, index), len(index))
            found.append(column.reshape(part.shape[:2]))
        table.append(torch.cat(found, dim=1))
    scores = torch.cat(table)[:, :k].cpu()
    check_finite(scores, sigma_next)
    return scores


def _checked(scores: Tensor, count: int) -> Tensor:
    scores = torch.as_tensor(scores)
    if scores.shape != (count,):
        raise ValueError(
            f"the scorer returned shape {tuple(scores.shape)} for {count} candidates, not one each"
        )
    return scores.detach().float()


def _masked(x: Tensor, sigma: Tensor, reimpose: Reimpose | None) -> Tensor:
    return x if reimpose is None else reimpose(x, sigma)


def _check_call(run: Branching, score: Score | None, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: at least 1 candidate a call is needed")
    if score is None and run.num_branches > 1:
        raise ValueError(
            f"num_branches is {run.num_branches} but no scorer was given to choose among the candidates"
        )


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
