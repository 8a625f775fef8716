"""DRM Trace Plot: the score of every candidate by step, as a picture."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from .adapters import check_choice
from .trace_picture import RAW, RELATIVE, draw_trace
from .traces import DRMTrace, find_trace


class DRMTracePlot(io.ComfyNode):
    """Draws a trace."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMTracePlot",
            display_name="DRM Trace Plot",
            category="DRM",
            description="Plots the score of every candidate by step, with the chosen path drawn through "
            "them.",
            inputs=[
                DRMTrace.Input(
                    "trace", tooltip="From Step-wise KSampler, or from Step-wise Sampler with its LATENT."
                ),
                io.Int.Input(
                    "item", default=0, min=0, max=4095, tooltip="Which picture of the batch, counted from 0."
                ),
                io.Combo.Input(
                    "scores",
                    options=[RAW, RELATIVE],
                    default=RAW,
                    tooltip="as given: the DRM's scores; they drift with sigma. above the step's mean: how"
                    " much the choice gained at each step.",
                ),
                io.Int.Input(
                    "width", default=768, min=256, max=4096, tooltip="Width of the picture in pixels."
                ),
                io.Int.Input(
                    "height", default=432, min=160, max=4096, tooltip="Height of the picture in pixels."
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
        cls, trace: object, item: int, scores: str, width: int, height: int, latent: dict | None = None
    ) -> io.NodeOutput:
        check_choice("scores", scores, [RAW, RELATIVE])
        picture = draw_trace(find_trace(trace, latent), item, scores == RELATIVE, (width, height))
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).unsqueeze(0)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
