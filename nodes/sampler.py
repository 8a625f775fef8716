"""Step-wise KSampler and Step-wise Sampler: nodes in the shape of ComfyUI's own around step_loop.py."""

from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..drm.presets import PRESETS, Branching
from ..drm.sde import KINDS
from ..drm.trace import Trace
from . import adapters
from .forks import MOST_FORKS, check_film_strip
from .loader import DRMModel
from .schema import found_by, rare
from .search import DRMSearchType
from .step_loop import MAX_BRANCHES, branching_of, check, sample_with_drm
from .traces import DRMTrace, TraceLog

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def branching_inputs() -> list[io.Input]:
    """The inputs both nodes share, optional so that graphs of any age run; the preset leads what it hides."""
    return [
        io.Combo.Input(
            "preset",
            options=["custom", *PRESETS],
            default="balanced",
            optional=True,
            tooltip=f"Measured settings in place of the widgets that they hide. {preset_words()}. custom: as"
            " set here, with the DRM Search connected.",
        ),
        io.Int.Input(
            "num_branches",
            default=4,
            min=1,
            max=MAX_BRANCHES,
            optional=True,
            tooltip="Candidates drawn and scored at every step (k in the paper); the best one continues. Each"
            " costs one pass of the DRM. 1 scores nothing.",
        ),
        io.Float.Input(
            "branch_start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Branching begins after this part of the steps. Steps before it are plain Euler steps.",
        ),
        io.Float.Input(
            "branch_end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Branching ends after this part of the steps. Steps after it are plain Euler steps, and"
            " cost no scoring; the last step never branches.",
        ),
        io.Float.Input(
            "noise_level",
            default=0.7,
            min=0.0,
            max=2.0,
            step=0.01,
            optional=True,
            tooltip="How far the candidates differ. 0.7 is usual; cps takes at most 1. With 1 branch, 0 is "
            "plain Euler.",
        ),
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default="sde",
            optional=True,
            tooltip="sde: the stochastic step of Flow-GRPO. cps: coefficient-preserving, leaves no residual"
            " noise and draws smoother pictures.",
            **rare(io.Combo.Input),
        ),
        io.Float.Input(
            "seconds",
            default=0.0,
            min=0.0,
            max=86400.0,
            step=0.5,
            optional=True,
            tooltip="Time the sampling may take: once a step was measured, each draws as many candidates "
            "as still leave the model its time. 0: no limit.",
            **rare(io.Float.Input),
        ),
        io.Int.Input(
            "film_strip",
            default=0,
            min=0,
            max=MOST_FORKS,
            optional=True,
            tooltip="Steps at which what each candidate would become is kept for DRM Film Strip. Each costs"
            " one more pass of the model a candidate. 0: none.",
        ),
        DRMSearchType.Input("search", optional=True, tooltip="From DRM Search, for preset custom."),
    ]


def preset_words() -> str:
    """What each preset stands for, in a sentence."""
    return "; ".join(
        f"{name}: {run.num_branches} branches, steps from {run.start:.0%} to {run.end:.0%}"
        for name, run in ((name, Branching(preset=name).chosen()) for name in PRESETS)
    )


