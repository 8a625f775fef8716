"""The DRM_TRACE socket: what a run did, step by step.

Step-wise KSampler hands out a drm.stepwise.Trace. Step-wise Sampler cannot: it is executed before the
sampling, and not again when another seed is sampled with it. It hands out a log that files each trace under
the samples drawn, so the LATENT says which trace is its own, whatever ComfyUI has cached.
"""

import hashlib
import json
from collections import OrderedDict
from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

if TYPE_CHECKING:
    from ..drm.stepwise import Trace

DRMTrace = io.Custom("DRM_TRACE")


class TraceLog:
    """The latest traces of one Step-wise Sampler."""

    capacity = 16

    def __init__(self) -> None:
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def add(self, trace: "Trace", samples: Tensor) -> None:
        self._traces[_digest(samples)] = trace
        while len(self._traces) > self.capacity:
            self._traces.popitem(last=False)

    def find(self, samples: Tensor) -> "Trace | None":
        return self._traces.get(_digest(samples))


def _digest(samples: Tensor) -> str:
    return hashlib.sha256(samples.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def find_trace(trace: "Trace | TraceLog", latent: dict | None) -> "Trace":
    """The trace itself, or the one a log has for the LATENT. Raises ValueError when there is none."""
    if not isinstance(trace, TraceLog):
        return trace
    if latent is None:
        raise ValueError(
            "this trace comes from Step-wise Sampler: connect the LATENT it drew (the output of"
            " SamplerCustomAdvanced) to this node as well"
        )
    found = trace.find(latent["samples"])
    if found is None:
        raise ValueError(
            "this LATENT was not drawn by the Step-wise Sampler the trace comes from: connect the output of"
            " the sampling node that uses it, before anything changes it"
        )
    return found


def trace_to_dict(trace: "Trace") -> dict:
    """Plain lists and numbers, as they are saved in a picture."""
    return json.loads(trace.to_json())
