"""How the demo's networks learn: the engine's steps, for so many minutes on whatever machine it is.

    averaged = fit(network, loss, folder, name="judge", minutes=10, learning_rate=2e-3)

The first call times a few steps, writes how many fit into plan.json, and starts anew; from then on the run is
that many steps, a pure function of its seed, however often it is stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from drm.precision import computes_bfloat16
from training.engine.atomic import replace_atomically
from training.engine.steps import Run, adamw

Loss = Callable[[int, torch.Generator], torch.Tensor]
TIMED, WARM = 12, 4  # steps that are timed, and those before that are not: compilation is among them
LOG_EVERY, SAVES = 50, (4 if torch.cuda.is_available() else 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the engine asks of a run."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    save_every: int = 500
    keep: int = 1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the device: whoever resumes at `step` there draws the same."""
    return torch.Generator(device()).manual_seed((seed * 1_000_003 + step) & 0x7FFFFFFFFFFFFFFF)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a fiftieth, then a cosine down to a fiftieth of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def in_bfloat16(where: torch.device) -> torch.autocast:
    """bfloat16 where the device computes it natively; otherwise float32 throughout."""
    return torch.autocast(where.type, torch.bfloat16, enabled=computes_bfloat16(where))


def planned(folder: Path, minutes: float, step: Callable[[int], None]) -> int:
    """How many steps the run in `folder` takes: what plan.json says, else as many as fit into the minutes."""
    plan = folder / "plan.json"
    if not plan.exists():
        begun = time.monotonic()
        for number in range(WARM + TIMED):
            if number == WARM:
                warm, begun = time.monotonic() - begun, time.monotonic()
            step(number)
        each = (time.monotonic() - begun) / TIMED
        facts = {
            "steps": max(1, round((60 * minutes - warm) / each)),
            "seconds_a_step": each,
            "minutes": minutes,
        }
        folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(plan, lambda temporary: temporary.write_text(json.dumps(facts)))
    return json.loads(plan.read_text())["steps"]


def fit(
    network: nn.Module,
    loss: Loss,
    folder: Path,
    *,
    name: str,
    minutes: float,
    learning_rate: float,
    seed: int = 0,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    looked_at: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Trains `network` in place on loss(step, random numbers), resumed from `folder`, and leaves it with its
    averaged weights, in eval mode. looked_at(step, network) sees those at each of twenty checkpoints.
    """
    accelerator = Accelerator(cpu=device().type == "cpu")
    settings = Settings(learning_rate=learning_rate, weight_decay=weight_decay, ema=ema)
    begun_as = copy.deepcopy(network.state_dict())

    def learn(step: int, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        value = loss(step, generator(seed, step))
        accelerator.backward(value)
        return value.detach()

    def timed(step: int) -> None:
        learn(step, scratch)
        scratch.step()
        scratch.zero_grad(set_to_none=True)

    network.train()
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    scratch = adamw(learned, settings)
    steps = planned(folder, minutes, timed)
    network.load_state_dict(begun_as)
    settings = dataclasses.replace(settings, save_every=max(1, math.ceil(steps / SAVES)))
    optimizer = adamw(learned, settings)
    run = Run(accelerator, folder, network, optimizer, settings, {"name": name, "steps": steps}, name)
    begun = time.monotonic()
    for step in run.steps(run.resume(), steps, name):
        rate = rate_at(step, steps, learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = float(learn(step, optimizer))
        norm = run.update(step, value, "look at the data it learns from", averages=step)
        if step % LOG_EVERY == 0 or step + 1 == steps:
            row = {"step": step, "loss": round(value, 5), "grad_norm": round(norm, 3), "lr": rate}
            run.record({**row, "seconds": round(time.monotonic() - begun, 1)}, {"loss": f"{value:.4f}"})
        run.save_if_due(step + 1, steps)
        if looked_at and ((step + 1) % settings.save_every == 0 or step + 1 == steps):
            with run.with_averages():
                looked_at(step + 1, network.eval())
            network.train()
    run.averaged.swap()
    return network.eval()


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made by make(temporary name) unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, make)
    return path
