"""Step-GRPO on a ComfyUI MODEL: iterations, looks at what is learned, saves, and going on after a stop.

Everything random is a function of (seed, number of the trajectory), so a run that was stopped and goes on
draws the same noise and prompts as one that never was.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn

from ..drm.grpo import Figures, grpo, step_grpo
from ..drm.lora import Adapters, comfy_targets, save_lora
from . import adapters as comfy_adapters
from . import grpo_preflight
from .grpo_files import Progress, State, run_id, settings_of, weights_hash
from .grpo_inputs import PICTURES, Training, lora_path
from .grpo_policy import Policy, within_sampling
from .grpo_watch import Look, Watch, diversity
from .score import score_latents

HELD_OUT_SIGMAS = (0.1, 0.3, 0.5)
SECONDS_BETWEEN_SAVES = 60.0
MASK = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Models:
    """What is connected: MODEL, DRM, the second DRM or the first again, and the prompts as CONDITIONINGs."""

    model: comfy.model_patcher.ModelPatcher
    drm: comfy.model_patcher.ModelPatcher
    judge: comfy.model_patcher.ModelPatcher
    prompts: list[list]
    negative: list

    @property
    def drms(self) -> list[comfy.model_patcher.ModelPatcher]:
        return [self.drm] if self.judge is self.drm else [self.drm, self.judge]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Latents of the prompts kept aside, one (S, C, H, W) each, and what they are worth."""

    latents: list[Tensor]
    score: float
    diversity: float


class OutOfMemoryError(RuntimeError):
    """No smaller part is left to take at once."""


