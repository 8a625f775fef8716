"""The steps of a training: what learns, its optimiser and averages, the log, and how a killed run goes on.

    run = Run(accelerator, out, learned, optimizer, settings, identity)
    for step in run.steps(run.resume(), total, "reward model"):
        ...backward...
        run.update(step, figures, advice); run.record(row, shown); run.save_if_due(step + 1, total)

Which data and noise a step sees is a function of its number, so nothing random is kept. In `out`: log.jsonl
(a line a step), evaluation.jsonl (a line a look at what was held out), step_*/ (engine/checkpoints.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from training.engine import checkpoints, zero
from training.engine.launch import TrainingError, checkpoint_of, cut_log

LOG, EVALUATION = "log.jsonl", "evaluation.jsonl"


class Settings(Protocol):
    """What both commands' `train` sections hold."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    ema: float
    save_every: int
    keep: int


def adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Run:
    """Where a training stands. learned: the unwrapped module whose weights that ask for gradients learn.
    identity: what must be the same for a run to go on. trails: whether a second set of what learns follows
    it, the old policy, by a decay of its own. Every process makes one; the first writes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        out: Path,
        learned: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        identity: dict,
        config_hash: str,
        trails: bool = False,
    ) -> None:
        self.accelerator, self.out, self.settings = accelerator, out, settings
        self.main = accelerator.is_main_process
        self.learned, self.optimizer = learned, optimizer
        self.averaged = checkpoints.Averaged(learned, settings.ema)
        self.old = checkpoints.Averaged(learned, 1.0 if trails else 0.0)
        self._engine = accelerator.deepspeed_engine_wrapped.engine if zero.is_zero(accelerator) else None
        self.identity, self.config_hash = identity, config_hash
        self._log, self._bar = None, None

    @property
    def _state(self) -> tuple:
        return self.learned, self.optimizer, self.averaged, self.old

    def resume(self) -> int:
        """The step to go on from, with the weights of its checkpoint and logs that end before it; 0 without
        one. TrainingError when the folder holds a run of another identity.
        """
        folder, step = checkpoint_of(self.out, self.identity), None
        if folder is not None:
            step = checkpoints.restore(folder, *self._state)["step"]
        if self.main:
            cut_log(self.out / LOG, step or 0)
            cut_log(self.out / EVALUATION, 0 if step is None else step + 1)
            if step is not None:
                print(f"going on from step {step}", file=sys.stderr)
        self.accelerator.wait_for_everyone()
        return step or 0

    def steps(self, start: int, total: int, name: str) -> Iterator[int]:
        """start .. total - 1, with a progress bar, and the log open."""
        with contextlib.ExitStack() as stack:
            if self.main:
                self._log = stack.enter_context(open(self.out / LOG, "a"))
            self._bar = tqdm(
                range(start, total),
                initial=start,
                total=total,
                desc=name,
                disable=not self.main,
                dynamic_ncols=True,
            )
            yield from self._bar

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds to the gradients; last: whether `update` follows."""
        if self._engine is None:
            self.accelerator.backward(loss)
        else:
            zero.backward(self._engine, loss, last)

    def update(
        self,
        step: int,
        loss: float,
        advice: str,
        averages: int | None = None,
        old_decay: float | None = None,
    ) -> float:
        """One step of the optimiser on the gradients as they are; their norm before it is cut.

        averages: the number of this update of the averages; None leaves them as they are. old_decay: of the
        set that trails. TrainingError that ends with `advice` when the loss or the norm is not finite; then
        no weight was changed.
        """
        if self._engine is None:
            parameters = [p for p in self.learned.parameters() if p.requires_grad]
            norm = float(self.accelerator.clip_grad_norm_(parameters, self.settings.clip))
        else:
            norm = zero.step(self._engine)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss at step {step} is {loss}, the gradient's norm {norm}: no weight was changed;"
                f" lower train.learning_rate, or {advice}"
            )
        if self._engine is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if averages is not None:
            self.averaged.update(averages)
        if old_decay is not None:
            self.old.follow(old_decay)
        return norm

    def record(self, row: dict, shown: dict[str, str]) -> None:
        """A step's line of the log; `shown` stands beside the progress bar."""
        if self._log:
            self._log.write(json.dumps(row) + "\n")
            self._log.flush()
            self._bar.set_postfix(shown)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def say(self, text: str) -> None:
        self._bar.write(text)

    def evaluated(self, row: dict) -> None:
        """A line of evaluation.jsonl."""
        if self.main:
            with open(self.out / EVALUATION, "a") as file:
                file.write(json.dumps(row) + "\n")

    def evaluations(self) -> list[dict]:
        """The lines of evaluation.jsonl, oldest first."""
        path = self.out / EVALUATION
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def with_averages(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights in place of those that learn."""
        return _swapped(self.averaged)

    def with_old(self) -> contextlib.AbstractContextManager[None]:
        """The set that trails in place of what learns; not between a forward and its backward pass."""
        return _swapped(self.old)

    def save_if_due(self, done: int, total: int) -> None:
        """A checkpoint every `save_every` steps and after the last; CheckpointError when it cannot be."""
        if done % self.settings.save_every and done != total:
            return
        gathered = checkpoints.gather(*self._state)
        if self.main:
            facts = {"run": self.identity, "config": self.config_hash}
            checkpoints.write(self.out, done, gathered, facts, self.settings.keep)
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _swapped(values: checkpoints.Averaged) -> Iterator[None]:
    values.swap()
    try:
        yield
    finally:
        values.swap()
