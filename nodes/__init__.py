"""The pack's nodes. ComfyUI imports this at start-up, so diffusers and transformers are imported later."""

from comfy_api.latest import ComfyExtension, io

from . import folders, pick_routes, trace_metadata
from .demo_clip import DRMDemoCLIPLoader
from .film import DRMFilmStrip
from .head_trainer import DRMHeadTrainer
from .loader import DRMLoader
from .pick import DRMPick
from .plot import DRMTracePlot
from .sampler import StepwiseKSampler, StepwiseSampler
from .score import DRMScoreLatent
from .score_image import DRMScoreImage
from .search import DRMSearch
from .trainer import StepGRPOLoRATrainer


class DRMExtension(ComfyExtension):
    """The nodes, the model folders they read, the hook that brings traces into saved pictures, the routes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load, which ComfyUI 0.3.75 never calls; the nodes need the folders when asked for inputs.
        folders.register()
        trace_metadata.register()
        pick_routes.register()
        return [
            DRMLoader,
            DRMScoreLatent,
            DRMScoreImage,
            StepwiseKSampler,
            StepwiseSampler,
            DRMSearch,
            DRMTracePlot,
            DRMFilmStrip,
            DRMDemoCLIPLoader,
            StepGRPOLoRATrainer,
            DRMPick,
            DRMHeadTrainer,
        ]
