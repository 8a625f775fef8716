"""DRM Search: how a step-wise sampler chooses and how often, as a DRM_SEARCH socket."""

import logging
from typing import Any

from comfy_api.latest import io

from ..drm.presets import CHOICES
from .schema import found_by

DRMSearchType = io.Custom("DRM_SEARCH")
# Inputs that older graphs may have, and the values at which they did nothing.
REMOVED = {
    "paths": 1,
    "beam_end": 1.0,
    "last_branches": 0,
    "sigma_high": 1.0,
    "sigma_low": 0.0,
    "early_exit": True,
    "good_enough": 0.0,
    "skip_below": 0.0,
}


class DRMSearch(io.ComfyNode):
    """choice, temperature and stride of drm.presets.Branching, as a dict."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMSearch",
            display_name="DRM Search",
            category="DRM",
            **found_by("branch", "stride", "softmax", "greedy"),
            description="How a step-wise sampler with preset custom chooses, and at how many of its steps.",
            inputs=[
                io.Combo.Input(
                    "choice",
                    options=list(CHOICES),
                    default="greedy",
                    tooltip="greedy: the best candidate continues. softmax: a random one, better ones more "
                    "often; the seed repeats it.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.5,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="For softmax, in the units of the score: low is nearly greedy, high blind.",
                ),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Branch at every so many-th step of the window only; the others are Euler steps.",
                ),
            ],
            outputs=[
                DRMSearchType.Output(
                    "search", display_name="SEARCH", tooltip="For a step-wise sampler with preset custom."
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, choice: str, temperature: float, stride: int, **linked: Any) -> io.NodeOutput:
        _tell_of_removed(cls.hidden, linked)
        # The widget is always there; only softmax reads it.
        temperature = temperature if choice == "softmax" else 0.0
        return io.NodeOutput({"choice": choice, "temperature": temperature, "stride": stride})


def _tell_of_removed(hidden: Any, linked: dict) -> None:
    """One line in the log for inputs of an older graph that this version no longer has."""
    entry = (getattr(hidden, "prompt", None) or {}).get(str(getattr(hidden, "unique_id", None))) or {}
    given = {**entry.get("inputs", {}), **linked}
    unused = [name for name, nothing in REMOVED.items() if given.get(name, nothing) != nothing]
    if unused:
        logging.warning("DRM Search: %s of an older graph did not pay and are ignored", ", ".join(unused))
