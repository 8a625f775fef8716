"""The pack's nodes. Imported by ComfyUI only; nothing here or below imports diffusers or transformers at
start-up.
"""

from comfy_api.latest import ComfyExtension, io

from . import folders, trace_metadata
from .demo_clip import DRMDemoCLIPLoader
from .loader import DRMLoader
from .plot import DRMTracePlot
from .sampler import StepwiseKSampler, StepwiseSampler
from .score import DRMScoreLatent


class DRMExtension(ComfyExtension):
    """The six nodes, the model folders they read and the hook that brings traces into saved pictures."""

    async def on_load(self) -> None:
        folders.register()
        trace_metadata.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DRMLoader, DRMScoreLatent, StepwiseKSampler, StepwiseSampler, DRMTracePlot, DRMDemoCLIPLoader]
