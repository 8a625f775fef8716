"""What the trainers share: how a run starts, goes on, logs and ends."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available

from training import checkpoints
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


def checkpoint_of(out: Path, identity: dict) -> Path | None:
    """The newest checkpoint of the run in `out`; TrainingError when it is of another configuration, before
    anything of another shape is put into this one's model.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = checkpoints.latest(out)
    if folder is not None:
        run = checkpoints.facts_of(folder).get("run", {})
        if run != identity:
            differs = first_difference(run, identity)
            raise TrainingError(
                f"{out} holds a run of another configuration ({differs} differs): give train.out another"
                " folder, or delete that one to start anew"
            )
    return folder


def run_to_the_end(run: Callable[[], None], errors: tuple[type[Exception], ...], out_of_memory: str) -> None:
    """Runs a command; what ends it early is said in one sentence, and the process exits with 1, or with 130
    when it was stopped by hand. out_of_memory: what to change when the GPU's memory does not do.
    """
    try:
        run()
    except errors as error:
        message, code = f"error: {error}", 1
    except torch.OutOfMemoryError:
        message = (
            f"error: the GPU is out of memory: {out_of_memory}; the same command goes on from the last"
            " checkpoint"
        )
        code = 1
    except OSError as error:
        message, code = f"error: {error}; the last checkpoint is whole", 1
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on from the last checkpoint", 130
    else:
        return
    print(message, file=sys.stderr, flush=True)
    # The other processes may wait for this one: leave at once, the launcher ends them.
    os._exit(code)


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
