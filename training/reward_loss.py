"""The loss of a batch of pairs, and what a step's log line says about it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from drm import preference
from training.batches import Batch


def pair_losses(win: Tensor, lose: Tensor, batch: Batch, kind: str) -> Tensor:
    """Weighted mean loss of a micro-batch, added up over heads, a scalar; 0 with a graph when nothing weighs.

    win, lose: (B, D), a column for every depth that has a head.
    """
    if not bool(batch.weight.any()):
        return 0.0 * (win.sum() + lose.sum())
    return sum(_pair_loss(*sides, batch, kind) for sides in zip(win.unbind(1), lose.unbind(1), strict=True))


def _pair_loss(win: Tensor, lose: Tensor, batch: Batch, kind: str) -> Tensor:
    if kind == "thurstone":
        return preference.thurstone_loss(win, lose, batch.sigma, batch.label, batch.weight)
    return preference.bradley_terry_loss(win, lose, batch.label, batch.weight)


@dataclasses.dataclass
class Tally:
    """Sums over the pairs of a step, added up over micro-batches and processes. early: the depths before the
    last, of which only the pairs ranked right are counted.
    """

    sums: Tensor
    early: tuple[int, ...]

    NAMES = ("loss", "weight", "pairs", "right", "margin", "score", "squares")

    @classmethod
    def empty(cls, device: torch.device, early: tuple[int, ...] = ()) -> Tally:
        return cls(torch.zeros(len(cls.NAMES) + len(early), dtype=torch.float64, device=device), early)

    def add(self, loss: Tensor, win: Tensor, lose: Tensor, batch: Batch) -> None:
        """loss: the micro-batch's weighted mean. win, lose (B, D)."""
        win, lose, real = win.detach().double(), lose.detach().double(), (batch.weight > 0).double()
        *early, right = ((win > lose).double() + 0.5 * (win == lose).double()).unbind(1)
        win, lose, weight = win[:, -1], lose[:, -1], batch.weight.double().sum()
        both = torch.stack([win, lose])
        self.sums += torch.stack(
            [
                loss.detach().double() * weight,
                weight,
                real.sum(),
                (right * real).sum(),
                ((win - lose) * real).sum(),
                (both * real).sum(),
                (both.square() * real).sum(),
                *((right * real).sum() for right in early),
            ]
        )

    def figures(self) -> dict[str, float]:
        places = [*self.NAMES, *(f"accuracy/{depth}" for depth in self.early)]
        total = dict(zip(places, self.sums.tolist(), strict=True))
        pairs = max(total["pairs"], 1.0)
        mean = total["score"] / (2 * pairs)
        return {
            "loss": total["loss"] / max(total["weight"], 1e-12),
            "accuracy": total["right"] / pairs,
            "margin": total["margin"] / pairs,
            "rewards/mean": mean,
            "rewards/std": math.sqrt(max(0.0, total["squares"] / (2 * pairs) - mean * mean)),
            **{name: total[name] / pairs for name in places[len(self.NAMES) :]},
        }
