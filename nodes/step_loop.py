"""ComfyUI's sampling with `drm.stepwise` as the loop over steps.

    k-diffusion:  sampler(model, x, sigmas, extra_args, callback) -> x       model(x, sigma) -> denoised
    drm.stepwise: sample_stepwise(denoise, score, x, sigmas, ...) -> x, trace

The policy is only ever called through ComfyUI's own wrapper, so CFG, LoRA, ControlNet, areas and hooks apply.
"""

from collections.abc import Callable
from dataclasses import replace

import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ..drm.presets import PRESETS, Branching
from ..drm.sde import KINDS
from . import adapters, reuse, trace_metadata, trunk
from .forks import ForkKeeper, fork_steps
from .traces import trace_to_dict

MAX_BRANCHES = 1024


def branching_of(
    *,
    seed: int,
    num_branches: int = 4,
    noise_level: float = 0.7,
    kind: str = "sde",
    branch_start: float = 0.0,
    branch_end: float = 1.0,
    preset: str = "custom",
    seconds: float = 0.0,
    search: dict | None = None,
) -> Branching:
    """The settings that the shared inputs ask for; the defaults are those of graphs that lack an input.

    Raises ValueError for what makes no sense: a linked value escapes the limits of its widget.
    """
    adapters.check_choice("kind", kind, list(KINDS))
    adapters.check_choice("preset", preset, ["custom", *PRESETS])
    if search is not None and preset != "custom":
        raise ValueError(
            f"a DRM Search is connected and preset is '{preset}', which brings its own: set preset to custom,"
            " or disconnect it"
        )
    if preset == "custom" and not 1 <= num_branches <= MAX_BRANCHES:
        raise ValueError(
            f"num_branches is {num_branches}: give a number from 1 to {MAX_BRANCHES} (4 is usual)"
        )
    if preset == "custom" and not 0 <= branch_start <= branch_end <= 1:
        raise ValueError(
            f"branch_start is {branch_start} and branch_end {branch_end}: wanted 0 <= branch_start <="
            " branch_end <= 1"
        )
    settings = Branching(
        num_branches=num_branches,
        noise_level=noise_level,
        kind=kind,
        start=branch_start,
        end=branch_end,
        seed=seed,
        preset=preset,
        seconds=seconds,
        **(search or {}),
    )
    settings.chosen()
    return settings


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
        """The policy's x0, of x's shape; remembers where it was called."""
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
        """A candidate, of x's shape, at sigma_next with the kept region in place."""
        return torch.where(self.kept, self.x + self.velocity * (sigma_next - self.sigma), candidate)

    def unframed(self, framed: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
        """denoise and reimpose for latents (B, C, H, W)."""
        return (
            lambda x, sigma: adapters.without_frames(self.denoise(framed(x), sigma)),
            lambda x, sigma_next: adapters.without_frames(self.reimpose(framed(x), sigma_next)),
        )


def check(
    model: comfy.model_patcher.ModelPatcher,
    drm: comfy.model_patcher.ModelPatcher,
    prompts: adapters.ScoringPrompts,
    samples: Tensor,
) -> None:
    """Raises ValueError when the MODEL cannot be sampled step-wise, or not with this DRM."""
    adapters.check_policy(model, prompts, samples)
    if adapters.is_shared(drm):
        trunk.check_fits(drm, model, samples)
    else:
        adapters.check_drm_fits(drm, prompts, samples, model)


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
    film_strip: int = 0,
) -> Tensor:
    """A k-diffusion style sampler function around drm.stepwise.sample_stepwise.

    x: (B, C, H, W), or (B, C, 1, H, W) of models that have videos too. on_trace(trace, samples): called at
    the end, with the samples as the LATENT will hold them. film_strip: forks to keep for DRM Film Strip.
    """
    from ..drm.stepwise import sample_stepwise

    extra_args = extra_args or {}
    guider = model.inner_model
    base = guider.inner_model
    prompts = adapters.ScoringPrompts(positive, base.model_sampling.percent_to_sigma)
    check(guider.model_patcher, drm, prompts, x)
    scorer = scorer_of(drm, model, prompts, x, extra_args)
    noise_scale = float(getattr(base.model_sampling, "noise_scale", 1.0))
    settings = replace(branching, noise_scale=noise_scale)
    adapters.load_beside(guider, drm)
    framed = _framed_as(x)

    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        return adapters.without_frames(model(framed(x), sigma * x.new_ones([x.shape[0]]), **extra_args))

    kept, reused = _kept_region(model, sigmas, extra_args, settings), None
    denoise, reimpose = kept.unframed(framed) if kept else (plain, None)
    if adapters.is_shared(drm) and not _has_mask(extra_args):
        denoise = reused = reuse.Reuse(scorer.tokens, guider, denoise)
    keeper = ForkKeeper(
        fork_steps(settings.chosen().plan(sigmas.tolist()), film_strip),
        sigmas,
        plain,
        lambda x0: base.process_latent_out(framed(x0)),
    )

    latents, trace = sample_stepwise(
        denoise,
        scorer,
        adapters.without_frames(x),
        sigmas,
        settings=settings,
        item_ids=item_ids,
        reimpose=reimpose,
        callback=lambda step: _report(step, callback, framed),
        on_fork=keeper,
        interrupt=mm.throw_exception_if_processing_interrupted,
    )
    trace.forks = keeper.forks
    if keeper.passes:
        trace.spent["film"] = keeper.passes
    if adapters.is_shared(drm) and trace.spent is not None:
        trace.spent |= _spent_on_trunk(base, drm, scorer, reused)
    trace_metadata.record(trace_to_dict(trace))
    latents = framed(latents)
    final = base.model_sampling.inverse_noise_scaling(sigmas[-1], latents)
    on_trace(trace, base.process_latent_out(final.to(torch.float32)))
    return latents


