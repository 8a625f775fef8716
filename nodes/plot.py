"""DRM Trace Plot: the score of every candidate by step, as a picture."""

from comfy_api.latest import io, ui

from .adapters import check_choice, check_picture
from .pictures import to_image
from .schema import found_by
from .trace_picture import RAW, RELATIVE, draw_trace
from .traces import DRMTrace, find_trace


class DRMTracePlot(io.ComfyNode):
    """Draws a trace."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMTracePlot",
            display_name="DRM Trace Plot (scores by step)",
            category="DRM",
            **found_by("score", "branch", "graph", "chart"),
            description="Plots the score of every candidate by step, with the chosen path drawn through "
            "them.",
            inputs=[
                DRMTrace.Input(
                    "trace", tooltip="From Step-wise KSampler, or from Step-wise Sampler with its LATENT."
                ),
                io.Combo.Input(
                    "scores",
                    options=[RELATIVE, RAW],
                    default=RELATIVE,
                    tooltip="above the step's mean: how much the choice gained at each step. as given: scores"
                    " at two sigmas do not compare, so each step has a scale of its own, with its highest and"
                    " lowest score written there.",
                ),
                io.Int.Input(
                    "width", default=768, min=256, max=4096, tooltip="Width of the picture in pixels."
                ),
                io.Int.Input(
                    "height", default=432, min=160, max=4096, tooltip="Height of the picture in pixels."
                ),
                io.Int.Input(
                    "picture",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Which picture of the batch, counted from 1.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="For a trace of Step-wise Sampler: the LATENT it drew, from "
                    "SamplerCustomAdvanced.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE", tooltip="The plot.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        trace: object,
        scores: str,
        width: int,
        height: int,
        picture: int = 1,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_choice("scores", scores, [RAW, RELATIVE])
        found = find_trace(trace, latent)
        item = check_picture(picture, len(found.item_ids))
        drawn = draw_trace(found, item, scores == RELATIVE, (width, height))
        image = to_image(drawn)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
