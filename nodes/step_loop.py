"""ComfyUI's sampling with `drm.stepwise` as the loop over steps.

    k-diffusion:  sampler(model, x, sigmas, extra_args, callback) -> x       model(x, sigma) -> denoised
    drm.stepwise: sample_stepwise(denoise, score, x, sigmas, ...) -> x, trace

The policy is only ever called through ComfyUI's own wrapper, so CFG, LoRA, ControlNet, areas and hooks apply.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from . import adapters, trace_metadata
from .search import PRESETS, check_calibrated
from .traces import trace_to_dict

if TYPE_CHECKING:
    from ..drm.search import Search

KINDS = ["sde", "cps"]
MAX_BRANCHES = 1024


@dataclass(frozen=True, kw_only=True)
class Branching:
    """What the shared inputs say; names as in drm.stepwise. search: from DRM Search, None without one."""

    num_branches: int
    noise_level: float
    kind: str
    start: float
    end: float
    seed: int
    preset: str = "custom"
    seconds: float = 0.0
    search: "Search | None" = None

    def __post_init__(self) -> None:
        # A linked value escapes the limits of the widget.
        adapters.check_choice("kind", self.kind, KINDS)
        adapters.check_choice("preset", self.preset, PRESETS)
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds is {self.seconds}: give 0 for no limit, or the time it may take")
        if self.search is not None and self.preset != "custom":
            raise ValueError(
                f"a DRM Search is connected and preset is '{self.preset}', which brings its own: set preset"
                " to custom, or disconnect it"
            )
        # What a preset puts its own in place of may be anything.
        if self.preset != "custom":
            return
        if not 1 <= self.num_branches <= MAX_BRANCHES:
            raise ValueError(
                f"num_branches is {self.num_branches}: give a number from 1 to {MAX_BRANCHES} (4 is usual)"
            )
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"branch_start is {self.start} and branch_end {self.end}: wanted 0 <= branch_start <="
                " branch_end <= 1"
            )

    def chosen(self) -> "Branching":
        """The same with what the preset puts in place of num_branches, the window and the search."""
        if self.preset == "custom":
            return self
        from ..drm.search import PRESETS as KNOWN

        preset = KNOWN[self.preset]
        return replace(
            self,
            num_branches=preset.num_branches,
            start=preset.start,
            end=preset.end,
            preset="custom",
            search=preset.search,
        )

    def for_scorer(self, scorer: adapters.Scorer) -> "Branching":
        """`chosen`, without what a preset would like and this scorer cannot say."""
        settings = self.chosen()
        if settings.search is None:
            return settings
        if self.preset == "custom":
            check_calibrated(self.search, scorer)
            return settings
        from ..drm.search import fit_to_scorer

        search, dropped = fit_to_scorer(settings.search, scorer)
        if dropped:
            logging.info("DRM: preset %s without %s, for this DRM has no calibration", self.preset, dropped)
        return replace(settings, search=search)


class KeptRegion:
    """The policy under a noise mask, and what it left out put back on Euler's path.

    Where the mask is 0 the denoised latent is the input latent, whatever is drawn: a candidate takes Euler's
    own step there, bit for bit as stock KSampler does. Elsewhere ComfyUI has blended the denoised latent
    already, and a candidate stays as it is, as in stock euler_ancestral.
    """

    def __init__(self, model: Callable, sigmas: Tensor, extra_args: dict) -> None:
        options = extra_args.get("model_options", {})
        self.model, self.extra_args = model, extra_args
        self.mask, self.mask_function = extra_args["denoise_mask"], options.get("denoise_mask_function")
        # A sampler that wraps this one hands a plain function on, which may have these two and no more.
        self.known = {"model": model.inner_model, "sigmas": getattr(model, "sigmas", sigmas)}

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The policy's x0 (B, C, H, W); remembers where it was called."""
        levels = sigma * x.new_ones([x.shape[0]])
        denoised = self.model(x, levels, **self.extra_args)
        self.x, self.sigma = x, sigma
        # One sigma per item, because dividing by a scalar rounds differently from what k-diffusion does.
        self.velocity = (x - denoised) / levels.reshape(-1, *[1] * (x.ndim - 1))
        drawn = self.mask
        if self.mask_function is not None:
            drawn = self.mask_function(levels, self.mask, extra_options=self.known)
        self.kept = drawn == 0
        return denoised

    def reimpose(self, candidate: Tensor, sigma_next: Tensor) -> Tensor:
        """A candidate (B, C, H, W) at sigma_next with the kept region in place."""
        return torch.where(self.kept, self.x + self.velocity * (sigma_next - self.sigma), candidate)


def sample_with_drm(
    model: comfy.samplers.KSamplerX0Inpaint,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    *,
    drm: comfy.model_patcher.ModelPatcher,
    positive: list,
    branching: Branching,
    on_trace: Callable,
    item_ids: list[int] | None = None,
) -> Tensor:
    """A k-diffusion style sampler function around drm.stepwise.sample_stepwise.

    on_trace(trace, samples): called at the end, with the samples (B, C, H, W) as the LATENT will hold them.
    """
    from ..drm.stepwise import sample_stepwise

    extra_args = extra_args or {}
    guider = model.inner_model
    base = guider.inner_model
    prompts = adapters.ScoringPrompts(positive, base.model_sampling.percent_to_sigma)
    adapters.check_policy(guider.model_patcher, prompts, x)
    adapters.check_drm_fits(drm, prompts, x)
    scorer = adapters.Scorer(drm, prompts, len(x))
    settings = branching.for_scorer(scorer)
    adapters.load_beside(guider, drm)
    masked = None
    # Without injected noise nothing strays.
    if extra_args.get("denoise_mask") is not None and settings.noise_level > 0:
        masked = KeptRegion(model, sigmas, extra_args)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)

    def report(step: dict) -> None:
        mm.throw_exception_if_processing_interrupted()
        if callback is not None:
            sigma = step["sigma"]
            callback(
                {
                    "x": step["x"],
                    "i": step["step"],
                    "sigma": sigma,
                    "sigma_hat": sigma,
                    "denoised": step["denoised"],
                }
            )

    latents, trace = sample_stepwise(
        denoise if masked is None else masked.denoise,
        scorer,
        x,
        sigmas,
        num_branches=settings.num_branches,
        noise_level=settings.noise_level,
        kind=settings.kind,
        seed=settings.seed,
        start=settings.start,
        end=settings.end,
        item_ids=item_ids,
        noise_scale=float(getattr(base.model_sampling, "noise_scale", 1.0)),
        reimpose=None if masked is None else masked.reimpose,
        callback=report,
        interrupt=mm.throw_exception_if_processing_interrupted,
        search=settings.search,
        seconds=settings.seconds or None,
    )
    trace.preset = branching.preset
    trace_metadata.record(trace_to_dict(trace))
    final = base.model_sampling.inverse_noise_scaling(sigmas[-1], latents)
    on_trace(trace, base.process_latent_out(final.to(torch.float32)))
    return latents
