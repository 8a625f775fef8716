"""Step-GRPO's alarm: a reward that rises while pictures kept aside get worse is being cheated.

At every look a held-out score (other prompts, other seeds, a second DRM if there is one) is set against the
best so far. The best is kept; the run stops when the reward has risen since the best and the held-out score
has been below it for `patience` looks on end.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


def counted(number: int, noun: str) -> str:
    """ "1 iteration", "2 iterations"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen after an iteration. diversity: against that of the MODEL as it came."""

    iteration: int
    reward: float
    held_out: float
    diversity: float
    kl: float


@dataclass
class Watch:
    """The looks of a run, in order; `start`: the held-out score before it."""

    start: float
    patience: int = 3
    looks: list[Look] = field(default_factory=list)

    @property
    def best(self) -> Look | None:
        return max(self.looks, key=lambda look: look.held_out, default=None)

    def add(self, look: Look) -> bool:
        """Notes a look; whether it is the best so far."""
        self.looks.append(look)
        return self.best is look

    @property
    def cheated(self) -> bool:
        """Whether the last `patience` looks were all below the best while the reward was above it."""
        if not self.looks:
            return False
        best = self.best
        after = self.looks[self.looks.index(best) + 1 :]
        return len(after) >= self.patience and all(
            look.reward > best.reward for look in after[-self.patience :]
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Watch":
        return cls(**{**values, "looks": [Look(**look) for look in values["looks"]]})


def diversity(groups: list[Tensor]) -> float:
    """Mean distance (root of the mean square) between the pictures of a prompt, over prompts.

    groups: latents (S, C, H, W) of one prompt each, S at least 2.
    """
    found = []
    for latents in groups:
        distances = torch.pdist(latents.flatten(1).float()) / latents[0].numel() ** 0.5
        found.append(distances.mean())
    return float(torch.stack(found).mean())
