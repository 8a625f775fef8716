"""What an iteration of Step-GRPO saw, over micro-batches and processes, as one line of the log."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from drm import grpo


class Tally:
    """Sums of an iteration's figures over micro-batches and, in `summary`, over processes."""

    NAMES = ("rewards", "squares", "candidates", "spread", "groups", "gated", "kl", "clipped", "steps")
    NAMES += ("loss", "passes", "forwards")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.ratio_error = 0.0

    def add(self, figures: grpo.Figures, size: int) -> None:
        """figures of one roll-out of `size` latents."""
        rewards = torch.cat([one.flatten() for one in figures.rewards]).double()
        found = {
            "rewards": rewards.sum().item(),
            "squares": rewards.square().sum().item(),
            "candidates": len(rewards),
            "spread": sum(one.double().sum().item() for one in figures.spreads),
            "groups": figures.groups,
            "gated": figures.gated,
            "kl": size * sum(figures.kl),
            "clipped": size * sum(figures.clipped),
            "steps": size * len(figures.clipped),
            "passes": figures.passes,
            "forwards": figures.forwards,
        }
        for name, value in found.items():
            self.sums[name] += value
        self.ratio_error = max(self.ratio_error, figures.ratio_error)

    def summary(self, accelerator: Accelerator) -> dict[str, float]:
        values = torch.tensor([*self.sums.values()], dtype=torch.float64, device=accelerator.device)
        error = torch.tensor([self.ratio_error], dtype=torch.float64, device=accelerator.device)
        total = dict(zip(self.sums, accelerator.reduce(values, "sum").tolist(), strict=True))
        mean = total["rewards"] / total["candidates"]
        return {
            "loss": total["loss"],
            "rewards/mean": mean,
            "rewards/std": math.sqrt(max(0.0, total["squares"] / total["candidates"] - mean * mean)),
            "spread": total["spread"] / total["groups"],
            "kl": total["kl"] / total["steps"],
            "gated": total["gated"] / total["groups"],
            "clipped": total["clipped"] / total["steps"],
            "ratio_error": accelerator.gather(error).max().item(),
            "passes": int(total["passes"]),
            "forwards": int(total["forwards"]),
        }
