"""A run of Step-GRPO's command: roll-outs spread over processes, updates, looks at held-out prompts, resume.

Every process rolls out its share of an iteration's prompts and learns from it; the gradients of the LoRA,
which are small, are added up once an iteration by hand: a roll-out is many forward and backward passes with
the adapters on and off, of which DDP would make nothing but trouble.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from drm import DRM, flow, grpo
from drm.checkpoint import load_whole_drm
from drm.collect import collect
from drm.forward_rl import learn_forward, old_decay
from drm.lora import load_lora
from drm.precision import runs_in_bfloat16
from training.data.batches import Share, generator
from training.data.decoders import load_decoder
from training.data.prompt_cache import open_or_make, read_prompts
from training.engine.launch import TrainingError, make_accelerator
from training.engine.steps import Run, adamw
from training.evaluation.baselines import load_baseline
from training.grpo.diffusers_policy import build_policy, check_fit
from training.grpo.export import hash_of, lora_facts, write_lora
from training.grpo.figures import Tally
from training.grpo.held_out_prompts import HeldOut, grid
from training.grpo.step_grpo_config import StepGRPOConfig

RESULT, BEST = "lora.safetensors", "best.safetensors"
ORDER, START, BRANCHES = 11, 12, 13  # streams of generator()


class StepGRPOTrainer:
    """One run: policy, reward, prompts, optimiser and where they stand. `run` trains and exports."""

    def __init__(self, config: StepGRPOConfig) -> None:
        self.config, self.settings, self.out = config, config.train, Path(config.train.out)
        self.accelerator = make_accelerator(self.out)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise TrainingError("the base is frozen and whole on every GPU: launch without FSDP or DeepSpeed")
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.prompts = read_prompts(config.data.prompts)
        held_out = read_prompts(config.data.held_out) if config.data.held_out else []
        self.cache = open_or_make(config.data, [*self.prompts, *held_out], self.accelerator)
        self.drm = self._load_drm(config.model.drm)
        self.policy = build_policy(config.model, seed=self.settings.seed, device=self.device)
        check_fit(self.policy, self.drm, self.cache, "model.drm")
        if config.model.lora:
            self.policy.load(load_lora(config.model.lora)[0])
        self.empty = tuple(part.to(self.device) for part in self.cache.embeds([""]))
        self.sigmas = flow.schedule(config.rollout.steps, config.rollout.shift)
        self.share = Share(
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            global_batch=config.rollout.prompts,
            micro_batch=config.rollout.micro_prompts,
        )
        self.held_out = self._held_out(held_out) if held_out else None
        # A module of what learns alone: checkpoints need not walk the frozen network and its buffers.
        self.learned = torch.nn.ParameterDict(
            {name.replace(".", "/"): parameter for name, parameter in self.policy.learned.items()}
        )
        self.progress = Run(
            self.accelerator,
            self.out,
            self.learned,
            adamw(list(self.learned.values()), self.settings),
            self.settings,
            self._identity(),
            config.hash(),
            trails=config.grpo.is_forward,
        )
        self.curve: list[tuple[int, float]] = []

    def _load_drm(self, path: str) -> DRM:
        half = runs_in_bfloat16(self.config.model.precision, self.device)
        drm = load_whole_drm(path, self.device, torch.bfloat16 if half else torch.float32)
        return drm.requires_grad_(False)

    def _held_out(self, prompts: list[str]) -> HeldOut:
        settings, vae = self.config.evaluate, self.config.model.vae
        others = {name: self._load_drm(path) for name, path in settings.drms.items()}
        for name, drm in others.items():
            check_fit(self.policy, drm, self.cache, f"evaluate.drms.{name}")
        return HeldOut(
            settings,
            self.config.rollout,
            prompts,
            self.cache,
            drm=self.drm,
            others=others,
            baselines={
                name: load_baseline(spec, str(self.device)) for name, spec in settings.baselines.items()
            },
            decode=load_decoder(vae, self.device) if vae else None,
            device=self.device,
        )

    def run(self) -> None:
        """From the last checkpoint, or the start, to the exported LoRA."""
        start, best_by = self.progress.resume(), self.config.evaluate.best_by
        self.curve = [(row["step"], row[best_by]) for row in self.progress.evaluations()]
        self.accelerator.init_trackers("step_grpo", config={"hash": self.config.hash()})
        done = self._train(start)
        self._export(RESULT, done)
        self.accelerator.end_training()

    @property
    def method(self) -> str:
        return self.config.grpo.method

    def _identity(self) -> dict:
        digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {**self.config.identity(), "prompts": digest}

    def _train(self, start: int) -> int:
        """Iterations until all are done, or the held-out score is out of patience; how many were done."""
        if start == 0:
            self._look(0)
        total = self.settings.iterations
        for iteration in self.progress.steps(start, total, self.method):
            if self._out_of_patience():
                self.progress.say(
                    f"the held-out score has not risen since iteration {self._best()[0]}: stopping"
                )
                return iteration
            row = self._iterate(iteration)
            self.progress.record(row, {"reward": f"{row['rewards/mean']:.4f}", "kl": f"{row['kl']:.2e}"})
            self._look(iteration + 1)
            self.progress.save_if_due(iteration + 1, total)
        return total

    def prompt_of(self, iteration: int, slot: int) -> str:
        """Every prompt once an epoch, in an order of its own in each."""
        epoch, place = divmod(iteration * self.config.rollout.prompts + slot, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=generator(self.settings.seed, ORDER, epoch))
        return self.prompts[int(order[place])]

    def _iterate(self, iteration: int) -> dict:
        begun, tally = time.perf_counter(), Tally()
        for micro in range(self.share.micro_steps):
            slots = [slot for slot in self.share.slots_of(micro) if slot < self.share.global_batch]
            if slots:
                self._roll_out(iteration, slots, tally)
        self._add_up_gradients()
        figures = tally.summary(self.accelerator)
        every = self.settings.ema_every
        averages = iteration // every if (iteration + 1) % every == 0 else None
        trailing = self.config.forward.trailing
        decay = old_decay(iteration, self.method, trailing) if self.config.grpo.is_forward else None
        norm = self.progress.update(
            iteration, figures["loss"], "set model.precision to 'no'", averages, decay
        )
        seconds = round(time.perf_counter() - begun, 3)
        return {"step": iteration, **figures, "grad_norm": norm, "seconds": seconds}

    def _roll_out(self, iteration: int, slots: list[int], tally: Tally) -> None:
        """One micro-batch: drawn, scored and learned from."""
        settings, seed = self.config.grpo, self.settings.seed
        each = settings.trajectories
        items = [slot * each + branch for slot in slots for branch in range(each)]
        side = self.config.rollout.resolution // 8
        shape = (self.policy.transformer.config.in_channels, side, side)
        noise = torch.stack(
            [torch.randn(shape, generator=generator(seed, START, iteration, item)) for item in items]
        )
        prompt = tuple(
            part.to(self.device).repeat_interleave(each, 0)
            for part in self.cache.embeds([self.prompt_of(iteration, slot) for slot in slots])
        )
        share = len(slots) / self.share.global_batch

        def policy(x: Tensor, sigma: float) -> Tensor:
            return self.policy.guided(x, sigma, prompt, self.empty, self.config.rollout.cfg)

        def reference(x: Tensor, sigma: float) -> Tensor:
            with self.policy.reference():
                return policy(x, sigma)

        def score(latents: Tensor, sigma: float, rows: Tensor) -> Tensor:
            return self.drm.score(latents, sigma, prompt[0][rows], prompt[1][rows])

        def backward(loss: Tensor) -> None:
            (share * loss).backward()
            tally.sums["loss"] += share * loss.item()

        known = {
            "seed": int(torch.randint(2**62, (), generator=generator(seed, BRANCHES, iteration))),
            "items": items,
            "backward": backward,
            "reference": reference,
        }
        noise = noise.to(self.device)
        try:
            if settings.is_forward:
                figures = self._learn_forward(policy, score, noise, **known)
            else:
                figures = grpo.roll_out(policy, score, noise, self.sigmas, settings, **known)
        except ValueError as error:
            raise TrainingError(f"iteration {iteration}: {error}") from error
        tally.add(figures, len(items))

    def _learn_forward(
        self,
        policy: grpo.Policy,
        score: grpo.Score,
        noise: Tensor,
        *,
        seed: int,
        items: list[int],
        backward: grpo.Backward,
        reference: grpo.Policy,
    ) -> grpo.Figures:
        """Samples by the policy that learns, NFT's by the one that trails it, and what they teach."""
        settings = self.sigmas, self.config.grpo, self.config.forward
        drawer = self.progress.with_old() if self.method.endswith("nft") else contextlib.nullcontext()
        with drawer:
            samples, forwards = collect(policy, score, noise, *settings, seed=seed, items=items)

        def old(x: Tensor, sigma: float) -> Tensor:
            with self.progress.with_old():
                return policy(x, sigma)

        figures = learn_forward(
            policy,
            score,
            samples,
            *settings,
            seed=seed,
            items=items,
            backward=backward,
            old=old,
            reference=reference,
        )
        figures.forwards += forwards
        return figures

    def _add_up_gradients(self) -> None:
        parameters = list(self.learned.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.accelerator.reduce(flat, "sum")
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def _look(self, done: int) -> None:
        """Evaluation and pictures, where they are due."""
        if self.held_out is None:
            return
        last = done == self.settings.iterations
        every, pictures = self.settings.evaluate_every, self.settings.pictures_every
        with self.progress.with_averages():
            if every and (done % every == 0 or last):
                self._evaluate(done)
            if pictures and (done % pictures == 0 or last):
                self._pictures(done)

    def _spread(self, count: int, work: Callable[[list[int]], Tensor]) -> Tensor:
        """work(numbers) -> (len(numbers), ...) for 0 .. count - 1, each process its part; all get all."""
        each = math.ceil(count / self.share.world)
        mine = [min(i * self.share.world + self.share.rank, count - 1) for i in range(each)]
        size = max(1, self.config.evaluate.batch // self.config.evaluate.seeds)
        parts = [work(mine[i : i + size]) for i in range(0, each, size)]
        found = self.accelerator.gather(torch.cat(parts))
        return found.unflatten(0, (self.share.world, each)).transpose(0, 1).flatten(0, 1)[:count]

    @torch.no_grad()
    def _evaluate(self, done: int) -> None:
        held_out = self.held_out
        table = self._spread(len(held_out.prompts), lambda numbers: held_out.table(self.policy, numbers))
        row = dict(zip(held_out.names, table.mean(0).tolist(), strict=True))
        row = {"step": done, "prompts": len(table), **row}
        for name, value in row.items():
            if not math.isfinite(value):
                raise TrainingError(f"the held-out score after {done} iterations is {value} ({name})")
        best, score = self._best(), row[self.config.evaluate.best_by]
        self.curve.append((done, score))
        if best is None or score > best[1]:
            self._write(BEST, done)
        self.progress.evaluated(row)
        self.accelerator.log({f"held_out/{k}": v for k, v in row.items() if k != "step"}, step=done)

    def _pictures(self, done: int) -> None:
        # One process draws, the others wait at the next gradient: it is a handful of pictures.
        if not self.main:
            return
        numbers = range(min(self.config.evaluate.pictures, len(self.held_out.prompts)))
        sheet = grid([self.held_out.pictures(self.policy, [number])[0] for number in numbers])
        (self.out / "pictures").mkdir(exist_ok=True)
        sheet.save(self.out / "pictures" / f"{done:08d}.png")

    def _best(self) -> tuple[int, float] | None:
        return max(self.curve, key=lambda point: point[1], default=None)

    def _out_of_patience(self) -> bool:
        if self.settings.patience is None or not self.curve:
            return False
        since = [step for step, _ in self.curve if step > self._best()[0]]
        return len(since) >= self.settings.patience

    def _export(self, name: str, done: int) -> None:
        with self.progress.with_averages():
            self._write(name, done)
        if self.main:
            print(f"LoRA -> {self.out / name}", file=sys.stderr)

    def _write(self, name: str, done: int) -> None:
        """The LoRA as it stands, and where it comes from in the header."""
        if self.main:
            facts = lora_facts(self.config, done, self.curve, self._hashes)
            write_lora(self.policy.tensors(), self.out / name, facts)

    @functools.cached_property
    def _hashes(self) -> tuple[dict, dict]:
        """Of base and reward model; of files of many GB, so once."""
        return hash_of(self.config.model.base), hash_of(self.config.model.drm)
