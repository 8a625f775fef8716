"""DRM Pick: the run waits, somebody clicks the pictures they prefer, and the picks are kept to learn from."""

import io as bytes_io
from collections import Counter
from collections.abc import Callable

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from . import adapters, trunk
from .head_trainer import picks_root
from .loader import DRMModel
from .pick_wait import Shown, Waiting, wait_for_picks
from .pictures import pictures_of
from .schema import found_by
from .score import score_finished, take

FIRST, BEST, STOP = "take the first", "take the DRM's best", "stop"
LARGEST_SIDE, QUALITY = 768, 88

# Picks' name -> runs that ended without picks. ComfyUI keeps a result while this stays, so that an answer is
# asked for once, and asked for again where there was none.
_UNANSWERED: Counter[str] = Counter()


class DRMPick(io.ComfyNode):
    """Asks which pictures of a batch are preferred."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMPick",
            display_name="DRM Pick (choose by click)",
            category="DRM",
            **found_by("preference", "choose", "select", "rank", "taste"),
            description="Shows a batch and waits until you have clicked the pictures you prefer, best first."
            " What you picked goes on, and is kept for DRM Head Trainer to learn your taste from.",
            inputs=pick_inputs(),
            outputs=[
                io.Image.Output("chosen", display_name="IMAGE", tooltip="What was picked, the best first."),
                io.Latent.Output(
                    "chosen_latents",
                    display_name="LATENT",
                    tooltip="Their latents, each with its batch_index.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name: str = "", **others: object) -> str:
        """Changes when a run ended without picks."""
        return f"{name}:{_UNANSWERED[name]}"

    @classmethod
    def execute(
        cls,
        images: Tensor,
        latent: dict,
        prompt: str,
        name: str,
        without_a_page: str,
        model: comfy.model_patcher.ModelPatcher | None = None,
        drm: comfy.model_patcher.ModelPatcher | None = None,
        positive: list | None = None,
    ) -> io.NodeOutput:
        from ..drm.picks import Batch, discard, folder_of, keep_for_later

        samples, folder = adapters.latent_tensor(latent), folder_of(picks_root(), name)
        check_inputs(images, samples, without_a_page, drm, positive)
        node = str(cls.hidden.unique_id)
        batch = Batch(
            prompt=prompt,
            batch_index=tuple(adapters.stream_ids(latent)),
            seed=seed_of(cls.hidden.prompt or {}, node),
            model=facts_of(model),
        )
        record = keep_for_later(folder, batch, samples, [jpeg_of(image) for image in images])
        try:
            waiting = wait_for_picks(Shown(name, record, len(samples), prompt, node))
        except mm.InterruptProcessingException:
            discard(folder, record)
            raise
        rows = rows_of(waiting, without_a_page, name, lambda: best_of(drm, model, latent, positive))
        if rows is None:
            return io.NodeOutput(ExecutionBlocker(None), ExecutionBlocker(None))
        return io.NodeOutput(images[rows], take(latent, rows))


def pick_inputs() -> list[io.Input]:
    """The batch, where picks go, and what happens when nobody is there."""
    return [
        io.Image.Input("images", tooltip="The pictures to choose among, decoded from the latents."),
        io.Latent.Input("latent", tooltip="Their latents, one for each picture."),
        io.String.Input("prompt", default="", tooltip="The prompt they were drawn for."),
        io.String.Input(
            "name",
            default="my_taste",
            tooltip="Picks are kept in drm_picks/NAME of the output folder: one for a taste and a model.",
        ),
        io.Combo.Input(
            "without_a_page",
            options=[FIRST, BEST, STOP],
            default=FIRST,
            display_name="without a page",
            tooltip="When no page shows the pictures (a run from the API, a closed page), the batch goes to"
            " the backlog, and this one goes on. take the DRM's best needs DRM and positive.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="The model that drew them, so that picks of different models are told apart.",
        ),
        DRMModel.Input(
            "drm",
            display_name="DRM",
            optional=True,
            tooltip="Chooses where nobody is there, see without a page.",
        ),
        io.Conditioning.Input("positive", optional=True, tooltip="The prompt as the DRM reads it."),
    ]


def check_inputs(
    images: Tensor, samples: Tensor, without_a_page: str, drm: object | None, positive: list | None
) -> None:
    """Raises ValueError for a batch that does not belong together, or a DRM that is not there."""
    adapters.check_choice("without_a_page", without_a_page, [FIRST, BEST, STOP])
    if len(images) != len(samples):
        raise ValueError(
            f"there are {len(images)} images and {len(samples)} latents: connect the images that were decoded"
            " from these latents"
        )
    missing = [name for name, given in (("DRM", drm), ("positive", positive)) if given is None]
    if without_a_page == BEST and missing:
        raise ValueError(
            f"without_a_page is '{BEST}' and {' and '.join(missing)} not connected: connect"
            f" {'it' if len(missing) == 1 else 'them'}, or choose '{FIRST}'"
        )


def rows_of(waiting: Waiting, without_a_page: str, name: str, best: Callable[[], int]) -> list[int] | None:
    """What goes on; None for nothing, because the batch was put off."""
    if waiting.picks is not None:
        return list(waiting.picks)
    _UNANSWERED[name] += 1
    if waiting.later:
        return None
    if without_a_page == STOP:
        raise ValueError(
            f"no page showed the pictures: they wait in the backlog of '{name}', pick there and queue again"
            f" from a page, or set without_a_page to '{FIRST}'"
        )
    return [0 if without_a_page == FIRST else best()]


def best_of(
    drm: comfy.model_patcher.ModelPatcher,
    model: comfy.model_patcher.ModelPatcher | None,
    latent: dict,
    positive: list,
) -> int:
    """The row that the DRM scores highest as a finished picture."""
    return int(score_finished(drm, adapters.latent_tensor(latent), positive, model).argmax())


def facts_of(model: comfy.model_patcher.ModelPatcher | None) -> dict | None:
    """What tells the MODEL's picks from another's; None for a family whose tokens no head can read."""
    if model is None:
        return None
    try:
        return {
            key: value for key, value in trunk.trunk_facts(model, (1,)).to_dict().items() if key != "taps"
        }
    except ValueError:
        return None


def seed_of(graph: dict, node: str) -> int | None:
    """The seed of the nearest node before the `latent` of this one that has one."""
    link = graph.get(node, {}).get("inputs", {}).get("latent")
    nodes, seen = [link[0]] if isinstance(link, list) else [], set()
    while nodes:
        name = nodes.pop(0)
        inputs = graph.get(name, {}).get("inputs", {})
        for key in ("seed", "noise_seed"):
            if type(inputs.get(key)) is int:
                return inputs[key]
        seen.add(name)
        nodes += [value[0] for value in inputs.values() if isinstance(value, list) and value[0] not in seen]
    return None


def jpeg_of(image: Tensor) -> Tensor:
    """The bytes of a JPEG of an IMAGE's item (H, W, 3 or 4), not larger than a page shows it."""
    (picture,), file = pictures_of(image[None]), bytes_io.BytesIO()
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    picture.save(file, "JPEG", quality=QUALITY)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
