"""A run of DRM Head Trainer: its looks, its files, its end, going on after a stop.

NAME.safetensors   the head, a file of kind "shared"            NAME.resume   what a stopped run goes on from
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from PIL import Image

from . import adapters, trunk
from .grpo.picture import draw_curve
from .picked_tokens import Prompts, Reader
from .score import show_on_node

if TYPE_CHECKING:
    from ..drm.head_training import HeadTrainer

STATE = "drm-head-training-state"
SECONDS_BETWEEN_SAVES = 60.0
# Steps between two returns to ComfyUI's memory management, and to encoding prompts.
TOGETHER = 16


@dataclass
class HeadRun:
    """`train` does all of it. facts: for the file's header. identity: of all that the head depends on."""

    trainer: "HeadTrainer"
    model: comfy.model_patcher.ModelPatcher
    prompts: Prompts
    path: Path
    facts: dict
    identity: str

    def train(self) -> dict:
        """Learns the head and writes its file; what is known of it, see HeadTrainer.facts."""
        self.bar, self.saved_at = comfy.utils.ProgressBar(self.trainer.steps), time.monotonic()
        self.went_on = self._load()
        try:
            while not self.trainer.done:
                until = min(self.trainer.next_look, self.trainer.progress.step + TOGETHER)
                self.inside(until, lambda read, until=until: self._learn(read, until))
            found = self.inside(self.trainer.progress.step, self.trainer.facts)
        except BaseException as error:
            self._stopped(error)
            raise
        self._write(found)
        self._state_path.unlink(missing_ok=True)
        return found

    def inside(self, until: int, work: Callable[[Reader], dict | None]) -> dict | None:
        """work(read) while ComfyUI has the MODEL in place, with the prompts of steps up to `until`."""
        needed = self.trainer.prompts(until)
        self.prompts.need(needed)
        shape = self.trainer.learned[0].shape
        like = comfy.sample.fix_empty_latent_channels(self.model, torch.zeros(1, *shape))

        def work_inside(guider: comfy.samplers.CFGGuider, extra_args: dict) -> dict | None:
            taps = self.trainer.drm.trunk.taps
            return work(Reader(guider, extra_args["model_options"], self.prompts, taps))

        positive = self.prompts.known[needed[0]].conditioning
        return trunk.while_sampling(self.model, positive, like, work_inside)

    def _learn(self, read: Reader, until: int) -> None:
        trainer = self.trainer
        while trainer.progress.step < until:
            trainer.advance(read)
            self.bar.update_absolute(trainer.progress.step)
            if time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES:
                self._save_state()
        if until == trainer.next_look:
            trainer.look(read)
            self._save_state()
            show_on_node(self.line)
            self.bar.update_absolute(trainer.progress.step, preview=("JPEG", self.curve(), None))

    @property
    def line(self) -> str:
        """Where the run stands."""
        progress = self.trainer.progress
        look = progress.looks[-1] if progress.looks else None
        right = f", right on {look.accuracy:.0%} of held-out pairs" if look and look.accuracy else ""
        return f"step {progress.step} of {self.trainer.steps}, loss {progress.losses[-1]:.3f}{right}"

    def curve(self) -> Image.Image:
        """Loss, and accuracy on held-out pairs."""
        progress = self.trainer.progress
        looks = [(look.step, look.accuracy) for look in progress.looks if look.accuracy is not None]
        titles = ("loss", "right on held-out pairs" if looks else "no pairs held out")
        return draw_curve(progress.losses, looks, self.trainer.steps, titles=titles)

    # files

    @property
    def _state_path(self) -> Path:
        return self.path.with_suffix(".resume")

    def _save_state(self) -> None:
        from ..drm.lora import save_tensors

        tensors, progress = self.trainer.state()
        header = {"kind": STATE, "identity": self.identity, "progress": json.dumps(progress)}
        save_tensors(tensors, self._state_path, header)
        self.saved_at = time.monotonic()

    def _load(self) -> int:
        """Goes on from a file of this very run; the step it goes on after, 0 for a new run."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._state_path, "pt") as file:
                header = file.metadata() or {}
                if (header.get("kind"), header.get("identity")) != (STATE, self.identity):
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return 0
        self.trainer.go_on(tensors, json.loads(header["progress"]))
        return self.trainer.progress.step

    def _write(self, found: dict) -> None:
        from ..drm.checkpoint import save_drm

        steps = {"steps": self.trainer.progress.best.step, "steps_done": self.trainer.progress.step}
        save_drm(self.trainer.kept, self.path, {**self.facts, **steps, **found})

    def _stopped(self, error: BaseException) -> None:
        """Keeps what was learned and says where, in the log, on the node and in the error."""
        progress = self.trainer.progress
        if progress.step == 0:
            return
        self._save_state()
        if not progress.looks:
            self.trainer.keep_average()
        best = progress.best
        steps = {"steps": best.step if best else progress.step, "steps_done": progress.step}
        look = {"accuracy": {"accuracy": best.accuracy} if best and best.accuracy is not None else None}
        from ..drm.checkpoint import save_drm

        save_drm(self.trainer.kept, self.path, {**self.facts, **steps, **look, "stopped": True})
        where = f"the best head of {progress.step} steps is in {self.path}; queued again, it goes on there"
        logging.warning("DRM Head Trainer: stopped, %s", where)
        show_on_node(f"Stopped: {where}")
        if isinstance(error, Exception) and not isinstance(error, mm.InterruptProcessingException):
            raise RuntimeError(f"{error}\n{where[0].upper()}{where[1:]}") from error


def identity_of(*parts: object) -> str:
    """Stands for everything a run depends on; parts: JSON-able."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_not_another(path: Path) -> None:
    """ValueError when a file stands at path that this trainer did not write."""
    from ..drm.checkpoint import read_header

    if not path.exists():
        return
    try:
        ours = "picks" in read_header(path)["metadata"]
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"{path.name} is there already and is no head of this trainer: choose another name")


