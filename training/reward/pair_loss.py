"""The loss of a batch of pairs, and what a step's log line says about it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from drm import preference
from training.data.batches import Batch


def pair_losses(chosen: Tensor, rejected: Tensor, batch: Batch, kind: str) -> Tensor:
    """Weighted mean loss of a micro-batch of scores (B,), a scalar; 0 with a graph when nothing weighs."""
    if not bool(batch.weight.any()):
        return 0.0 * (chosen.sum() + rejected.sum())
    if kind == "thurstone":
        return preference.thurstone_loss(chosen, rejected, batch.sigma, batch.label, batch.weight)
    return preference.bradley_terry_loss(chosen, rejected, batch.label, batch.weight)


@dataclasses.dataclass
class Tally:
    """Sums over the pairs of a step, added up over micro-batches and processes."""

    sums: Tensor

    NAMES = ("loss", "weight", "pairs", "right", "margin", "score", "squares")

    @classmethod
    def empty(cls, device: torch.device) -> Tally:
        return cls(torch.zeros(len(cls.NAMES), dtype=torch.float64, device=device))

    def add(self, loss: Tensor, chosen: Tensor, rejected: Tensor, batch: Batch) -> None:
        """loss: the micro-batch's weighted mean. chosen, rejected (B,)."""
        chosen, rejected, real = (
            chosen.detach().double(),
            rejected.detach().double(),
            (batch.weight > 0).double(),
        )
        right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        weight, both = batch.weight.double().sum(), torch.stack([chosen, rejected])
        self.sums += torch.stack(
            [
                loss.detach().double() * weight,
                weight,
                real.sum(),
                (right * real).sum(),
                ((chosen - rejected) * real).sum(),
                (both * real).sum(),
                (both.square() * real).sum(),
            ]
        )

    def figures(self) -> dict[str, float]:
        total = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        pairs = max(total["pairs"], 1.0)
        mean = total["score"] / (2 * pairs)
        return {
            "loss": total["loss"] / max(total["weight"], 1e-12),
            "accuracy": total["right"] / pairs,
            "margin": total["margin"] / pairs,
            "rewards/mean": mean,
            "rewards/std": math.sqrt(max(0.0, total["squares"] / (2 * pairs) - mean * mean)),
        }
