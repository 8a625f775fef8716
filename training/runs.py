"""What the trainers share: the error of a run that cannot go on, and the logs of one that does."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available

from training.shards import replace_atomically


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def first_difference(old: dict, new: dict) -> str:
    """The first section.key of `new` whose value is another in `old`."""
    for section, values in new.items():
        if not isinstance(values, dict):
            if old.get(section) != values:
                return section
            continue
        for key, value in values.items():
            if old.get(section, {}).get(key) != value:
                return f"{section}.{key}"
    return "a setting"


def cut_log(path: Path, step: int) -> None:
    """Keeps the lines of steps before `step`: what a killed run wrote after its last checkpoint is redone."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the line it was killed in
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
    replace_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def make_accelerator(out: Path) -> Accelerator:
    """The processes of a launcher, on their GPUs or, where there is none, on the CPU over gloo; logging to
    TensorBoard too where it is installed. TrainingError when a process does not see the others.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=["tensorboard"] if is_tensorboard_available() else [],
        project_dir=out,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise TrainingError(
            f"{launched} processes were launched and this one sees {accelerator.num_processes}: launch with"
            " accelerate and a file of training/configs, or with torchrun"
        )
    return accelerator
