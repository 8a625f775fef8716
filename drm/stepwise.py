"""Step-wise Sampling: at every step k candidates from one velocity, scored at sigma_next, the best continues.

    denoised  = denoise(x, sigma)                       once a step, whatever k; CFG, if any, is inside
    velocity  = (x - denoised) / sigma
    x'_j      = mean(x, velocity) + std * eps_j         j = 1..k, see sde.py and branching.py
    x         = x'_argmax_j score(x'_j, sigma_next)     for each batch item on its own

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) The last step, sigma_next = 0, draws
no noise and scores nothing: it returns the denoised latent. Latents are (B, C, H, W) in model space, float32.
search.py says where else candidates may be spent and how else be chosen, race.py does it.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .budget import Budget
from .flow import velocity_from_denoised
from .race import Race, Setup, Step, best_path, one_branch
from .sde import check_noise_level
from .search import FULL, Search, branching_plan
from .trace import Trace, TraceStep

Denoise = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, float, Tensor], Tensor]


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


def _check_scorer(score: Score | None, num_branches: int, search: Search) -> None:
    if score is None and (num_branches > 1 or search.paths > 1):
        raise ValueError(
            f"num_branches is {num_branches} but no scorer was given to choose among the candidates"
        )
    needing = [name for name in ("good_enough", "skip_below") if getattr(search, name)]
    if needing and num_branches > 1 and not getattr(score, "calibration", None):
        raise ValueError(
            f"{' and '.join(needing)} need the reward model's calibration and the scorer has none: leave them"
            " out (drm.search.fit_to_scorer does), or use a reward model whose file holds one"
        )


@dataclass
class _Walk:
    """Where a run is: the paths of every item, best first, and the rows that no longer branch."""

    paths: list[Tensor]
    resting: set[int] = field(default_factory=set)
    calls: int = 0
    scored: Counter[str] = field(default_factory=Counter)

    def denoise(self, setup: Setup, denoise: Denoise, sigma: Tensor) -> list[Tensor]:
        """x0 of every path, in calls of one batch each, as a mask or ControlNet expects it."""
        denoised = []
        for x in self.paths:
            if denoised:
                setup.check_interrupt()
            denoised.append(denoise(x, sigma).float())
        self.calls += len(denoised)
        return denoised

    def merge(self, setup: Setup, sigma: float) -> tuple[Tensor, Tensor]:
        """Goes on with every item's best path alone: its number (B,) and all paths' scores (B, P)."""
        best, which, scores = best_path(setup, self.paths, sigma)
        self.paths = [best]
        self.scored["full"] += scores.numel()
        return which, scores


def _euler(setup: Setup, paths: list[Tensor], velocities: list[Tensor], at: Step) -> list[Tensor]:
    moved = [x + v * (at.sigma_next - at.sigma) for x, v in zip(paths, velocities, strict=True)]
    return moved if setup.reimpose is None else [setup.reimpose(x, at.sigma_next) for x in moved]


def _race(walk: _Walk, setup: Setup, velocities: list[Tensor], at: Step, num_branches: int) -> Race:
    """Moves the paths by one branching step."""
    before = walk.paths
    race = Race(setup, before, velocities, at, num_branches, lambda: _euler(setup, before, velocities, at))
    race.run([row for row in range(len(before[0])) if row not in walk.resting])
    walk.paths = race.paths
    walk.resting |= race.flat
    walk.scored += race.scored
    return race


def _traced(sigmas: tuple[float, float], race: Race | None, batch: int) -> TraceStep:
    """One step as the trace keeps it."""
    if race is None:
        return TraceStep(*sigmas, None, [0] * batch)
    kept = [[max(place, 0) for place in row] for row in race.kept.place.tolist()]
    return TraceStep(
        *sigmas,
        scores=race.scores,
        winner=[row[0] for row in kept],
        kept=kept if race.keep > 1 else None,
        depth=race.depth if any(race.depth) else None,
    )


def _score_table(race: Race | None) -> Tensor | None:
    """(B, m) for the callback, NaN where an item drew fewer."""
    if race is None:
        return None
    rows = [torch.tensor(row) for row in race.scores]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)


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
    search: Search | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, Trace]:
    """Samples along `sigmas`, branching into num_branches candidates at every step of the window.

    denoise: (x (B, C, H, W), sigma 0-d tensor) -> x0, called exactly once a step and kept path.
    score: (candidates (n, C, H, W), sigma_next float, item_index (n,) long: the batch row of each) -> (n,),
        higher is better; never called, and may be None, when num_branches is 1. It may have `dtype` (what
        its candidates come in), `calibration`, and for early exits `staged` and `decisive`, as
        drm.scoring.Scorer has.
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
    callback: called once a step with a dict of step, steps, x and denoised (tensors, of the best path),
        sigma, sigma_next (floats), scores ((B, k) or None). interrupt: called before every scorer call and
        between paths; it raises to cancel.
    search: where candidates are spent and how the next state is chosen; None scores all and takes the best.
    seconds: finish in this time: the first two steps are measured, then k and the window of the others are
        picked (budget.py). clock: what is measured with.

    Returns the latents and the Trace. Raises ValueError for bad settings, latents, sigmas or scores.
    """
    begun, search = clock(), search or FULL
    item_ids = list(range(len(latents))) if item_ids is None else [int(i) for i in item_ids]
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device=latents.device)
    _check_settings(num_branches, noise_level, noise_scale, kind, (start, end))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: at least 1 candidate a call is needed")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds}: give a time above 0, or None for no limit")
    _check_scorer(score, num_branches, search)
    used = None if search is FULL else search.as_dict()
    trace = Trace(num_branches, noise_level, kind, seed, start, end, noise_scale, item_ids, search=used)
    steps = len(sigmas) - 1
    if steps < 1:
        return latents, trace
    _check_inputs(latents, sigmas, item_ids)

    setup = Setup(
        score=score,
        noise_level=noise_level,
        kind=kind,
        seed=seed,
        noise_scale=noise_scale,
        item_ids=item_ids,
        chunk_size=chunk_size,
        sigma_max=sigmas[1],
        search=search,
        reimpose=reimpose,
        interrupt=interrupt,
    )
    levels = sigmas.tolist()
    euler_only = num_branches == 1 and noise_level * noise_scale == 0
    plan = branching_plan(levels, num_branches, start, end, search)
    budget = None if seconds is None else Budget(seconds, clock, plan)
    walk = _Walk([latents.float()])
    for step in range(steps):
        at, last = Step(step, sigmas[step], sigmas[step + 1]), levels[step + 1] == 0
        if len(walk.paths) > 1 and (
            step / steps >= search.beam_end or not (budget is None or budget.fits(step, len(walk.paths)))
        ):
            walk.merge(setup, levels[step])
            setup = replace(setup, search=replace(search, paths=1))
        k = plan[step] if budget is None else budget.branches(step, len(walk.paths))
        entering = walk.paths
        denoised = walk.denoise(setup, denoise, at.sigma)
        # One sigma per item, because dividing by a scalar rounds differently from what k-diffusion does.
        velocities = [
            velocity_from_denoised(x, x0, at.sigma.expand(len(x)))
            for x, x0 in zip(entering, denoised, strict=True)
        ]
        if budget is not None:
            _wait(latents)
            budget.policy_done(len(entering))
        race = None
        if k > 1 and len(walk.resting) < len(latents):
            race = _race(walk, setup, velocities, at, k)
        elif k == 1 and not euler_only:
            walk.paths = [one_branch(setup, entering[0], velocities[0], at)]
        elif last and not euler_only:
            walk.paths = denoised if reimpose is None else [reimpose(x, at.sigma_next) for x in denoised]
        else:
            walk.paths = _euler(setup, entering, velocities, at)
        if budget is not None:
            _wait(latents)
            budget.race_done(k * len(entering) if race is not None else 0)
        traced = _traced((levels[step], levels[step + 1]), race, len(latents))
        if step == steps - 1 and len(walk.paths) > 1:
            which, scores = walk.merge(setup, levels[-1])
            traced = replace(traced, scores=scores.tolist(), winner=which.tolist())
        trace.steps.append(traced)
        if callback is not None:
            callback(
                {
                    "step": step,
                    "steps": steps,
                    "x": entering[0],
                    "denoised": denoised[0],
                    "sigma": levels[step],
                    "sigma_next": levels[step + 1],
                    "scores": _score_table(race),
                }
            )
    _wait(latents)
    trace.spent = {"denoise": walk.calls, "scored": dict(walk.scored), "seconds": clock() - begun}
    if budget is not None:
        trace.budget = {"seconds": seconds, "branches": budget.plan}
    return walk.paths[0], trace


def _wait(like: Tensor) -> None:
    """Until the device has done what it was given, so that a clock measures it."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
