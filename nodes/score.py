"""DRM Score Latent: the pictures of a batch, scored and ranked before they are decoded.

A finished picture x0 is scored as it is (sigma 0) or noised, x_sigma = (1 - sigma) * x0 + sigma * eps, and
averaged over several draws of eps. Each draw is shared by the whole batch, as in the DRM's training, so that
pictures are compared and not their noise.
"""

from collections.abc import Callable

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from . import adapters, trunk
from .contact_sheet import contact_sheet
from .loader import DRMModel
from .pictures import pictures_of, to_image
from .schema import found_by

SHEET = io.Image.Output(
    "sheet", display_name="sheet", tooltip="All pictures, the best first, with rank, number and score."
)
FINISHED, LEFTOVER = "finished picture", "leftover noise"
CHUNK = 16
AS_THE_FILE_SAYS = -1.0
MAX_DRAWS = 64


def score_latents(scorer: Callable, x0: Tensor, sigma: float, draws: int, seed: int) -> Tensor:
    """Scores (B,) of clean latents (B, C, H, W), averaged over the draws of noise; sigma 0 needs one,
    without noise.
    """
    from ..drm.branching import branch_noise
    from ..drm.flow import add_noise

    if sigma == 0:
        return _score_batch(scorer, x0, sigma)
    noises = (branch_noise(x0.shape[1:], seed, 0, 0, draw, x0.device) for draw in range(draws))
    return torch.stack([_score_batch(scorer, add_noise(x0, noise, sigma), sigma) for noise in noises]).mean(
        dim=0
    )


def _score_batch(scorer: Callable, x: Tensor, sigma: float) -> Tensor:
    from ..drm.scoring import check_finite

    items = torch.arange(len(x))
    scores = torch.cat([scorer(x[rows], sigma, rows) for rows in items.split(CHUNK)]).float().cpu()
    check_finite(scores, sigma)
    return scores


def take(latent: dict, order: list[int]) -> dict:
    """The items of a LATENT in the given order, each with its mask and with the batch_index that reproduces
    it.
    """
    batch = len(latent["samples"])
    index = adapters.stream_ids(latent)
    out = {**latent, "samples": latent["samples"][order], "batch_index": [index[i] for i in order]}
    mask = latent.get("noise_mask")
    if mask is not None and len(mask) > 1:
        out["noise_mask"] = comfy.utils.repeat_to_batch_size(mask, batch)[order]
    return out


def ranking_text(scores: list[float], order: list[int], index: list[int]) -> str:
    """One line a picture, counted from 1, the best first."""
    return "\n".join(
        f"{rank}. picture {index[i] + 1}: {scores[i]:+.2f}" for rank, i in enumerate(order, start=1)
    )


