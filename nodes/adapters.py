"""The only place where ComfyUI's objects become the tensors that drm knows.

    LATENT        samples, x / (1 - sigma) in VAE space  ->  x = (1 - sigma) * process_in(samples)
    CONDITIONING  [[embeds (b, T, D), options], ...]     ->  embeds (B, T, D), pooled (B, P)
    MODEL, DRM    ModelPatchers                          ->  callables, kept in memory together

Every check a user may fail is made here, before any sampling, in a sentence that names what to change.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.utils
import folder_paths
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..drm import DRM, scoring

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LATENT_FORMAT = comfy.latent_formats.SD3()
# SD3's timestep shift; where no model is at hand it turns prompt ranges into sigmas.
SD3_SHIFT = 3.0
_CLIP_TOKENS = 77  # CLIP's part of a prompt, before T5's
# DRM -> lengths of prompts of which was said that it was trained on another
_SAID_LENGTHS: "WeakKeyDictionary[DRM, set[int]]" = WeakKeyDictionary()


def check_choice(name: str, value: str, choices: list[str]) -> None:
    """Raises ValueError for a value that is not in a combo's list, which ComfyUI 0.3.75 lets through."""
    if value not in choices:
        raise ValueError(f"{name} is '{value}': choose one of {', '.join(choices)}")


def module_patcher(module: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A network that only infers, in ComfyUI's memory management."""
    module.requires_grad_(False).eval()
    base = patcher_class()
    # A patcher that streams weights has ways of its own.
    patcher = WholePatcher if base is comfy.model_patcher.ModelPatcher else base
    return patcher(module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """For networks of plain torch layers, which on a card with little room are loaded whole, and leave whole:
    ComfyUI's own layers fetch what lies in main memory when they are used, these cannot.
    """

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, **named: Any) -> int:
        return super().partially_load(device_to, max(extra_memory, 2 * self.model_size()), **named)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **named: Any) -> int:
        """Frees nothing, after which ComfyUI unloads all of it."""
        return 0


def load_drm_patcher(kind: str, name: str, dtype: str) -> comfy.model_patcher.ModelPatcher:
    """A DRM file as a ModelPatcher around drm.model.DRM. Raises ValueError for a file that is no DRM."""
    path = folder_paths.get_full_path_or_raise(kind, name)
    check_choice("dtype", dtype, ["auto", *DTYPES])
    try:
        return drm_patcher(path, DTYPES.get(dtype) or _fast_dtype(mm.get_torch_device()))
    except ValueError as error:
        raise ValueError(f"DRM Loader: {error}") from error


