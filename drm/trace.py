"""What a step-wise run did, step by step, and what it spent: plain numbers that survive JSON unchanged."""

import json
from dataclasses import asdict, dataclass, field


@dataclass
class TraceStep:
    """One step of a batch of B items.

    scores: for each item its candidates' scores in the order drawn, all of one length unless an item stopped
        early; None where nothing was scored. With several kept paths, path after path.
    winner: (B,) place of the best candidate in that list. kept: places of all that continue, best first,
        where that is more than one. depth: how many blocks of the reward model each candidate saw, where the
        scorer says; scores of different depths do not compare, the deepest decide.
    """

    sigma: float
    sigma_next: float
    scores: list[list[float]] | None
    winner: list[int]
    kept: list[list[int]] | None = None
    depth: list[list[int]] | None = None

    @property
    def drawn(self) -> list[int]:
        """Candidates scored for each item."""
        return [0] * len(self.winner) if self.scores is None else [len(row) for row in self.scores]


@dataclass
class Trace:
    """What a run did: its settings and its steps. to_json and from_json are exact inverses.

    search: the settings of drm.search.Search, None for plain greedy steps. spent: {"denoise": calls of the
    policy, "scored": candidates by the depth they were scored to, "seconds": all of it}. budget: what was
    asked and chosen, where seconds were given. preset: the name of a node's settings.
    """

    num_branches: int
    noise_level: float
    kind: str
    seed: int
    start: float
    end: float
    noise_scale: float
    item_ids: list[int]
    steps: list[TraceStep] = field(default_factory=list)
    search: dict | None = None
    spent: dict | None = None
    budget: dict | None = None
    preset: str = "custom"

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Raises ValueError when the text is not a trace. Earlier versions' traces lack the later fields."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "steps": [TraceStep(**step) for step in fields["steps"]]})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a step-wise sampling trace: {error}") from error
