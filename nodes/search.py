"""DRM Search: where a step-wise sampler spends its candidates and how it chooses, as a DRM_SEARCH socket."""

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .adapters import Scorer

if TYPE_CHECKING:
    from ..drm.search import Search

DRMSearchType = io.Custom("DRM_SEARCH")
CHOICES = ["greedy", "softmax"]
PRESETS = ["custom", "fast", "balanced", "thorough"]
MAX_PATHS = 64


class DRMSearch(io.ComfyNode):
    """The settings of drm.search.Search."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMSearch",
            display_name="DRM Search",
            category="DRM",
            description="How a step-wise sampler with preset custom searches: how it chooses, how many paths "
            "it keeps, and where it saves scoring.",
            inputs=[
                io.Combo.Input(
                    "choice",
                    options=CHOICES,
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
                    "paths",
                    default=1,
                    min=1,
                    max=MAX_PATHS,
                    tooltip="States kept of each picture, a beam. Each runs the model and draws its own "
                    "candidates; of all of them the best go on, and the best finished one is the picture.",
                ),
                io.Float.Input(
                    "beam_end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="After this part of the steps only the best path goes on.",
                ),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Branch at every so many-th step of the window only; the others are Euler steps.",
                ),
                io.Int.Input(
                    "last_branches",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Candidates at the window's last branching step; their number moves there from "
                    "num_branches step by step. 0: num_branches throughout.",
                ),
                io.Float.Input(
                    "sigma_high",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Branch only where sigma is at most this.",
                ),
                io.Float.Input(
                    "sigma_low",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Branch only where sigma is at least this.",
                ),
                io.Boolean.Input(
                    "early_exit",
                    default=True,
                    tooltip="Stop scoring a candidate once it is clearly behind, where the DRM has heads "
                    "after earlier blocks.",
                ),
                io.Float.Input(
                    "good_enough",
                    default=0.0,
                    min=0.0,
                    max=0.999,
                    step=0.01,
                    tooltip="Draw candidates in twos, and no more once one scores above this share of real "
                    "pictures at that noise. 0: draw all. Needs a DRM with a calibration.",
                ),
                io.Float.Input(
                    "skip_below",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Once candidates differ by less than this many standard deviations of real "
                    "pictures' scores, that picture branches no more. 0: never. Needs a DRM with a "
                    "calibration.",
                ),
            ],
            outputs=[
                DRMSearchType.Output(
                    "search", display_name="SEARCH", tooltip="For a step-wise sampler with preset custom."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        choice: str,
        temperature: float,
        paths: int,
        beam_end: float,
        stride: int,
        last_branches: int,
        sigma_high: float,
        sigma_low: float,
        early_exit: bool,
        good_enough: float,
        skip_below: float,
    ) -> io.NodeOutput:
        from ..drm.search import Search

        if not paths <= MAX_PATHS:
            raise ValueError(f"paths is {paths}: give a number from 1 to {MAX_PATHS}")
        if not last_branches >= 0:
            raise ValueError(f"last_branches is {last_branches}: give 0 for no change, or how many")
        return io.NodeOutput(
            Search(
                choice=choice,
                # The widget is always there; only softmax reads it.
                temperature=temperature if choice == "softmax" else 0.0,
                paths=paths,
                beam_end=beam_end,
                stride=stride,
                last_branches=last_branches or None,
                sigma_window=None if (sigma_high, sigma_low) == (1.0, 0.0) else (sigma_high, sigma_low),
                early_exit=early_exit,
                good_enough=good_enough or None,
                skip_below=skip_below,
            )
        )


def check_calibrated(search: "Search", scorer: Scorer) -> None:
    """Raises ValueError when the search needs a calibration and the scorer's DRM has none."""
    needing = [name for name in ("good_enough", "skip_below") if getattr(search, name)]
    if needing and not scorer.calibration:
        raise ValueError(
            f"{' and '.join(needing)} in DRM Search need the DRM's calibration, and this DRM file has none:"
            f" set {'it' if len(needing) == 1 else 'them'} to 0, or choose another file in DRM Loader"
        )
