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
from dataclasses import replace

import torch
from torch import Tensor

from .budget import Budget
from .candidates import Setup, Step
from .flow import velocity_from_denoised
from .race import Race, best_path, one_branch
from .sde import check_noise_level, first_below
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


class _Walk:
    """Where a run is: the paths of every item, best first, and the rows that no longer branch."""

    def __init__(
        self, setup: Setup, denoise: Denoise, latents: Tensor, budget: Budget | None, euler_only: bool
    ) -> None:
        self.setup, self.denoise, self.budget, self.euler_only = setup, denoise, budget, euler_only
        self.paths = [latents.float()]
        self.resting: set[int] = set()
        self.calls, self.scored = 0, Counter()

    def step(self, at: Step, num_branches: int, last: bool) -> tuple[list[Tensor], Race | None]:
        """One step of every path; what was predicted for each, and the race where there was one."""
        denoised = self._denoised(at.sigma)
        # One sigma per item, because dividing by a scalar rounds differently from what k-diffusion does.
        sigmas = at.sigma.expand(len(denoised[0]))
        velocities = [
            velocity_from_denoised(x, x0, sigmas) for x, x0 in zip(self.paths, denoised, strict=True)
        ]
        self._measured(lambda budget: budget.policy_done(len(denoised)))
        race = None
        if num_branches > 1 and len(self.resting) < len(self.paths[0]):
            race = self._race(at, velocities, num_branches)
        elif num_branches == 1 and not self.euler_only:
            self.paths = [one_branch(self.setup, self.paths[0], velocities[0], at)]
        elif last and not self.euler_only:
            self.paths = self._masked(denoised, at.sigma_next)
        else:
            self.paths = self._euler(self.paths, velocities, at)
        drawn = 0 if race is None else num_branches * len(denoised)
        self._measured(lambda budget: budget.race_done(drawn))
        return denoised, race

    def narrow(self, step: int, steps: int, sigma: float) -> None:
        """Goes on with one path where the beam ends, or where the budget has no room for more."""
        fits = self.budget is None or self.budget.fits(step, len(self.paths))
        if len(self.paths) > 1 and (step / steps >= self.setup.search.beam_end or not fits):
            self.merge(sigma)
            self.setup = replace(self.setup, search=replace(self.setup.search, paths=1))

    def merge(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Takes every item's best path at sigma: its number (B,), and all paths' scores (B, P)."""
        best, which, scores = best_path(self.setup, self.paths, sigma)
        self.paths = [best]
        self.scored["full"] += scores.numel()
        return which, scores

    def _denoised(self, sigma: Tensor) -> list[Tensor]:
        """x0 of every path, in calls of one batch each, as masks and ControlNet expect it."""
        denoised = []
        for x in self.paths:
            if denoised:
                self.setup.check_interrupt()
            denoised.append(self.denoise(x, sigma).float())
        self.calls += len(denoised)
        return denoised

    def _race(self, at: Step, velocities: list[Tensor], num_branches: int) -> Race:
        before = self.paths
        race = Race(
            self.setup, before, velocities, at, num_branches, lambda: self._euler(before, velocities, at)
        )
        race.run([row for row in range(len(before[0])) if row not in self.resting])
        self.paths = race.paths
        self.resting |= race.flat
        self.scored += race.scored
        return race

    def _euler(self, paths: list[Tensor], velocities: list[Tensor], at: Step) -> list[Tensor]:
        length = at.sigma_next - at.sigma
        return self._masked([x + v * length for x, v in zip(paths, velocities, strict=True)], at.sigma_next)

    def _masked(self, paths: list[Tensor], sigma: Tensor) -> list[Tensor]:
        reimpose = self.setup.reimpose
        return paths if reimpose is None else [reimpose(x, sigma) for x in paths]

    def _measured(self, note: Callable[[Budget], None]) -> None:
        if self.budget is not None:
            _wait(self.paths[0])
            note(self.budget)


def _wait(like: Tensor) -> None:
    """Until the device has done what it was given, so that a clock measures it."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def _traced(sigma: float, sigma_next: float, race: Race | None, batch: int) -> TraceStep:
    """One step as the trace keeps it."""
    if race is None:
        return TraceStep(sigma, sigma_next, None, [0] * batch)
    kept = race.kept.place.clamp_min(0).tolist()
    return TraceStep(
        sigma,
        sigma_next,
        race.scores,
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
    begun, used = clock(), None if search is None else search.as_dict()
    search = search or FULL
    item_ids = list(range(len(latents))) if item_ids is None else [int(i) for i in item_ids]
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device=latents.device)
    _check_settings(num_branches, noise_level, noise_scale, kind, (start, end))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: at least 1 candidate a call is needed")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds}: give a time above 0, or None for no limit")
    _check_scorer(score, num_branches, search)
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
        sigma_max=first_below(sigmas),
        search=search,
        reimpose=reimpose,
        interrupt=interrupt,
    )
    levels = sigmas.tolist()
    plan = branching_plan(levels, num_branches, start, end, search)
    budget = None if seconds is None else Budget(seconds, clock, plan)
    walk = _Walk(setup, denoise, latents, budget, num_branches == 1 and noise_level * noise_scale == 0)
    for step in range(steps):
        walk.narrow(step, steps, levels[step])
        k = plan[step] if budget is None else budget.branches(step, len(walk.paths))
        entering = walk.paths[0]
        at = Step(step, sigmas[step], sigmas[step + 1])
        denoised, race = walk.step(at, k, last=levels[step + 1] == 0)
        traced = _traced(levels[step], levels[step + 1], race, len(latents))
        if step == steps - 1 and len(walk.paths) > 1:
            which, scores = walk.merge(levels[-1])
            traced = replace(traced, scores=scores.tolist(), winner=which.tolist())
        trace.steps.append(traced)
        if callback is not None:
            callback(
                {
                    "step": step,
                    "steps": steps,
                    "x": entering,
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