class DRMScoreLatent(io.ComfyNode):
    """Scores and ranks the pictures of a LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMScoreLatent",
            display_name="DRM Score Latent (rank, best of)",
            category="DRM",
            **found_by("reward", "score", "rank", "best of", "aesthetic", "sort"),
            description="Scores every picture of a LATENT batch against the prompt and ranks them, without "
            "decoding.",
            inputs=[
                DRMModel.Input("drm", display_name="DRM", tooltip="The reward model, from DRM Loader."),
                io.Latent.Input("latent", tooltip="A batch of latents, finished or with leftover noise."),
                io.Conditioning.Input("positive", tooltip="The prompt the pictures are scored against."),
                io.Float.Input(
                    "sigma",
                    default=AS_THE_FILE_SAYS,
                    min=AS_THE_FILE_SAYS,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise level to score at. -1: as the DRM's file says, 0 where it is silent. 0"
                    " scores a finished picture as it is; above 0 noise is added first. With leftover noise:"
                    " the sigma at which its sampler stopped. Scores compare only at one sigma and for one"
                    " prompt.",
                ),
                io.Combo.Input(
                    "latent_is",
                    options=[FINISHED, LEFTOVER],
                    default=FINISHED,
                    tooltip="finished picture: the sampler ran to the end, or the latent comes from VAE"
                    " Encode. leftover noise: the sampler stopped early (return with leftover noise, split"
                    " sigmas); no noise is added.",
                ),
                io.Int.Input(
                    "noise_draws",
                    default=1,
                    min=1,
                    max=MAX_DRAWS,
                    tooltip="For a finished picture with sigma above 0: the score is the average over this"
                    " many draws of noise. Each costs one pass of the DRM.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the added noise; every picture of the batch gets the same noise.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model whose tokens the DRM reads, where it is a head without a backbone of "
                    "its own. Other DRMs need none.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures for the sheet; without it there is none, and nothing is"
                    " decoded.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "scores",
                    display_name="scores",
                    is_output_list=True,
                    tooltip="One score a picture, in the order of the batch.",
                ),
                io.String.Output(
                    "ranks", display_name="ranks", tooltip="The ranking as text, the best first."
                ),
                io.Latent.Output(
                    "best", display_name="best", tooltip="The best picture, with its batch_index."
                ),
                io.Latent.Output("sorted", display_name="sorted", tooltip="All pictures, the best first."),
                SHEET,
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        drm: comfy.model_patcher.ModelPatcher,
        latent: dict,
        positive: list,
        sigma: float,
        latent_is: str,
        noise_draws: int,
        seed: int,
        model: comfy.model_patcher.ModelPatcher | None = None,
        vae: object | None = None,
    ) -> io.NodeOutput:
        samples = adapters.latent_tensor(latent)
        if sigma == AS_THE_FILE_SAYS and latent_is == FINISHED:
            sigma = sigma_of_file(drm)
        check_scoring(sigma, latent_is, noise_draws)
        leftover = sigma if latent_is == LEFTOVER else None

        def scores_of(scorer: Callable, x: Tensor) -> Tensor:
            if leftover is not None:
                return _score_batch(scorer, x, sigma)
            return score_latents(scorer, x, sigma, noise_draws, seed)

        tensor = score_with(drm, samples, positive, model, leftover, scores_of)
        order = tensor.argsort(descending=True, stable=True).tolist()
        scores = tensor.tolist()
        numbers = adapters.stream_ids(latent)
        text = ranking_text(scores, order, numbers)
        show_on_node(text)
        best, ranked = take(latent, order[:1]), take(latent, order)
        shown = ui.PreviewText(text).as_dict()
        if vae is None:
            return io.NodeOutput(scores, text, best, ranked, ExecutionBlocker(None), ui=shown)
        pictures = pictures_of(vae.decode(latent["samples"]))
        sheet = to_image(contact_sheet(pictures, scores, order, numbers))
        shown |= ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(scores, text, best, ranked, sheet, ui=shown)


def score_with(
    drm: comfy.model_patcher.ModelPatcher,
    samples: Tensor,
    positive: list,
    model: comfy.model_patcher.ModelPatcher | None,
    leftover: float | None,
    work: Callable[[Callable, Tensor], Tensor],
) -> Tensor:
    """work(scorer, x (B, C, H, W) in model space) with a DRM of either kind in memory.

    samples, leftover: see adapters.model_latents. Raises ValueError for what does not fit the DRM.
    """
    if adapters.is_shared(drm):

        def without_frames(scorer: Callable, x: Tensor) -> Tensor:
            return work(scorer, adapters.without_frames(x))

        return trunk.score_with_model(drm, model, positive, samples, leftover, without_frames)
    prompts = adapters.ScoringPrompts(positive, adapters.sd3_percent_to_sigma)
    samples = adapters.without_frames(samples)
    adapters.check_drm_fits(drm, prompts, samples)
    adapters.load_alone(drm)
    x = adapters.model_latents(samples, leftover).to(mm.get_torch_device())
    return work(adapters.Scorer(drm, prompts, len(samples)), x)


def score_finished(
    drm: comfy.model_patcher.ModelPatcher,
    samples: Tensor,
    positive: list,
    model: comfy.model_patcher.ModelPatcher | None,
) -> Tensor:
    """Scores (B,) of finished pictures as they are."""
    return score_with(drm, samples, positive, model, None, lambda scorer, x: _score_batch(scorer, x, 0.0))


def sigma_of_file(drm: comfy.model_patcher.ModelPatcher) -> float:
    """Where the DRM's file says that generated pictures are best scored, 0 where it says nothing."""
    hint = getattr(drm.model, "metadata", {}).get("sigma_hint")
    hint = hint.get("generated picture") if isinstance(hint, dict) else hint
    return float(hint) if isinstance(hint, int | float) and 0 <= hint <= 1 else 0.0


def check_scoring(sigma: float, latent_is: str, noise_draws: int) -> None:
    """Raises ValueError for settings that linked values can bring past the widgets' limits, or that make no
    sense.
    """
    adapters.check_choice("latent_is", latent_is, [FINISHED, LEFTOVER])
    if not 0 <= sigma <= 1:
        raise ValueError(
            f"sigma is {sigma}: give a number from 0 (finished picture) to 1 (pure noise), or for a finished"
            " picture -1 (as the DRM's file says)"
        )
    if not 1 <= noise_draws <= MAX_DRAWS:
        raise ValueError(f"noise_draws is {noise_draws}: give a number from 1 to {MAX_DRAWS}")
    if latent_is == LEFTOVER and not 0 < sigma < 1:
        raise ValueError(
            f"sigma is {sigma} for a latent with leftover noise: give the sigma at which its sampler stopped,"
            f" between 0 and 1, or set latent_is to '{FINISHED}'"
        )


def show_on_node(text: str) -> None:
    """The page shows a node's progress text on it; the ui text alone it keeps to itself."""
    context = get_executing_context()
    server = getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)
