"""What the trainers share: how a run starts, goes on, logs and ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available, is_tensorboard_available

from training.engine import checkpoints
from training.engine.atomic import replace_atomically

LOCK, HOLDER = ".lock", ".running.json"
_ZERO_FILE = "training/configs/accelerate_zero2.yaml"
PATIENCE = 10  # seconds; the reading processes of a killed run outlive it a little and hold its lock


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


@contextlib.contextmanager
def only_run_in(out: Path, key: str = "train.out") -> Iterator[None]:
    """Keeps other runs out of a folder, which is made. TrainingError that says who is in it, or that it
    cannot be written to. Of the processes of a launcher the first does this for all. The lock is the
    system's, so it goes with the process that holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    lock, holder = filelock.FileLock(out / LOCK, timeout=PATIENCE), out / HOLDER
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        since = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        replace_atomically(holder, lambda temporary: temporary.write_text(json.dumps(facts)))
    except filelock.Timeout as error:
        raise TrainingError(
            f"{key} is {out}: another run is in it ({_holder(holder)}); wait for it or stop it, or give this"
            " one a folder of its own"
        ) from error
    except OSError as error:
        raise TrainingError(
            f"{key} is {out}: it cannot be written to ({error.strerror or error}); give a folder that can be"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"


def _left_in(out: Path | None) -> str:
    steps = checkpoints.steps_in(out) if out else []
    if steps:
        return f"the same command goes on from the checkpoint of step {steps[-1]}, which is whole"
    return "there is no checkpoint, the same command starts from the beginning"


def run_to_the_end(
    read: Callable[[], Any],
    run: Callable[[Any], None],
    errors: tuple[type[Exception], ...],
    out_of_memory: str,
) -> None:
    """Runs a command with the configuration that `read` gives, alone in its `train.out`; what ends it early
    is said in one sentence, and the process exits with 1, or with 130 when it was stopped by hand.
    out_of_memory: what to change when the GPU's memory does not do.
    """
    out, code = None, 1
    try:
        config = read()
        out = Path(config.train.out)
        with only_run_in(out):
            run(config)
    except errors as error:
        message = f"error: {error}"
    except torch.OutOfMemoryError:
        message = f"error: the GPU is out of memory: {out_of_memory}; {_left_in(out)}"
    except OSError as error:
        message = f"error: {error}; {_left_in(out)}"
    except KeyboardInterrupt:
        message, code = f"stopped; {_left_in(out)}", 130
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
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if zero and not is_deepspeed_available():
        raise TrainingError("DeepSpeed was launched with and is not installed: pip install deepspeed")
    accelerator = Accelerator(
        cpu=not (zero or torch.accelerator.is_available()),
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


def configure_zero(accelerator: Accelerator, *, clip: float, autocast: bool) -> None:
    """Tells DeepSpeed, before accelerator.prepare, what the trainer's own settings say. clip: the largest
    norm of the gradient; autocast: whether the network runs in bfloat16. TrainingError for another stage than
    2, and for weights or an optimiser that are cast or moved off.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    moved = [key for key in ("offload_optimizer", "offload_param") if _device(zero, key) != "none"]
    cast = [key for key in ("bf16", "fp16") if settings.get(key, {}).get("enabled") is True]
    for is_wrong, got, wanted in (
        (zero.get("stage") != 2, f"ZeRO's stage {zero.get('stage')}", "stage 2"),
        (bool(moved), ", ".join(moved), "weights and optimiser on the GPUs"),
        (bool(cast), ", ".join(cast), "weights in float32, which the trainer casts by train.precision"),
    ):
        if is_wrong:
            raise TrainingError(
                f"DeepSpeed is configured with {got}: wanted {wanted}, launch with {_ZERO_FILE}"
            )
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # it wants to know one; batches are the trainer's own
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
    }


def _device(zero: dict, key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))
