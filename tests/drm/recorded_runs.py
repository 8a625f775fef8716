"""Runs of step-wise sampling whose outcome was recorded before the sampler was rewritten as one loop.

    python -m tests.drm.recorded_runs          # writes tests/drm/recorded_runs.json again

All of it is sums and products of float32 numbers, in an order that torch keeps on any machine, but for the
noise: where logarithms and cosines round otherwise, only winners and rounded numbers hold.
"""

import hashlib
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from drm.branching import branch_noise
from drm.flow import schedule
from drm.stepwise import sample_stepwise

RECORD = Path(__file__).with_suffix(".json")
SHAPE = (4, 6, 4)
KEPT = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
KEPT[..., :2] = True


def start(batch: int, seed: int) -> Tensor:
    return torch.stack([branch_noise(SHAPE, seed, 0, item, 2**31) for item in range(batch)])


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    clipped = x.roll(1, dims=-1).clamp(-1.5, 1.5)
    return 0.6 * clipped * (1 - 0.5 * sigma) + 0.2


def score(candidates: Tensor, sigma: float, item_index: Tensor) -> Tensor:
    total = candidates[:, 0].double().sum(dim=(1, 2)) - 0.5 * candidates[:, 1].double().sum(dim=(1, 2))
    return total * torch.where(item_index % 2 == 0, 1.0, -1.0)


def reimpose(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.where(KEPT, 0.25 * sigma, x)


def cases() -> dict[str, dict]:
    """Settings by name: greedy and softmax, windows, strides, both kinds, k, batches, masks, streams."""
    found = {}
    for kind, k, batch, steps in itertools.product(("sde", "cps"), (1, 2, 4, 5), (1, 3), (3, 8)):
        for window in ((0.0, 1.0), (0.3, 0.8)):
            for choice in ("greedy", "softmax"):
                case = {"kind": kind, "num_branches": k, "batch": batch, "steps": steps, "choice": choice}
                case |= {"start": window[0], "end": window[1], "seed": len(found)}
                found[" ".join(map(str, (kind, k, batch, steps, *window, choice)))] = case
    one = {"kind": "sde", "num_branches": 4, "batch": 3, "steps": 8, "choice": "greedy"}
    found["masked"] = {**one, "masked": True}
    found["masked, one branch"] = {**one, "masked": True, "num_branches": 1}
    found["masked, window, cps"] = {**one, "masked": True, "kind": "cps", "start": 0.2, "end": 0.6}
    found["every third"] = {**one, "stride": 3}
    found["every third, softmax"] = {**one, "stride": 3, "choice": "softmax", "seed": 5}
    found["streams"] = {**one, "item_ids": [7, 2**32 - 1, 0], "seed": 2**64 - 3}
    found["loud"] = {**one, "noise_level": 1.0, "noise_scale": 1.3}
    found["quiet"] = {**one, "num_branches": 1, "noise_level": 0.0}
    found["many"] = {**one, "num_branches": 40, "steps": 4}
    found["from the middle"] = {**one, "first": 3}
    return found


def outcome(case: dict, sample=sample_stepwise) -> dict:
    """Winners, the latents' sha256, and a few of their numbers and of the scores'."""
    case = dict(case)
    batch, steps, first = case.pop("batch"), case.pop("steps"), case.pop("first", 0)
    case["temperature"] = 2.0 if case["choice"] == "softmax" else 0.0
    if case.pop("masked", False):
        case["reimpose"] = reimpose
    sigmas = schedule(steps)[first:]
    latents, trace = sample(denoise, score, start(batch, case.get("seed", 0)), sigmas, **case)
    scores = [step.scores for step in trace.steps if step.scores is not None]
    return {
        "sha256": hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()[:16],
        "winners": [step.winner for step in trace.steps],
        "latents": [round(value, 4) for value in latents[-1].flatten()[::17].tolist()],
        "scores": [round(table[-1][-1], 4) for table in scores],
    }


def main() -> None:
    recorded = {name: outcome(case) for name, case in cases().items()}
    RECORD.write_text(json.dumps(recorded, separators=(",", ":")).replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main()
