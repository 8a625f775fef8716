"""DRM Film Strip: what the candidates at the forks of a path would have become, and which were chosen.

The sampler makes these predictions while it samples, when its input film_strip asks for some (forks.py); this
node decodes them and lays them out.
"""

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from .adapters import check_picture
from .film_picture import Frame, Strip, draw_strip
from .forks import Fork
from .pictures import pictures_of, to_image
from .schema import found_by
from .traces import DRMTrace, find_trace

if TYPE_CHECKING:
    from ..drm.stepwise import Trace


class DRMFilmStrip(io.ComfyNode):
    """Lays out the forks that a sampler kept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMFilmStrip",
            display_name="DRM Film Strip (see the branches)",
            category="DRM",
            **found_by("trace", "branch", "step", "candidates", "thumbnails"),
            description="Shows the choice: what each candidate at up to four forks of the path would have"
            " become, with its score, the chosen one framed. Set film_strip of the sampler to how many.",
            inputs=[
                DRMTrace.Input("trace", tooltip="From a step-wise sampler whose film_strip is at least 1."),
                io.Vae.Input("vae", tooltip="Decodes the predictions; the model's own VAE."),
                io.Int.Input(
                    "picture",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Which picture of the batch, counted from 1.",
                ),
                io.Int.Input(
                    "thumbnail",
                    default=192,
                    min=64,
                    max=1024,
                    step=16,
                    tooltip="Longer side of a thumbnail in pixels.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What the sampler drew; it ends the strip. Step-wise Sampler's trace needs it.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE", tooltip="The film strip.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, trace: object, vae: object, picture: int, thumbnail: int, latent: dict | None = None
    ) -> io.NodeOutput:
        found = find_trace(trace, latent)
        item = check_picture(picture, len(found.item_ids))
        if not found.forks:
            raise ValueError(_nothing_kept(found))
        strips = [_strip(fork, found, item, vae) for fork in found.forks]
        final = None if latent is None else _decoded(vae, latent["samples"][item : item + 1])[0]
        drawn = draw_strip(strips, final, thumbnail)
        image = to_image(drawn)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def _nothing_kept(trace: "Trace") -> str:
    if not any(step.scores for step in trace.steps):
        return "this run chose nowhere, so there are no forks to show: it needs num_branches of 2 or more"
    return (
        "this run kept no forks: set film_strip of the step-wise sampler to 1 to 4 and run again (each fork"
        " costs one more pass of the model a candidate)"
    )


def _strip(fork: Fork, trace: "Trace", item: int, vae: object) -> Strip:
    step = trace.steps[fork.step]
    scores, winner, places = step.scores[item], step.winner[item], fork.branches[item]
    pictures = _decoded(vae, fork.x0[item])
    frames = [
        Frame(picture, place + 1, scores[place], place == winner)
        for picture, place in zip(pictures, places, strict=True)
    ]
    return Strip(fork.step + 1, len(trace.steps), step.sigma_next, len(scores), frames)


def _decoded(vae: object, samples: Tensor) -> list[Image.Image]:
    """Pictures of latents (n, C, H, W), or (n, C, 1, H, W) as some models have them."""
    return pictures_of(vae.decode(samples))
