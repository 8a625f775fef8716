"""What the trainers share: the error of a run that cannot go on, and the logs of one that does."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

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


def trackers() -> list[str]:
    """What Accelerate logs to beside our own lines: TensorBoard, where it is installed."""
    from accelerate.utils import is_tensorboard_available

    return ["tensorboard"] if is_tensorboard_available() else []