def head_report(run: HeadRun, notes: list[str], found: dict) -> str:
    """What was learned from, how good it is, and what to be wary of."""
    trainer, picks = run.trainer, run.facts["picks"]
    went_on = [f"went on after step {run.went_on}"] if run.went_on else []
    lines = [
        f"{picks['pairs']} pairs in {picks['batches']} batches of {picks['prompts']} prompts;"
        f" {len(trainer.held_out)} batches held out, with prompts of their own",
        *notes,
        *went_on,
        *accuracy_lines(found["accuracy"]),
        f"kept: step {trainer.progress.best.step} of {trainer.steps}, blocks"
        f" {', '.join(map(str, trainer.drm.trunk.taps))} of {trainer.drm.trunk.num_blocks}",
        f"file: {run.path}",
    ]
    return "\n".join(lines)


def accuracy_lines(table: dict | None) -> list[str]:
    """Accuracy in words, and a warning where it says nothing yet."""
    if table is None:
        return [
            "WARNING: too few to tell: all picks are of one prompt, so nothing could be held out; pick for"
            " other prompts too"
        ]
    low, high = table["interval"]
    by_sigma = ", ".join(f"{share:.0%}" for share in table["by_sigma"])
    lines = [
        f"right on {table['accuracy']:.0%} of {table['pairs']} held-out pairs of {table['prompts']} prompts"
        f" it did not see (95 %: {low:.0%} to {high:.0%}); chance is 50 %",
        f"by sigma, from 0 to 1 in quarters: {by_sigma}; it expects to be right on {table['said']:.0%}",
        "the step was chosen on these pairs too, which flatters it a little",
    ]
    if low <= 0.5:
        lines.append("WARNING: too few to tell it from guessing: pick for more prompts")
    return lines


def as_patcher(path: Path) -> comfy.model_patcher.ModelPatcher:
    """The head of a file, as DRM Loader gives it."""
    return adapters.drm_patcher(path, torch.float32)
