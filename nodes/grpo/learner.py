"""What Step-GRPO LoRA Trainer does inside a sampling: roll-outs that learn, updates, pictures to look at.

Everything random is a function of (seed, number of the trajectory), so a run that was stopped and goes on
draws the same noise and prompts as one that never was.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor, nn

from ...drm.forward_rl import learn_forward, old_decay
from ...drm.grpo import Figures, Policy, roll_out
from ...drm.lora import Adapters, Target, comfy_targets, named_targets
from .. import adapters as comfy_adapters
from .. import trunk
from ..score import score_latents
from . import preflight
from .comfy_policy import ComfyPolicy
from .files import Progress, State
from .inputs import PICTURES, Training
from .watch import Watch, diversity

Score = Callable[[Tensor, float, Tensor], Tensor]
HELD_OUT_SIGMAS = (0.1, 0.3, 0.5)
MASK = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Models:
    """What is connected: MODEL, DRM, the second DRM or the first again, the prompts as CONDITIONINGs,
    the LoRA to go on from."""

    model: comfy.model_patcher.ModelPatcher
    drm: comfy.model_patcher.ModelPatcher
    judge: comfy.model_patcher.ModelPatcher
    prompts: list[list]
    negative: list
    lora: dict[str, Tensor] | None = None

    @property
    def drms(self) -> list[comfy.model_patcher.ModelPatcher]:
        return [self.drm] if self.judge is self.drm else [self.drm, self.judge]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Latents of the prompts kept aside, one (S, C, H, W) each, and what they are worth."""

    latents: list[Tensor]
    score: float
    diversity: float


def targets_of(base: comfy.model_base.BaseModel) -> list[Target]:
    """The attention layers of a MODEL's network; ValueError for a family where none can be learned on."""
    family = trunk.family_of(base)
    if family.name == "sd3":
        return comfy_targets(comfy_adapters.network_of(base))
    if not family.attention:
        raise ValueError(
            f"no LoRA can be learned on a MODEL of {family.name}: ComfyUI's own layers of it have no backward"
            " pass. Use a model of another family; a head on this one can be trained and sampled with"
        )
    return named_targets(trunk.attention_layers(base))


class OutOfMemoryError(RuntimeError):
    """No smaller part is left to take at once."""


