"""The one training loop: resumable, seeded, with averaged weights, one JSON line a log step and a progress
bar.

Data order is a pure function of (seed, step), so a run that was stopped goes on as if it had not been. The
checkpoint holds weights, averaged weights, optimizer and step; it is written to a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from drm.precision import computes_bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What a run needs to know. `decay` is the last learning rate over the first; `ema` averages the
    weights.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    save_every: int = 500
    log_every: int = 50
    seed: int = 0


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine from the peak to `decay` times the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (
        config.decay + (1 - config.decay) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    )


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: whoever resumes at `step` draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFFFFFFFFFFFFFF)


def save_atomically(state: dict, path: Path) -> None:
    """torch.save to a temporary name beside `path`, then rename."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def bfloat16_autocast(device: torch.device | str) -> contextlib.AbstractContextManager:
    """bfloat16 where the device computes it natively; otherwise float32 throughout."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=computes_bfloat16(device))


def train(
    model: torch.nn.Module,
    loss_fn: Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]],
    config: LoopConfig,
    folder: Path,
    *,
    name: str,
    on_save: Callable[[int, torch.nn.Module], None] | None = None,
) -> torch.nn.Module:
    """Train `model` in place and return its averaged copy.

    `loss_fn(step, generator)` returns a scalar loss with graph and a dict of figures to log. Weights not
    asking for gradients stay frozen. `on_save(step, averaged)` runs after each checkpoint, for pictures and
    figures on the way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    averaged_parameters = [
        a for a, p in zip(averaged.parameters(), model.parameters(), strict=True) if p.requires_grad
    ]
    checkpoint, start, seconds = folder / f"{name}.ckpt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        if start >= config.steps and on_save:  # nothing left to train: report what there is
            on_save(start, averaged)
    begun = time.monotonic() - seconds

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save_atomically({**state, "step": step, "seconds": time.monotonic() - begun}, checkpoint)
        if on_save:
            on_save(step, averaged)

    bar = tqdm(
        range(start, config.steps),
        initial=start,
        total=config.steps,
        desc=name,
        mininterval=10,
        dynamic_ncols=True,
    )
    with open(folder / f"{name}.jsonl", "a") as log:
        for step in bar:
            rate = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, figures = loss_fn(step, step_generator(config.seed, step))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # early averages would be mostly the initial weights, so the window grows to its full length
            torch._foreach_lerp_(
                averaged_parameters, parameters, 1 - min(config.ema, (1 + step) / (10 + step))
            )
            if step % config.log_every == 0 or step + 1 == config.steps:
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(
                        f"{name}: loss is {loss.item()} at step {step}; lower the learning rate and resume"
                    )
                row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate}
                row |= {"seconds": round(time.monotonic() - begun, 1), **figures}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix({"loss": f"{loss.item():.4f}", **{k: f"{v:.3g}" for k, v in figures.items()}})
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save(step + 1)
    return averaged