def _kept_region(
    model: comfy.samplers.KSamplerX0Inpaint, sigmas: Tensor, extra_args: dict, settings: Branching
) -> KeptRegion | None:
    """The mask's kept region, where injected noise may stray from it."""
    strays = _has_mask(extra_args) and not settings.chosen().is_quiet()
    return KeptRegion(model, sigmas, extra_args) if strays else None


def _has_mask(extra_args: dict) -> bool:
    return extra_args.get("denoise_mask") is not None


def _spent_on_trunk(
    base: object, drm: comfy.model_patcher.ModelPatcher, scorer: Callable, reused: reuse.Reuse | None
) -> dict[str, float]:
    """What scoring walked of the model's own network, and what of that was reused, in passes of a picture."""
    share = trunk.share_of_pass(base, drm.model.trunk.taps[-1])
    return {
        "trunk": round(share * scorer.walked, 3),
        "reused": round(share * (reused.saved if reused else 0), 3),
    }


def scorer_of(
    drm: comfy.model_patcher.ModelPatcher,
    model: comfy.samplers.KSamplerX0Inpaint,
    prompts: adapters.ScoringPrompts,
    x: Tensor,
    extra_args: dict,
) -> Callable[[Tensor, float, Tensor], Tensor]:
    """What scores a batch's candidates: the DRM's own network, or its head on the MODEL that samples."""
    if not adapters.is_shared(drm):
        return adapters.Scorer(drm, prompts, len(x))
    return trunk.shared_scorer(
        drm,
        model.inner_model.inner_model,
        extra_args.get("model_options", {}),
        prompts,
        x,
        latent_image=getattr(model, "latent_image", None),
        denoise_mask=extra_args.get("denoise_mask"),
    )


def _framed_as(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Puts the one frame of `like`, if it has any, into latents (B, C, H, W)."""
    return lambda x: x.unsqueeze(2) if like.ndim == 5 else x


def _report(step: dict, callback: Callable | None, framed: Callable[[Tensor], Tensor]) -> None:
    mm.throw_exception_if_processing_interrupted()
    if callback is not None:
        sigma = step["sigma"]
        seen = {"x": framed(step["x"]), "denoised": framed(step["denoised"])}
        callback({**seen, "i": step["step"], "sigma": sigma, "sigma_hat": sigma})