class Learner:
    """The LoRA that is learned, and all that is done with the policy. notes: what a report should mention."""

    def __init__(self, training: Training, models: Models, tick: Callable[[int], object]) -> None:
        """tick: called at every step with the number of steps that the run has taken."""
        self.training, self.models, self.tick = training, models, tick
        self.network = comfy_adapters.network_of(models.model.model)
        self.sampling = models.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(self.sampling, "simple", training.steps)
        self.latents = comfy_adapters.empty_latent(models.model, training.width, training.height)
        self.adapters = Adapters(targets_of(models.model.model), training.rank, training.alpha, training.seed)
        if models.lora is not None:
            self.adapters.load(models.lora)
        self.adapters.to(models.model.load_device)
        optimizer = torch.optim.AdamW(
            self.adapters.parameters(), training.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4
        )
        self.state = State(self.adapters, optimizer, Progress(Watch(start=0.0)))
        if training.settings.is_forward:
            self.state.old = [parameter.detach().clone() for parameter in self.adapters.parameters()]
        self.notes: list[str] = []

    # learning

    def check(self, policy: ComfyPolicy) -> Iterator[str]:
        """The pre-flight, one line a check; ValueError for the first that fails."""
        training, item = self.training, 0
        prompt = self.prompt(item)
        if not training.settings.is_forward:
            yield preflight.check_variance(self.sigmas, training)
        noise = self.noise([item] * training.group)
        length = self.models.prompts[prompt][0][0].shape[1]
        values = sum(parameter.numel() for parameter in self.adapters.parameters())
        yield preflight.check_memory(policy, prompt, noise, length, values, training)
        walked = policy.of(prompt), noise, self.sigmas, training
        yield self.sparing(policy, lambda: preflight.check_ratio(*walked))
        summary = self.sparing(policy, lambda: self.roll_out(policy, item).summary())
        gradients = [parameter.grad for parameter in self.adapters.parameters()]
        yield preflight.check_learning(summary, gradients, training)
        self.state.optimizer.zero_grad(set_to_none=True)

    def iterate(self, policy: ComfyPolicy) -> dict[str, float]:
        """One update of the LoRA and the means of its figures."""
        items = self.items(self.state.progress.iteration)
        figures = self.sparing(policy, lambda: [self.roll_out(policy, item) for item in items])
        self._update()
        summaries = [one.summary() for one in figures]
        mean = {key: sum(one[key] for one in summaries) / len(summaries) for key in summaries[0]}
        progress = self.state.progress
        progress.iteration += 1
        progress.rewards.append(mean["rewards/mean"])
        progress.kl.append(mean["kl"])
        return mean

    def sparing(self, policy: ComfyPolicy, work: Callable[[], Any]) -> Any:
        """work(), from the start again in smaller parts as long as memory does not suffice."""
        while True:
            self.state.optimizer.zero_grad(set_to_none=True)
            try:
                return work()
            except Exception as error:
                if not comfy_adapters.is_out_of_memory(error):
                    raise
            # Out of the except clause, or the error would keep alive what it found in memory.
            self._spare(policy)

    def _spare(self, policy: ComfyPolicy) -> None:
        mm.soft_empty_cache()
        number = self.state.progress.iteration + 1
        what = policy.smaller(self.training.group)
        if what is None:
            raise OutOfMemoryError(
                f"out of memory in iteration {number}, with one picture at once and every block computed"
                " again: choose a smaller width and height or fewer num_branches"
            )
        self.notes.append(f"out of memory in iteration {number}: from there {what}")
        logging.warning("Step-GRPO: %s", self.notes[-1])

    def roll_out(self, policy: ComfyPolicy, item: int) -> Figures:
        """Gradients of one prompt's trajectories or samples, their share of the iteration's."""
        training, prompt = self.training, self.prompt(item)
        streams = [item * training.group + i for i in range(training.group)]
        velocity = policy.of(prompt)
        score = self.scorer(policy, self.models.drm, prompt, training.group)
        if training.settings.is_forward:
            return self._learn_forward(velocity, score, item, streams)
        return roll_out(
            velocity,
            score,
            self.noise(streams),
            self.sigmas,
            training.settings,
            seed=training.seed,
            items=streams,
            backward=self._backward,
            reference=lambda x, sigma: self._without(velocity, x, sigma),
            on_step=lambda step, _: self._tick(item, step),
        )

    def _learn_forward(self, velocity: Policy, score: Score, item: int, streams: list[int]) -> Figures:
        """Pictures by the policy that learns, NFT's by the one that trails it, and what they teach."""
        from ...drm.collect import collect

        training, settings = self.training, self.training.settings

        def old(x: Tensor, sigma: float) -> Tensor:
            with self._as_old():
                return velocity(x, sigma)

        drawer, noise = old if settings.method.endswith("nft") else velocity, self.noise(streams)
        samples, forwards = collect(
            drawer, score, noise, self.sigmas, settings, training.forward, seed=training.seed, items=streams
        )
        figures = learn_forward(
            velocity,
            score,
            samples,
            self.sigmas,
            settings,
            training.forward,
            seed=training.seed,
            items=streams,
            draw=item,
            backward=self._backward,
            old=old,
            reference=lambda x, sigma: self._without(velocity, x, sigma),
            on_step=lambda level, levels: self._tick(item, level * training.steps // levels),
        )
        figures.forwards += forwards
        return figures

    def _backward(self, loss: Tensor) -> None:
        (loss / self.training.prompts_per_iteration).backward()

    @contextlib.contextmanager
    def _as_old(self) -> Iterator[None]:
        """Within it the matrices are the old policy's; not between a forward and its backward pass."""
        parameters = list(self.adapters.parameters())
        kept = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, self.state.old, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data = value

    def _without(self, velocity: Callable, x: Tensor, sigma: float) -> Tensor:
        """What the frozen policy gives."""
        self.adapters.enabled = False
        try:
            return velocity(x, sigma)
        finally:
            self.adapters.enabled = True

    def _tick(self, item: int, step: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        self.tick(item * self.training.steps + step + 1)

    def _update(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise ValueError(
                f"the gradient of iteration {self.state.progress.iteration + 1} is {float(norm)}: lower the"
                " learning rate, or load the MODEL in bfloat16 or float32"
            )
        self.state.optimizer.step()
        if self.state.old:
            trailing = 1 - old_decay(self.state.progress.iteration, self.training.method)
            for old, parameter in zip(self.state.old, self.adapters.parameters(), strict=True):
                old.lerp_(parameter.detach(), trailing)
        decay = self.training.ema_decay
        if decay:
            now = [parameter.detach() for parameter in self.adapters.parameters()]
            before = self.state.average or now
            self.state.average = [b.lerp(n, 1 - decay) for b, n in zip(before, now, strict=True)]

    @contextlib.contextmanager
    def holding(self, values: list[Tensor] | None) -> Iterator[None]:
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

    # pictures

    def pictures(self, policy: ComfyPolicy) -> Pictures:
        """Of the prompts kept aside, drawn without noise on the way, from seeds of their own."""
        return self.sparing(policy, lambda: self._draw(policy))

    @torch.no_grad()
    def _draw(self, policy: ComfyPolicy) -> Pictures:
        numbers = self.training.held_out
        count = min(4, max(2, PICTURES // len(numbers)))
        latents, scores = [], []
        for number in numbers:
            x = self.noise([(1 << 40) + number * 4 + i for i in range(count)])
            for sigma, sigma_next in zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True):
                x = torch.cat(
                    [x_ + policy.velocity(number, x_, sigma) * (sigma_next - sigma) for x_ in x.split(1)]
                )
            scorer = self.scorer(policy, self.models.judge, number, count)
            scores += [
                score_latents(scorer, x, sigma, 2, self.training.seed ^ 1) for sigma in HELD_OUT_SIGMAS
            ]
            latents.append(x.float().cpu())
        score = float(torch.stack(scores).mean())
        if not math.isfinite(score):
            raise ValueError(f"the held-out score is {score}: the MODEL or the DRM gave NaN or infinity")
        return Pictures(latents=latents, score=score, diversity=diversity(latents))

    # what comes when

    def items(self, iteration: int) -> list[int]:
        """Numbers of an iteration's prompts in the run's endless row of them."""
        count = self.training.prompts_per_iteration
        return list(range(iteration * count, (iteration + 1) * count))

    def prompt(self, item: int) -> int:
        """Which prompt comes at a place of the row: all once, in another order each time."""
        learned = self.training.learned
        turn, place = divmod(item, len(learned))
        generator = torch.Generator().manual_seed((self.training.seed + turn) & MASK)
        return learned[int(torch.randperm(len(learned), generator=generator)[place])]

    def noise(self, streams: list[int]) -> Tensor:
        """Starting noise (len(streams), C, H, W) on the device, ComfyUI's own of a seed a stream."""
        seeds = [(self.training.seed * 1_000_003 + stream) & MASK for stream in streams]
        noise = torch.cat([comfy.sample.prepare_noise(self.latents, seed) for seed in seeds])
        return comfy_adapters.without_frames(noise).to(self.models.model.load_device)

    def scorer(self, policy: ComfyPolicy, drm: object, prompt: int, batch: int) -> Score:
        """A head on the MODEL's own tokens reads those of the MODEL as it came, never what is learned."""
        prompts = comfy_adapters.ScoringPrompts(self.models.prompts[prompt], self.sampling.percent_to_sigma)
        if not comfy_adapters.is_shared(drm):
            return comfy_adapters.Scorer(drm, prompts, batch)
        options = policy.extra_args["model_options"]
        like = self.latents.to(policy.device).expand(batch, *self.latents.shape[1:])
        score = trunk.shared_scorer(drm, policy.guider.inner_model, options, prompts, like)
        return lambda x, sigma, items: self._without(lambda x, sigma: score(x, sigma, items), x, sigma)