def drm_patcher(path: str | Path, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """A file by its path, see `load_drm_patcher`."""
    from ..drm.checkpoint import load_drm

    return module_patcher(load_drm(path, device="cpu", dtype=dtype))


def patcher_class() -> type[comfy.model_patcher.ModelPatcher]:
    """Newer ComfyUI replaces its patcher class at run time, so it is looked up at every use."""
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def _fast_dtype(device: torch.device) -> torch.dtype:
    if mm.is_device_cpu(device):
        from ..drm.precision import computes_bfloat16

        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def latent_tensor(latent: dict, what: str = "the LATENT") -> Tensor:
    """The samples (B, C, H, W), or (B, C, 1, H, W) as some models have them, of a LATENT, in VAE space, after
    the checks every node makes.
    """
    samples = latent["samples"]
    if samples.is_nested or not (samples.ndim == 4 or is_one_frame(samples)):
        shape = "several tensors" if samples.is_nested else tuple(samples.shape)
        raise ValueError(
            f"{what} is {shape}: a DRM scores pictures, give it a LATENT of shape (batch, channels, H, W) or"
            " of one frame"
        )
    if samples.numel() == 0:
        raise ValueError(
            f"{what} is empty, its shape is {tuple(samples.shape)}: give it at least one picture"
        )
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(
            f"{what} holds NaN or infinity: look at the node that made it (a broken VAE or model)"
        )
    return samples


def image_tensor(images: Tensor) -> Tensor:
    """An IMAGE (B, H, W, 3), or (B, H, W, 4) with transparency, after the checks of nodes that score one."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ValueError(
            f"the IMAGE has shape {tuple(images.shape)}: wanted (batch, height, width, 3 or 4), pictures in"
            " colour; convert it to RGB"
        )
    if images.numel() == 0:
        raise ValueError(
            f"the IMAGE is empty, its shape is {tuple(images.shape)}: give it at least one picture"
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "the IMAGE holds NaN or infinity: look at the node that made it (a broken VAE or model)"
        )
    return images


def is_one_frame(samples: Tensor) -> bool:
    """Whether latents are pictures of a model that has videos too, (B, C, 1, H, W)."""
    return samples.ndim == 5 and samples.shape[2] == 1


def without_frames(samples: Tensor) -> Tensor:
    """(B, C, H, W) of (B, C, 1, H, W) or of itself."""
    return samples.squeeze(2) if samples.ndim == 5 else samples


def empty_latent(model: comfy.model_patcher.ModelPatcher, width: int, height: int) -> Tensor:
    """Zeros as the model's Empty Latent node makes them for one picture: of its channels, and with one frame
    where it draws videos too.
    """
    latent_format = model.get_model_object("latent_format")
    large = 16 if isinstance(latent_format, getattr(comfy.latent_formats, "Flux2", ())) else 8
    scale = getattr(latent_format, "spacial_downscale_ratio", large)
    samples = torch.zeros(1, latent_format.latent_channels, height // scale, width // scale)
    return comfy.sample.fix_empty_latent_channels(model, samples)


def stream_ids(latent: dict) -> list[int]:
    """The number of each item's noise stream: its batch_index, so that part of a batch can be redone."""
    return [int(i) for i in latent.get("batch_index", range(len(latent["samples"])))]


def check_picture(picture: int, batch: int) -> int:
    """The place in the batch of a picture counted from 1. Raises ValueError when there is none."""
    if not 1 <= picture <= batch:
        raise ValueError(f"picture is {picture}: this run drew {batch}, give a number from 1 to {batch}")
    return picture - 1


def model_latents(
    samples: Tensor,
    leftover_sigma: float | None = None,
    latent_format: comfy.latent_formats.LatentFormat = LATENT_FORMAT,
) -> Tensor:
    """VAE-space samples in model space, float32; with leftover noise, x at the sigma it was left at."""
    x = latent_format.process_in(samples.float())
    return x if leftover_sigma is None else (1 - leftover_sigma) * x


@dataclass(frozen=True)
class _Prompt:
    """One entry of a CONDITIONING: embeds (b, T, D), its options, and where it holds."""

    embeds: Tensor
    options: dict
    sigma_start: float
    sigma_end: float
    whole_picture: bool

    @property
    def pooled(self) -> Tensor:
        """(b, P), which SD3's text encoders give beside the embeds."""
        pooled = self.options.get("pooled_output")
        if pooled is None:
            raise ValueError(
                "the positive CONDITIONING has no pooled output, which SD3-family models and their DRM read:"
                " make it with the text encoder that belongs to the model"
            )
        return pooled

    def holds_at(self, sigma: float) -> bool:
        return self.sigma_end <= sigma <= self.sigma_start


class ScoringPrompts:
    """The positive prompt the DRM reads, which may change with sigma.

    Of the entries whose timestep range holds the sigma, the first that covers the whole picture is taken,
    else the first. Entries combined with it steer the policy but are not scored.
    """

    def __init__(self, positive: list, percent_to_sigma: Callable[[float], float]) -> None:
        if not positive:
            raise ValueError("the positive CONDITIONING is empty: connect a CLIP Text Encode")
        self.conditioning = positive
        self.prompts = [_read_prompt(embeds, options, percent_to_sigma) for embeds, options in positive]

    def at(self, sigma: float, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeds (batch, T, D) and pooled (batch, P); fewer prompts than items repeat, as in ComfyUI."""
        prompt = self.read_at(sigma)
        return tuple(
            comfy.utils.repeat_to_batch_size(tensor, batch).to(device)
            for tensor in (prompt.embeds, prompt.pooled)
        )

    def read_at(self, sigma: float) -> _Prompt:
        """The entry that is read at sigma."""
        holding = [prompt for prompt in self.prompts if prompt.holds_at(sigma)] or self.prompts
        return next((prompt for prompt in holding if prompt.whole_picture), holding[0])


def _read_prompt(embeds: Tensor, options: dict, percent_to_sigma: Callable[[float], float]) -> _Prompt:
    starts = [options[key] for key in ("start_percent", "clip_start_percent") if key in options]
    ends = [options[key] for key in ("end_percent", "clip_end_percent") if key in options]
    return _Prompt(
        embeds=embeds,
        options=options,
        sigma_start=float(percent_to_sigma(max(starts))) if starts else math.inf,
        sigma_end=float(percent_to_sigma(min(ends))) if ends else -math.inf,
        whole_picture="area" not in options and "mask" not in options,
    )


def sd3_percent_to_sigma(percent: float) -> float:
    """What ComfyUI's SD3 sampling makes of a percentage of the run."""
    from ..drm.flow import shift_sigmas

    return float(shift_sigmas(torch.tensor(min(max(1.0 - percent, 0.0), 1.0)), SD3_SHIFT))


class Scorer:
    """drm.scoring.Scorer with ComfyUI's prompts, which may change with sigma, its memory and its Cancel.

    score(candidates (n, C, H, W), sigma, item_index (n,)) -> (n,) with each item's own prompt. The DRM must
    be in memory already.
    """

    def __init__(
        self, patcher: comfy.model_patcher.ModelPatcher, prompts: ScoringPrompts, batch: int
    ) -> None:
        self.patcher, self.prompts, self.batch = patcher, prompts, batch
        self._scorer, self._sigma = None, None

    def __call__(self, candidates: Tensor, sigma: float, item_index: Tensor) -> Tensor:
        return self._at(sigma)(self._padded(candidates), sigma, item_index)

    @property
    def dtype(self) -> torch.dtype:
        """What candidates are best given in."""
        return self.patcher.model.backbone.dtype

    def _padded(self, candidates: Tensor) -> Tensor:
        """Sizes that are no multiple of a patch, padded as ComfyUI's network pads them."""
        patch = self.patcher.model.backbone.config.patch_size
        return comfy.ldm.common_dit.pad_to_patch_size(candidates, (patch, patch))

    def _at(self, sigma: float) -> "scoring.Scorer":
        from ..drm.scoring import Scorer

        if self._scorer is None or self._sigma != sigma:
            text = self.prompts.at(sigma, self.batch, self.patcher.load_device)
            if self._scorer is None:
                self._scorer = Scorer(
                    self.patcher.model,
                    *text,
                    before=mm.throw_exception_if_processing_interrupted,
                    out_of_memory=is_out_of_memory,
                    free=mm.soft_empty_cache,
                )
            self._scorer.read(*text)
            self._sigma = sigma
        return self._scorer


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the memory of a CPU, was too small."""
    is_oom = getattr(mm, "is_oom", None)
    if "can't allocate memory" in str(error):
        return True
    return is_oom(error) if is_oom is not None else isinstance(error, mm.OOM_EXCEPTION)


def is_shared(drm: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether the DRM is a head on the MODEL's own tokens (drm.shared.SharedDRM)."""
    from ..drm.shared import SharedDRM

    return isinstance(drm.model, SharedDRM)


def check_drm_fits(
    drm: comfy.model_patcher.ModelPatcher,
    prompts: ScoringPrompts,
    samples: Tensor,
    model: comfy.model_patcher.ModelPatcher | None = None,
) -> None:
    """Raises ValueError when a DRM with a backbone of its own was made for other latents, another text
    encoder or another family than the MODEL's; and for a DRM without one.
    """
    if is_shared(drm):
        raise ValueError(
            "this DRM is a head that reads the MODEL's own tokens, which is not possible here: choose a DRM"
            " with a backbone of its own in DRM Loader"
        )
    if model is not None:
        _check_sd3(model)
    model = drm.model
    if samples.shape[1] != model.in_channels:
        raise ValueError(
            f"the DRM scores latents of {model.in_channels} channels and this LATENT has {samples.shape[1]}:"
            " choose a DRM made for this model family in DRM Loader"
            f"{', or an EmptySD3LatentImage' if samples.shape[1] == 4 else ''}"
        )
    for prompt in prompts.prompts:
        widths = prompt.embeds.shape[-1], prompt.pooled.shape[-1]
        if widths != (model.prompt_dim, model.pooled_dim):
            raise ValueError(
                f"the DRM reads prompts of width {model.prompt_dim} (pooled {model.pooled_dim}) and this"
                f" CONDITIONING has {widths[0]} (pooled {widths[1]}): choose the DRM made for this text"
                " encoder in DRM Loader, or load the text encoder that belongs to the model"
            )
    _say_lengths(model, {prompt.embeds.shape[1] for prompt in prompts.prompts})


def _say_lengths(drm: "DRM", lengths: set[int]) -> None:
    """Says once for a DRM and a length that it was trained on prompts of another length, and what makes them
    so. They cannot be padded here: what training padded with went through the text encoder, and the rest of
    the prompt saw it; ComfyUI's own tokenizer pads so when it is asked to.
    """
    wanted, said = drm.metadata.get("text_length"), _SAID_LENGTHS.setdefault(drm, set())
    for length in sorted(lengths - said - {wanted}) if wanted else []:
        logging.info(
            "DRM: this reward model was trained on prompts of %d tokens and this CONDITIONING has %d: compare"
            " its scores among pictures of one length%s",
            wanted,
            length,
            _longer_t5(wanted, length),
        )
        said.add(length)


def _longer_t5(wanted: int, length: int) -> str:
    """How a prompt of SD3's encoders, CLIP's tokens and then T5's, gets as long as wanted; nothing where T5
    is not padded to it.
    """
    if not _CLIP_TOKENS < length < wanted:
        return ""
    return (
        f"; a T5TokenizerOptions node with min_length {wanted - _CLIP_TOKENS} in front of CLIP Text Encode"
        " makes them as they were in training"
    )


def _check_sd3(model: comfy.model_patcher.ModelPatcher) -> None:
    latent_format = model.get_model_object("latent_format")
    # FLUX's format inherits from SD3's, and is another.
    if type(latent_format) is not type(LATENT_FORMAT):
        raise ValueError(
            f"the MODEL ({model.model.__class__.__name__}, {latent_format.latent_channels} latent channels)"
            " is not of the SD3 family, whose latents this DRM reads: load SD3.5, or a DRM whose head was"
            " made for this model"
        )


def network_of(base: comfy.model_base.BaseModel) -> torch.nn.Module:
    """The network of what a MODEL patches."""
    return base.diffusion_model


def original_weights(model: comfy.model_patcher.ModelPatcher) -> dict[str, Tensor]:
    """The weights of a MODEL's network by name, as they were loaded, without the LoRAs that are on them."""
    network = network_of(model.model)
    kept = {name: model.backup.get(f"diffusion_model.{name}") for name, _ in network.named_parameters()}
    return {name: getattr(kept[name], "weight", value) for name, value in network.named_parameters()}


def encode_prompt(clip: object, text: str) -> list:
    """The CONDITIONING that stock CLIP Text Encode makes of a text, in tensors that autograd may keep."""
    with torch.inference_mode(False), torch.no_grad():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def check_policy(model: comfy.model_patcher.ModelPatcher, prompts: ScoringPrompts, samples: Tensor) -> None:
    """Raises ValueError when the MODEL cannot be sampled step-wise with these prompts at this size."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"the MODEL ({model.model.__class__.__name__},"
            f" {model.get_model_object('latent_format').latent_channels} latent channels) does not sample by"
            " flow matching: step-wise sampling works with SD3.5, FLUX, Qwen-Image, Z-Image and models of"
            " their kind, load one of them"
        )
    if samples.ndim != 4 and not is_one_frame(samples):
        raise ValueError(
            f"the LATENT has shape {tuple(samples.shape)}: step-wise sampling draws pictures, give it one of"
            " a single frame"
        )
    network = getattr(model.model, "diffusion_model", None)
    width = _text_width(network)
    for prompt in prompts.prompts:
        if width is not None and prompt.embeds.shape[-1] != width:
            raise ValueError(
                f"the MODEL reads prompts of width {width} and this CONDITIONING has"
                f" {prompt.embeds.shape[-1]}: load the text encoder that belongs to the model"
            )
    limit = getattr(network, "pos_embed_max_size", None)
    if limit is not None and max(samples.shape[-2:]) > 2 * limit:
        height, width = (8 * size for size in samples.shape[-2:])
        raise ValueError(
            f"the LATENT is {width}x{height} pixels and the MODEL draws at most {16 * limit}x{16 * limit}:"
            " make it smaller"
        )


def _text_width(network: torch.nn.Module | None) -> int | None:
    """Width of the prompts that a network reads, where it says so."""
    for name in ("context_embedder", "txt_in", "cap_embedder.1", "text_embedding.0"):
        try:
            return network.get_submodule(name).in_features
        except AttributeError:
            continue
    return None


def load_beside(guider: object, drm: comfy.model_patcher.ModelPatcher) -> None:
    """Brings the DRM into memory before the first step, with everything the guider is using kept there."""
    in_use = [guider.model_patcher, *guider.loaded_models]
    if not any(drm.is_clone(patcher) for patcher in in_use):
        mm.load_models_gpu([*in_use, drm])


def load_alone(drm: comfy.model_patcher.ModelPatcher) -> None:
    """Brings the DRM into memory outside of sampling."""
    mm.load_models_gpu([drm])
