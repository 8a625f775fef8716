"""A sampler that does other work where one would sample: ComfyUI has MODEL and helpers in memory then, and
the guider and its options ready.
"""

from collections.abc import Callable
from typing import Any

import comfy.samplers
from torch import Tensor


class InsideSampling(comfy.samplers.Sampler):
    """Calls work(guider, extra_args) once and keeps its result."""

    def __init__(self, work: Callable[[comfy.samplers.CFGGuider, dict], Any]) -> None:
        self.work, self.result = work, None

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        *others: object,
        **named: object,
    ) -> Tensor:
        self.result = self.work(model_wrap, extra_args)
        return noise
