"""Checkpoints of a training run: whole, written to a temporary name and renamed, the last few kept.

    OUT/step_00000500/state.safetensors   model.*, optimizer.*, ema.*, old.*: what learns, from all processes
    OUT/step_00000500/state.json          the step, the configuration's hash, the optimizer's plain numbers

Full tensors under the names of the unwrapped model: a run goes on with any number of processes, wrapped in
DDP, FSDP or nothing. There is no random state to keep, every draw being a function of the step.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.engine import zero

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

# torch.distributed.checkpoint is imported where it is used: it takes longer than all of torch, and a command
# that refuses its settings does not need it.


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which and what is left."""


def folder_of(out: Path, step: int) -> Path:
    return out / f"step_{step:08d}"


def steps_in(out: Path) -> list[int]:
    """Steps that have a whole checkpoint, oldest first."""
    return sorted(
        int(path.name.removeprefix("step_")) for path in out.glob("step_*") if path.name[5:].isdigit()
    )


class Averaged:
    """Exponential averages of what learns, under the unwrapped names; early on over a shorter window, since
    they would be mostly the first weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad] if decay else []
        self.values = [parameter.detach().clone() for _, parameter in self.learned]

    def update(self, step: int) -> None:
        self.follow(min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Keeps the share `decay` of itself; the rest is what learns now."""
        for value, (_, parameter) in zip(self.values, self.learned, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in place; twice is nothing."""
        for value, (_, parameter) in zip(self.values, self.learned, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, averaged: Averaged, old: Averaged | None = None
) -> dict:
    """{"tensors": name -> CPU tensor, "optimizer": plain numbers}; every process takes part, the first gets
    it, the others may get nothing. old: more averages, see `Run`.
    """
    tensors = _weights(model, "model")
    for part, values in (("ema", averaged), ("old", old)):
        if values is not None and values.values:
            values.swap()
            tensors |= _weights(model, part)
            values.swap()
    if isinstance(optimizer, torch.optim.Optimizer):
        from torch.distributed.checkpoint import state_dict as distributed

        state = distributed.get_optimizer_state_dict(model, optimizer, options=_gathered(learned_only=True))
    else:
        state = zero.optimizer_state(model, optimizer)
    for name, entries in state.get("state", {}).items():
        tensors |= {f"optimizer.{key}.{name}": torch.as_tensor(value) for key, value in entries.items()}
    return {"tensors": tensors, "optimizer": {"param_groups": state.get("param_groups", [])}}


def whole_weights(model: nn.Module, learned_only: bool = False) -> dict[str, Tensor]:
    """The weights from all processes, which all take part, on the CPU of the first."""
    from torch.distributed.checkpoint import state_dict as distributed

    return distributed.get_model_state_dict(model, options=_gathered(learned_only))


def _gathered(learned_only: bool) -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=learned_only)


def _weights(model: nn.Module, part: str) -> dict[str, Tensor]:
    # On a CPU the gathered tensors are the weights themselves, which go on changing.
    return {f"{part}.{k}": v.clone() for k, v in whole_weights(model, learned_only=True).items()}


def write(out: Path, step: int, gathered: dict, facts: dict, keep: int) -> None:
    """One process writes; older checkpoints go when the new one is whole. CheckpointError when the disk is
    full or fails: what was there before is still there.
    """
    target = folder_of(out, step)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in gathered["tensors"].items()}
        save_file(tensors, temporary / "state.safetensors")
        text = json.dumps({"step": step, **facts, "optimizer": gathered["optimizer"]})
        (temporary / "state.json").write_text(text)
        for path in temporary.iterdir():
            path.chmod(0o644)
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        whole = steps_in(out)
        left = f"the checkpoint of step {whole[-1]} is whole" if whole else "no earlier checkpoint was made"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {out} ({why_not_written(error)}): {left}; start"
            " the same command again"
        ) from error
    for old in steps_in(out)[:-keep]:
        shutil.rmtree(folder_of(out, old), ignore_errors=True)


def why_not_written(error: Exception) -> str:
    """What is wrong with the place that was written to, and what helps."""
    if is_disk_full(error):
        return "the disk is full, make room"
    return f"{' '.join(str(error).split())}, see that the folder is there and can be written to"


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed for want of room; safetensors gives the system's number in its text only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno:
        return error.errno in numbers
    return any(f"os error {number})" in str(error) for number in numbers)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones of a killed run are removed."""
    for path in out.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    steps = steps_in(out)
    return folder_of(out, steps[-1]) if steps else None


def facts_of(folder: Path) -> dict:
    """What state.json says: the step, and what `write` was given."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {folder} cannot be read ({error}): delete it to go on from the one before"
    )


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: Averaged,
    old: Averaged | None = None,
) -> dict:
    """Puts a checkpoint into model, optimizer and averages in place; returns its facts (step, ...)."""
    from torch.distributed.checkpoint import state_dict as distributed

    scatter = distributed.StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True)
    facts = facts_of(folder)
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "old": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    for part, values in (("ema", averaged), ("old", old)):
        if values is not None and values.values:
            distributed.set_model_state_dict(model, parts[part], options=scatter)
            values.swap()
    distributed.set_model_state_dict(model, parts["model"], options=scatter)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        key, _, parameter = name.partition(".")
        state.setdefault(parameter, {})[key] = tensor
    if not isinstance(optimizer, torch.optim.Optimizer):
        zero.restore(model, optimizer, state)
        return facts
    distributed.set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": facts["optimizer"]["param_groups"]},
        options=scatter,
    )
    return facts