class StepwiseKSampler(io.ComfyNode):
    """KSampler with Step-wise Sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepwiseKSampler",
            display_name="Step-wise KSampler (DRM reward-guided)",
            category="DRM",
            **found_by("reward", "best of", "branch", "score", "guidance", "euler", "KSampler"),
            description="KSampler (euler) that draws several candidates at every step and continues with the "
            "one the "
            "DRM scores best. The trace is also saved in the metadata of the pictures, as drm_trace.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The flow-matching model to sample with: SD3.5, "
                    "FLUX, Qwen-Image, Z-Image and their like. It must be the one the DRM was made for.",
                ),
                DRMModel.Input(
                    "drm", display_name="DRM", tooltip="The reward model that chooses, from DRM Loader."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the starting noise, the same noise as KSampler's, and of the "
                    "candidates' noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance: how closely the picture follows the prompt. The DRM"
                    " itself reads the positive prompt only.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="How noise is removed over the steps. SD3-family models like simple or "
                    "sgm_uniform.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="What to draw; the DRM scores against this prompt."
                ),
                io.Conditioning.Input("negative", tooltip="What to leave out."),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to denoise; masks and batches work as in KSampler."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Less than 1 keeps the structure of the input latent (image to image).",
                ),
                *branching_inputs(),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="The denoised latent."),
                DRMTrace.Output(
                    "trace", display_name="TRACE", tooltip="Every step's sigma, scores and winner."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: comfy.model_patcher.ModelPatcher,
        drm: comfy.model_patcher.ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        scheduler: str,
        positive: list,
        negative: list,
        latent_image: dict,
        denoise: float,
        film_strip: int = 0,
        **branch: Any,
    ) -> io.NodeOutput:
        branching = branching_of(seed=seed, **branch)
        adapters.check_choice("scheduler", scheduler, comfy.samplers.SCHEDULER_NAMES)
        samples = comfy.sample.fix_empty_latent_channels(
            model, adapters.latent_tensor(latent_image, "latent_image")
        )
        prompts = adapters.ScoringPrompts(positive, model.get_model_object("model_sampling").percent_to_sigma)
        check(model, drm, prompts, samples)
        sigmas = comfy.samplers.KSampler(
            model, steps, model.load_device, "euler", scheduler, denoise, model.model_options
        ).sigmas

        traces = []
        item_ids = adapters.stream_ids(latent_image)
        sampler = comfy.samplers.KSAMPLER(
            sample_with_drm,
            {
                "drm": drm,
                "positive": positive,
                "branching": branching,
                "on_trace": lambda trace, _: traces.append(trace),
                "item_ids": item_ids,
                "film_strip": check_film_strip(film_strip),
            },
        )
        both = model.clone()
        both.set_additional_models("drm", [drm])
        out = latent_image.copy()
        out["samples"] = comfy.sample.sample_custom(
            both,
            comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index")),
            cfg,
            sampler,
            sigmas,
            positive,
            negative,
            samples,
            noise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(out, traces[0] if traces else Trace(branching, item_ids))


class StepwiseSampler(io.ComfyNode):
    """Step-wise Sampling as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepwiseSampler",
            display_name="Step-wise Sampler (DRM branches)",
            category="DRM",
            **found_by("reward", "best of", "branch", "score", "SamplerCustomAdvanced"),
            description="Step-wise Sampling as a SAMPLER for SamplerCustomAdvanced. To plot its trace,"
            " connect the TRACE and the sampled LATENT to DRM Trace Plot.",
            inputs=[
                DRMModel.Input(
                    "drm", display_name="DRM", tooltip="The reward model that chooses, from DRM Loader."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt the DRM scores against; the guider's positive prompt as a rule.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the candidates' noise. The starting noise comes from the NOISE of the"
                    " sampling node; with the same seed there, the picture is that of Step-wise KSampler.",
                ),
                *branching_inputs(),
            ],
            outputs=[
                io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="For SamplerCustomAdvanced."),
                DRMTrace.Output(
                    "trace",
                    display_name="TRACE",
                    tooltip="The traces of what this sampler draws; DRM Trace Plot finds the right one by "
                    "the LATENT.",
                ),
            ],
            # Two equal nodes must not share one log of traces.
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls,
        drm: comfy.model_patcher.ModelPatcher,
        positive: list,
        seed: int,
        film_strip: int = 0,
        **branch: Any,
    ) -> io.NodeOutput:
        branching = branching_of(seed=seed, **branch)
        log = TraceLog()
        options = {
            "drm": drm,
            "positive": positive,
            "branching": branching,
            "on_trace": log.add,
            "film_strip": check_film_strip(film_strip),
        }
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_with_drm, options), log)
