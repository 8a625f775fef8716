"""What a step-wise run did, step by step, and what it spent: plain numbers that survive JSON unchanged."""

import json
from dataclasses import asdict, dataclass, field, fields, replace

from .presets import Branching


@dataclass
class TraceStep:
    """One step of a batch of B items. scores: k for each item in the order drawn, None where nothing was
    scored. winner: (B,) place of the one that continued in that list.
    """

    sigma: float
    sigma_next: float
    scores: list[list[float]] | None
    winner: list[int]


@dataclass
class Trace:
    """What a run did. spent: {"denoise": calls of the policy, "scored": candidates, "seconds": all of it};
    with a head on the policy's own network also "trunk": what scoring walked of it, in passes of one picture,
    and "reused": what of that the policy needed not walk again; with a film strip "film": calls for it.
    forks: what a caller of sample_stepwise keeps of the candidates, for pictures; not in the JSON.
    to_json and from_json are exact inverses but for that.
    """

    settings: Branching
    item_ids: list[int]
    steps: list[TraceStep] = field(default_factory=list)
    spent: dict | None = None
    forks: list = field(default_factory=list, compare=False, repr=False)

    def to_json(self) -> str:
        """One flat object, the settings beside the rest."""
        tree = asdict(replace(self, forks=[]))
        del tree["forks"]
        return json.dumps(tree.pop("settings") | tree, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Raises ValueError when the text is not a trace. Of earlier versions' traces what is no more known
        (beams, depths) is left out.
        """
        try:
            tree = json.loads(text)
            tree |= {key: value for key, value in (tree.get("search") or {}).items() if value is not None}
            return cls(
                Branching(**_known(Branching, tree)),
                item_ids=tree["item_ids"],
                steps=[TraceStep(**_known(TraceStep, step)) for step in tree["steps"]],
                spent=tree.get("spent"),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a step-wise sampling trace: {error}") from error


def _known(kind: type, tree: dict) -> dict:
    names = {entry.name for entry in fields(kind)}
    return {name: value for name, value in tree.items() if name in names}