class Run:
    """One training. `train` does all of it; `report` says what happened."""

    def __init__(
        self, training: Training, models: Models, lora: dict[str, Tensor] | None, show: object
    ) -> None:
        """lora: the file to go on from; show: a function that is called after every look."""
        self.training, self.models, self.show = training, models, show
        self.network = comfy_adapters.attention_network(models.model)
        self.sampling = models.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(self.sampling, "simple", training.steps)
        self.latents = torch.zeros(1, 16, training.height // 8, training.width // 8)
        self.adapters = Adapters(comfy_targets(self.network), training.rank, training.alpha, training.seed)
        if lora is not None:
            self.adapters.load(lora)
        self.adapters.to(models.model.load_device)
        optimizer = torch.optim.AdamW(
            self.adapters.parameters(), training.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4
        )
        self.state = State(self.adapters, optimizer, Progress(Watch(start=0.0)))
        self.hashes = {"lora": _hash_of(lora)}
        self.base_path = lora_path(training.name)
        self.path: Path | None = None
        self.largest, self.recompute = None, False
        self.before: Pictures | None = None
        self.latest: Pictures | None = None
        self.best: Pictures | None = None
        self.notes: list[str] = []
        self.bar = comfy.utils.ProgressBar(self._total)
        self.began, self.done_here, self.saved_at = time.monotonic(), 0, time.monotonic()

    # the whole

    def train(self) -> dict[str, Tensor]:
        """The LoRA, as its file has it. Whatever ends it early, what was learned is saved first."""
        try:
            self._inside(self._begin, [0])
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
        return progress.cheated or progress.iteration >= self.training.iterations

    def _stopped(self, error: BaseException) -> None:
        """Saves what was learned and says where, in the console and, but for Cancel, in the error."""
        iteration = self.state.progress.iteration
        if self.path is None or iteration == 0:
            return
        self._save()
        where = (
            f"what was learned in {iteration} iterations is in {self.path}; queued again, it goes on there"
        )
        cancelled = isinstance(error, mm.InterruptProcessingException)
        logging.warning("Step-GRPO: %s, %s", "cancelled" if cancelled else "stopped", where)
        self.show(self, f"Stopped: {where}")
        if not cancelled and isinstance(error, Exception):
            raise RuntimeError(f"{error}\n{where[0].upper()}{where[1:]}") from error

    # inside the sampling

    def _inside(self, work: object, iterations: object) -> None:
        """work(policy), with the conditions of the prompts that these iterations and the looks need."""
        numbers = {self._prompt(item) for i in iterations for item in self._items(i)}
        numbers |= set(self.training.held_out)

        def run(policy: Policy) -> None:
            policy.largest, policy.recompute = self.largest, self.recompute
            try:
                work(policy)
            finally:
                self.largest, self.recompute = policy.largest, policy.recompute

        within_sampling(
            run,
            self.models.model,
            self.models.drms,
            self.network,
            prompts={number: self.models.prompts[number] for number in sorted(numbers)},
            negative=self.models.negative,
            cfg=self.training.cfg,
            latents=self.latents,
            seed=self.training.seed,
        )

    def _begin(self, policy: Policy) -> None:
        """Finds the file of this run, or checks that a run may start; draws the pictures before."""
        self.hashes |= {"base": weights_hash(self.network), "drm": weights_hash(self.models.drm.model)}
        if self.models.judge is not self.models.drm:
            self.hashes["judge"] = weights_hash(self.models.judge.model)
        name = f"{self.base_path.name}_{run_id(self.training, self.hashes)}.safetensors"
        self.path = self.base_path.with_name(name)
        self.before = self.latest = self._pictures(policy)
        if self.state.load(self._state_path):
            self.notes.append(f"went on after iteration {self.state.progress.iteration} of {self.path.name}")
            return
        self.state.progress.watch.start = self.before.score
        with self.adapters.attached(self.network):
            for line in self._checks(policy):
                self.notes.append(line)
                logging.info("Step-GRPO: %s", line)

    def _checks(self, policy: Policy) -> Iterator[str]:
        training, item = self.training, self._items(0)[0]
        prompt = self._prompt(item)
        yield grpo_preflight.check_variance(self.sigmas, training)
        noise = self._noise([item] * training.group)
        length = self.models.prompts[prompt][0][0].shape[1]
        values = sum(parameter.numel() for parameter in self.adapters.parameters())
        yield grpo_preflight.check_memory(policy, prompt, noise, length, values, training)
        yield grpo_preflight.check_ratio(policy.of(prompt), noise, self.sigmas, training)
        summary = self._roll_out(policy, item).summary()
        gradients = [parameter.grad for parameter in self.adapters.parameters()]
        yield grpo_preflight.check_learning(summary, gradients, training)
        self.state.optimizer.zero_grad(set_to_none=True)

    def _learn(self, policy: Policy) -> None:
        """Iterations up to the next look, and the pictures for it."""
        progress, until = self.state.progress, self._next_look
        with self.adapters.attached(self.network):
            while progress.iteration < until:
                self._iterate(policy)
                due = progress.iteration % self.training.save_every == 0
                late = time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES
                if (due or late) and progress.iteration < until:
                    self._save()
            with self._holding(self.state.average):
                self.latest = self._pictures(policy)

    def _draw_best(self, policy: Policy) -> None:
        with self._holding(None), self.adapters.attached(self.network):
            self.adapters.load(self.state.best)
            self.best = self._pictures(policy)

    # one iteration

    def _iterate(self, policy: Policy) -> None:
        """One update, in smaller parts when memory does not suffice."""
        while True:
            self.state.optimizer.zero_grad(set_to_none=True)
            try:
                summaries = [self._roll_out(policy, item).summary() for item in self._items()]
                break
            except Exception as error:
                if not comfy_adapters.is_out_of_memory(error):
                    raise
            self._spare(policy)
        self._update()
        progress = self.state.progress
        progress.iteration += 1
        self.done_here += 1
        mean = {key: sum(one[key] for one in summaries) / len(summaries) for key in summaries[0]}
        progress.rewards.append(mean["rewards/mean"])
        progress.kl.append(mean["kl"])
        logging.info("Step-GRPO: %s", self.line)

    def _spare(self, policy: Policy) -> None:
        mm.soft_empty_cache()
        what = policy.smaller(self.training.group)
        if what is None:
            raise OutOfMemoryError(
                f"out of memory in iteration {self.state.progress.iteration + 1}, with one picture at once"
                " and every block computed again: choose a smaller width and height or fewer num_branches"
            )
        self.notes.append(
            f"out of memory in iteration {self.state.progress.iteration + 1}: from there {what}"
        )
        logging.warning("Step-GRPO: %s", self.notes[-1])

    def _roll_out(self, policy: Policy, item: int) -> Figures:
        """Gradients of one prompt's trajectories, their share of the iteration's."""
        training, prompt = self.training, self._prompt(item)
        streams = [item * training.group + i for i in range(training.group)]
        method = grpo if training.method == "grpo" else step_grpo
        return method(
            policy.of(prompt),
            self._scorer(self.models.drm, prompt, training.group),
            self._noise(streams),
            self.sigmas,
            training.settings,
            seed=training.seed,
            items=streams,
            backward=lambda loss: (loss / training.prompts_per_iteration).backward(),
            reference=lambda x, sigma: self._without(policy.of(prompt), x, sigma),
            on_step=lambda step, steps: self._tick(item, step, steps),
        )

    def _without(self, velocity: object, x: Tensor, sigma: float) -> Tensor:
        """The frozen policy's velocity."""
        self.adapters.enabled = False
        try:
            return velocity(x, sigma)
        finally:
            self.adapters.enabled = True

    def _update(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise ValueError(
                f"the gradient of iteration {self.state.progress.iteration + 1} is {float(norm)}: lower the"
                " learning rate, or load the MODEL in bfloat16 or float32"
            )
        self.state.optimizer.step()
        decay = self.training.ema_decay
        if decay:
            now = [parameter.detach() for parameter in self.adapters.parameters()]
            before = self.state.average or now
            self.state.average = [b.lerp(n, 1 - decay) for b, n in zip(before, now, strict=True)]

    @contextlib.contextmanager
    def _holding(self, values: list[Tensor] | None) -> Iterator[None]:
        """Within it the matrices are others, if any are given; afterwards they are again what they were."""
        parameters = list(self.adapters.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            for parameter, value in zip(parameters, values or kept, strict=True):
                parameter.data.copy_(value)
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)

    # looks

    @torch.no_grad()
    def _pictures(self, policy: Policy) -> Pictures:
        """Draws the prompts kept aside, without noise on the way, from seeds of their own."""
        numbers = self.training.held_out
        count = min(4, max(2, PICTURES // len(numbers)))
        latents, scores = [], []
        for number in numbers:
            x = self._noise([(1 << 40) + number * 4 + i for i in range(count)])
            for sigma, sigma_next in zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True):
                x = torch.cat(
                    [x_ + policy.velocity(number, x_, sigma) * (sigma_next - sigma) for x_ in x.split(1)]
                )
            scorer = self._scorer(self.models.judge, number, count)
            scores += [
                score_latents(scorer, x, sigma, 2, self.training.seed ^ 1) for sigma in HELD_OUT_SIGMAS
            ]
            latents.append(x.float().cpu())
        return Pictures(
            latents=latents, score=float(torch.stack(scores).mean()), diversity=diversity(latents)
        )

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
        left = (time.monotonic() - self.began) / max(1, self.done_here) * (total - progress.iteration)
        words = [f"iteration {progress.iteration} of {total}"]
        if progress.rewards:
            words += [f"reward {progress.rewards[-1]:+.3f}", f"KL {progress.kl[-1]:.2g}"]
        if progress.watch.looks:
            words.append(f"held-out {progress.watch.looks[-1].held_out:+.3f}")
        return ", ".join([*words, f"{int(left) // 60} min {int(left) % 60:02d} s left"])

    @property
    def held_out(self) -> list[tuple[int, float]]:
        watch = self.state.progress.watch
        return [(0, watch.start), *((look.iteration, look.held_out) for look in watch.looks)]

    @property
    def _state_path(self) -> Path:
        return self.path.with_suffix(".resume")

    @property
    def _next_look(self) -> int:
        every = self.training.preview_every
        return min(self.training.iterations, (self.state.progress.iteration // every + 1) * every)

    @property
    def _total(self) -> int:
        return self.training.iterations * self.training.prompts_per_iteration * self.training.steps

    def show_picture(self, preview: tuple) -> None:
        """("JPEG", picture, largest side or None), on the node."""
        self.bar.update_absolute(self.bar.current, self._total, preview)

    def _tick(self, item: int, step: int, steps: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(item * self.training.steps + step + 1, self._total)

    def _items(self, iteration: int | None = None) -> list[int]:
        """Numbers of an iteration's prompts in the run's endless row of them."""
        iteration = self.state.progress.iteration if iteration is None else iteration
        count = self.training.prompts_per_iteration
        return list(range(iteration * count, (iteration + 1) * count))

    def _prompt(self, item: int) -> int:
        """Which prompt comes at a place of the row: all once, in another order each time."""
        learned = self.training.learned
        turn, place = divmod(item, len(learned))
        generator = torch.Generator().manual_seed((self.training.seed + turn) & MASK)
        return learned[int(torch.randperm(len(learned), generator=generator)[place])]

    def _noise(self, streams: list[int]) -> Tensor:
        """Starting noise (len(streams), C, H, W) on the device, ComfyUI's own of a seed a stream."""
        seeds = [(self.training.seed * 1_000_003 + stream) & MASK for stream in streams]
        noise = torch.cat([comfy.sample.prepare_noise(self.latents, seed) for seed in seeds])
        return noise.to(self.models.model.load_device)

    def _scorer(self, drm: object, prompt: int, batch: int) -> comfy_adapters.Scorer:
        prompts = comfy_adapters.ScoringPrompts(self.models.prompts[prompt], self.sampling.percent_to_sigma)
        return comfy_adapters.Scorer(drm, prompts, batch)

    def _tensors(self) -> dict[str, Tensor]:
        with self._holding(self.state.average):
            return self.adapters.tensors()

    def _save(self, tensors: dict[str, Tensor] | None = None) -> None:
        """LoRA and state; a full disk is said, not the end of the run."""
        try:
            save_lora(tensors or self._tensors(), self.path, self.facts())
            self.state.save(self._state_path)
        except OSError as error:
            note = f"{self.path.name} could not be saved ({error})"
            logging.warning("Step-GRPO: %s", note)
            self.notes = [*[line for line in self.notes if line != note], note]
        self.saved_at = time.monotonic()

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
