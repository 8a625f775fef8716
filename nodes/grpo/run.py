"""A run of Step-GRPO LoRA Trainer: looks at what is learned, its files, its end, going on after a stop."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
from safetensors import SafetensorError
from torch import Tensor, nn

from ...drm.lora import LoRAFileError, load_lora, save_lora
from ..score import show_on_node
from .comfy_policy import ComfyPolicy, within_sampling
from .files import run_id, settings_of, sketch, weights_hash
from .inputs import Training, lora_path
from .learner import Learner, Models, Pictures
from .watch import Look, counted

SECONDS_BETWEEN_SAVES = 60.0


def say(text: str) -> None:
    """On the node and in the console."""
    logging.info("Step-GRPO: %s", text)
    show_on_node(text)


class Run:
    """One training. `train` does all of it; `report` says what happened."""

    def __init__(self, training: Training, models: Models, show: Callable) -> None:
        """show: called with the run and a line after every look."""
        self.training, self.models, self.show = training, models, show
        self.learner = Learner(training, models, self._tick)
        self.state = self.learner.state
        self.notes = self.learner.notes
        self.hashes = {"lora": _hash_of(models.lora)}
        self.base_path = lora_path(training.name)
        self.path: Path | None = None
        self.largest, self.recompute = None, False
        self.before: Pictures | None = None
        self.latest: Pictures | None = None
        self.best: Pictures | None = None
        self.bar = comfy.utils.ProgressBar(self._total)
        self.saved_at = time.monotonic()
        self.took: dict[str, list[float]] = {"iteration": [], "look": []}

    # the whole

    def train(self) -> dict[str, Tensor]:
        """The LoRA, as its file has it. Whatever ends it early, what was learned is saved first."""
        try:
            say("Loading the models")
            self._inside(self._begin, [0])
            self.show(self, self.line)
            while not self.finished:
                self._inside(self._learn, range(self.state.progress.iteration, self._next_look))
                self._look()
            if self.best is None:
                self._inside(self._draw_best, [])
            self._save(self.state.best)
            return self.state.best
        except BaseException as error:
            self._stopped(error)
            raise

    @property
    def finished(self) -> bool:
        progress = self.state.progress
        looked = self._looked >= progress.iteration
        return progress.cheated or (looked and progress.iteration >= self.training.iterations)

    def _stopped(self, error: BaseException) -> None:
        """Saves what was learned and says where, in the console and, but for Cancel, in the error."""
        iteration = self.state.progress.iteration
        if self.path is None or iteration == 0:
            return
        self._save()
        learned = counted(iteration, "iteration")
        where = f"what was learned in {learned} is in {self.path}; queued again, it goes on there"
        cancelled = isinstance(error, mm.InterruptProcessingException)
        logging.warning("Step-GRPO: %s, %s", "cancelled" if cancelled else "stopped", where)
        show_on_node(f"Stopped: {where}")
        if not cancelled and isinstance(error, Exception):
            raise RuntimeError(f"{error}\n{where[0].upper()}{where[1:]}") from error

    # inside the sampling

    def _inside(self, work: Callable[[ComfyPolicy], Any], iterations: Iterable[int]) -> None:
        """work(policy), with the conditions of the prompts that these iterations and the looks need."""
        numbers = {self.learner.prompt(item) for i in iterations for item in self.learner.items(i)}
        numbers |= set(self.training.held_out)

        def run(policy: ComfyPolicy) -> None:
            policy.largest, policy.recompute = self.largest, self.recompute
            try:
                work(policy)
            finally:
                self.largest, self.recompute = policy.largest, policy.recompute

        within_sampling(
            run,
            self.models.model,
            self.models.drms,
            self.learner.network,
            prompts={number: self.models.prompts[number] for number in sorted(numbers)},
            negative=self.models.negative,
            cfg=self.training.cfg,
            latents=self.learner.latents,
            seed=self.training.seed,
        )

    def _begin(self, policy: ComfyPolicy) -> None:
        """Finds the file of this run, or checks that a run may start; draws the pictures before."""
        say("Reading the weights, to know this run again")
        self.hashes |= {
            "base": weights_hash(self.learner.network),
            "drm": weights_hash(self.models.drm.model),
        }
        if self.models.judge is not self.models.drm:
            self.hashes["judge"] = weights_hash(self.models.judge.model)
        name = f"{self.base_path.name}_{run_id(self.training, self.hashes)}.safetensors"
        self.path = self.base_path.with_name(name)
        say(f"Drawing {counted(len(self.training.held_out), 'picture')} to compare with")
        self.before = self.latest = self._pictures(policy)
        self.state.progress.sketch = sketch(self.before.latents)
        if self.state.load(self._state_path):
            self.notes.append(f"went on after iteration {self.state.progress.iteration} of {self.path.name}")
            self._make_good()
            return
        self.state.progress.watch.start = self.before.score
        say("Checking that this can be learned")
        with self.learner.adapters.attached(self.learner.network):
            for line in self.learner.check(policy):
                self.notes.append(line)
                logging.info("Step-GRPO: %s", line)

    def _learn(self, policy: ComfyPolicy) -> None:
        """Iterations up to the next look, and the pictures for it."""
        progress, until = self.state.progress, self._next_look
        with self.learner.adapters.attached(self.learner.network):
            while progress.iteration < until:
                began = time.monotonic()
                self.learner.iterate(policy)
                self.took["iteration"].append(time.monotonic() - began)
                say(self.line)
                due = progress.iteration % self.training.save_every == 0
                late = time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES
                if (due or late) and progress.iteration < until:
                    self._save()
            with self.learner.holding(self.state.average):
                self.latest = self._pictures(policy)

    def _pictures(self, policy: ComfyPolicy) -> Pictures:
        began = time.monotonic()
        pictures = self.learner.pictures(policy)
        self.took["look"].append(time.monotonic() - began)
        return pictures

    def _draw_best(self, policy: ComfyPolicy) -> None:
        with self.learner.holding(None), self.learner.adapters.attached(self.learner.network):
            self.learner.adapters.load(self.state.best)
            self.best = self.learner.pictures(policy)

    # looks

    def _look(self) -> None:
        """Sets the latest pictures against the best, raises the alarm, saves and shows."""
        progress = self.state.progress
        recent = progress.rewards[-self.training.preview_every :]
        look = Look(
            iteration=progress.iteration,
            reward=sum(recent) / len(recent),
            held_out=self.latest.score,
            diversity=self.latest.diversity / max(self.before.diversity, 1e-12),
            kl=progress.kl[-1],
        )
        if progress.watch.add(look):
            self.best, self.state.best = self.latest, self._tensors()
        progress.cheated = progress.watch.cheated
        if progress.cheated:
            logging.warning("Step-GRPO: the reward rises and the held-out score falls; stopped, best kept")
        self._save()
        self.show(self, self.line)

    # small parts

    @property
    def line(self) -> str:
        """Where the run stands."""
        progress, total = self.state.progress, self.training.iterations
        words = [f"iteration {progress.iteration} of {total}"]
        if progress.rewards:
            words.append(f"reward {progress.rewards[-1]:+.3f}")
        if progress.kl and self.training.kl_weight:  # without a weight it is not measured
            words.append(f"KL {progress.kl[-1]:.2g}")
        if progress.watch.looks:
            words.append(f"held-out {progress.watch.looks[-1].held_out:+.3f}")
        if self.took["iteration"]:
            left = round(self.seconds_left)
            words.append(f"{left // 60} min {left % 60:02d} s left")
        return ", ".join(words)

    @property
    def seconds_left(self) -> float:
        """What the iterations and looks to come take, by those so far; a first one also warms up."""
        iterations = self.training.iterations - self.state.progress.iteration
        looks = math.ceil((self.training.iterations - self._looked) / self.training.preview_every)
        each, look = (statistics.median(self.took[kind]) for kind in ("iteration", "look"))
        return iterations * each + looks * look

    @property
    def held_out(self) -> list[tuple[int, float]]:
        watch = self.state.progress.watch
        return [(0, watch.start), *((look.iteration, look.held_out) for look in watch.looks)]

    @property
    def _state_path(self) -> Path:
        return self.path.with_suffix(".resume")

    @property
    def _looked(self) -> int:
        """The iteration of the last look. A run that was stopped may be past the next one."""
        looks = self.state.progress.watch.looks
        return looks[-1].iteration if looks else 0

    @property
    def _next_look(self) -> int:
        every = self.training.preview_every
        return min(self.training.iterations, (self._looked // every + 1) * every)

    @property
    def _total(self) -> int:
        return self.training.iterations * self.training.prompts_per_iteration * self.training.steps

    def show_picture(self, preview: tuple) -> None:
        """("JPEG", picture, largest side or None), on the node."""
        self.bar.update_absolute(self.bar.current, self._total, preview)

    def _tick(self, steps: int) -> None:
        self.bar.update_absolute(steps, self._total)

    def _tensors(self) -> dict[str, Tensor]:
        with self.learner.holding(self.state.average):
            return self.learner.adapters.tensors()

    def _save(self, tensors: dict[str, Tensor] | None = None) -> None:
        """State and LoRA; a full disk is said, not the end of the run. The state is what a run goes on from:
        a server killed after it and before the LoRA has lost nothing, `_make_good` writes that anew.
        """
        writes = {
            self._state_path: self.state.save,
            self.path: lambda path: save_lora(tensors or self._tensors(), path, self.facts()),
        }
        for path, write in writes.items():
            try:
                write(path)
            except (OSError, SafetensorError) as error:
                note = f"{path.name} could not be saved ({error})"
                logging.warning("Step-GRPO: %s", note)
                self.notes = [*[line for line in self.notes if line != note], note]
        self.saved_at = time.monotonic()

    def _make_good(self) -> None:
        """Writes the LoRA again where it is behind the iteration that is gone on from."""
        try:
            behind = load_lora(self.path)[1]["iteration"] < self.state.progress.iteration
        except LoRAFileError:
            behind = True
        if behind:
            self._save()

    def facts(self) -> dict:
        """What the file's header says."""
        progress = self.state.progress
        return {
            "version": 1,
            "method": self.training.method,
            "settings": settings_of(self.training),
            "seed": self.training.seed,
            "iteration": progress.iteration,
            "hashes": self.hashes,
            "rewards": progress.rewards,
            "kl": progress.kl,
            "watch": progress.watch.to_dict(),
        }


def _hash_of(lora: dict[str, Tensor] | None) -> str | None:
    if lora is None:
        return None
    holder = nn.Module()
    for number, name in enumerate(sorted(lora)):
        holder.register_buffer(f"t{number}", lora[name])
    return weights_hash(holder)
