"""DRM Score Image: pictures of any model, ranked by PickScore, ImageReward or CLIP from a local folder."""

import functools

import comfy.model_management as mm
import comfy.model_patcher
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from . import adapters, folders
from .contact_sheet import contact_sheet
from .pictures import pictures_of, to_image
from .schema import found_by
from .score import CHUNK, SHEET, ranking_text, show_on_node

NONE_YET = "(none in models/drm_scorers yet)"
MAX_KEEP = 4096
# The lowest threshold, below every score, leaves nothing out.
MAX_SCORE = 1000.0
HUB = "huggingface.co/"
MODELS = f"{HUB}yuvalkirstain/PickScore_v1, {HUB}zai-org/ImageReward or {HUB}openai/clip-vit-large-patch14"


class DRMScoreImage(io.ComfyNode):
    """Scores and ranks the pictures of an IMAGE batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMScoreImage",
            display_name="DRM Score Image (aesthetic reward, rank, best of)",
            category="DRM",
            **found_by("reward", "score", "rank", "best of", "aesthetic", "PickScore", "ImageReward", "CLIP"),
            description="Scores every picture of a batch, drawn by any model, against the prompt with"
            " PickScore, ImageReward or CLIP, ranks them and keeps the best.",
            inputs=score_inputs(),
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
                io.Image.Output(
                    "best",
                    display_name="best",
                    tooltip="As many of the best pictures as keep says, the best first. What hangs on it does"
                    " not run when none reaches the threshold.",
                ),
                io.Image.Output("sorted", display_name="sorted", tooltip="All pictures, the best first."),
                io.Int.Output(
                    "batch_index",
                    display_name="batch_index",
                    is_output_list=True,
                    tooltip="Where each picture of best was in the batch, from 0: LatentFromBatch takes its"
                    " latent by this number, and a sampler with the same seed draws it again.",
                ),
                SHEET,
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, scorer: str) -> bool:
        return True

    @classmethod
    def fingerprint_inputs(cls, scorer: str = "", **others: object) -> str:
        """Changes when the scorer's files do."""
        from ..drm.picture_scorers import folder_facts

        folder = folders.scorer_folders().get(scorer)
        return "missing" if folder is None else f"{folder}:{folder_facts(folder)}"

    @classmethod
    def execute(cls, scorer: str, images: Tensor, prompt: str, keep: int, threshold: float) -> io.NodeOutput:
        check_settings(prompt, keep, threshold)
        images = adapters.image_tensor(images)
        tensor = score_images(load_scorer(scorer), prompt, images)
        check_finite(tensor, scorer)
        scores, order = tensor.tolist(), tensor.argsort(descending=True, stable=True).tolist()
        reached = [i for i in order if scores[i] >= threshold]
        text = ranking_text(scores, order, list(range(len(scores))))
        if len(reached) < len(order):
            text += f"\n{len(reached)} of {len(order)} reach the threshold {threshold:g}"
        show_on_node(text)
        kept = reached[:keep]
        # None reached it: what hangs on these outputs does not run.
        best, index = (images[kept], kept) if kept else (ExecutionBlocker(None), ExecutionBlocker(None))
        sheet = to_image(contact_sheet(pictures_of(images), scores, order, range(len(scores))))
        shown = {**ui.PreviewImage(sheet, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(scores, text, best, images[order], index, sheet, ui=shown)


def score_inputs() -> list[io.Input]:
    """What is scored, by what, and what goes on."""
    return [
        io.Combo.Input(
            "scorer",
            options=list(folders.scorer_folders()) or [NONE_YET],
            tooltip="A folder of models/drm_scorers with a PickScore, ImageReward or CLIP model: all files of"
            f" its page, such as {MODELS}; the help page says what belongs into the folder.",
        ),
        io.Image.Input("images", tooltip="A batch of pictures. Of pictures with alpha, the colours count."),
        io.String.Input(
            "prompt",
            default="",
            multiline=True,
            tooltip="The prompt the pictures are scored against, in plain words: weights as in (red:1.2) are"
            " read as text. CLIP and PickScore read the first 77 tokens, ImageReward 35.",
        ),
        io.Int.Input(
            "keep",
            default=1,
            min=1,
            max=MAX_KEEP,
            tooltip="So many of the best pictures go on, if there are.",
        ),
        io.Float.Input(
            "threshold",
            default=-MAX_SCORE,
            min=-MAX_SCORE,
            max=MAX_SCORE,
            step=0.1,
            tooltip="Pictures that score less are not among the best; when none is left, what hangs on best"
            f" does not run. {-MAX_SCORE:g}: off. Scores compare only for one scorer and one prompt.",
        ),
    ]


def check_settings(prompt: str, keep: int, threshold: float) -> None:
    """Raises ValueError for an empty prompt, and for what linked values bring past the widgets' limits."""
    if not prompt.strip():
        raise ValueError(
            "the prompt is empty: write what the pictures were to show, they are scored against it"
        )
    if not 1 <= keep <= MAX_KEEP:
        raise ValueError(f"keep is {keep}: give a number from 1 to {MAX_KEEP}")
    if not -MAX_SCORE <= threshold <= MAX_SCORE:
        raise ValueError(
            f"threshold is {threshold}: give a score from {-MAX_SCORE:g} (keeps all) to {MAX_SCORE:g}"
        )


def load_scorer(name: str) -> comfy.model_patcher.ModelPatcher:
    """The scorer (drm.picture_scorers) of a folder of models/drm_scorers, kept between runs while its files
    stay as they are. Raises FileNotFoundError without the folder, ValueError for one that is no scorer.
    """
    from ..drm.picture_scorers import folder_facts

    folder = folders.scorer_folder(name)
    try:
        return _scorer_patcher(str(folder), folder_facts(folder))
    except ValueError as error:
        raise ValueError(f"DRM Score Image: {error}") from error


# Two, so that a graph may compare two scorers.
@functools.lru_cache(maxsize=2)
def _scorer_patcher(folder: str, facts: tuple) -> comfy.model_patcher.ModelPatcher:
    from ..drm.picture_scorers import load_picture_scorer

    return adapters.module_patcher(load_picture_scorer(folder))


def score_images(patcher: comfy.model_patcher.ModelPatcher, prompt: str, images: Tensor) -> Tensor:
    """Scores (B,) on the CPU of an IMAGE (B, H, W, 3 or 4)."""
    from ..drm.scoring import Parts

    adapters.load_alone(patcher)
    parts = Parts(
        CHUNK, mm.throw_exception_if_processing_interrupted, adapters.is_out_of_memory, mm.soft_empty_cache
    )

    def score(part: slice) -> Tensor:
        return patcher.model(prompt, pictures_of(images[part])).float().cpu()

    return parts.run(len(images), CHUNK, score)


def check_finite(scores: Tensor, scorer: str) -> None:
    """Raises ValueError for NaN or infinity."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the scorer '{scorer}' returned {scores[bad[0]].item()} for picture {bad[0] + 1}: its weights"
            " may be damaged, download them again"
        )
