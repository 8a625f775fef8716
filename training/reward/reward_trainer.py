"""A run of the reward model's command: training over all processes, resume, held-out accuracy, export.

Accelerate wraps network and optimiser. Which pairs, sigmas and noise a step sees is a function of (seed,
step), and gradients are weighted by the whole batch's weight, so the run is the same for any number of
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from drm import save_drm
from drm.head import ConvGNHead
from drm.precision import runs_in_bfloat16
from training.config import DRMConfig, TrainConfig
from training.data.batches import (
    Batch,
    HeldOutBatches,
    Mixture,
    Share,
    TrainingBatches,
    generator,
    logit_normal_sigmas,
    timed_batches,
    uniform_sigmas,
)
from training.data.shards import EncodedPairs
from training.engine import checkpoints, zero
from training.engine.launch import TrainingError, configure_zero, make_accelerator
from training.engine.steps import Run, adamw
from training.reward import trainable
from training.reward.held_out_pairs import (
    SIGMA_PARTS,
    as_rows,
    calibrated,
    export_facts,
    held_out_table,
    in_order,
)
from training.reward.pair_loss import Tally, pair_losses

CALIBRATION_BINS = 10
RESULT = "reward.safetensors"


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))


def some_of(rows: Tensor, count: int | None, seed: int) -> Tensor:
    """`count` of the rows, drawn evenly from all of them and kept in their order; all when None."""
    if count is None or count >= len(rows):
        return rows
    return rows[torch.randperm(len(rows), generator=generator(seed, 6))[:count].sort().values]


class RewardTrainer:
    """One run: network, data, optimiser and where they stand. `run` trains, evaluates and exports."""

    def __init__(self, config: DRMConfig) -> None:
        self.config, self.settings, self.out = config, config.train, Path(config.train.out)
        self.accelerator = make_accelerator(self.out)
        self.device = self.accelerator.device
        self.pairs = EncodedPairs(config.data.encoded)
        half = runs_in_bfloat16(self.settings.precision, self.device)
        drm = trainable.build(
            config.model,
            seed=self.settings.seed,
            frozen_dtype=torch.bfloat16 if half else torch.float32,
        )
        _check_data(drm, self.pairs)
        self.text_width, self.metadata = drm.prompt_dim, drm.metadata
        if zero.is_zero(self.accelerator):
            if config.model.train != "full":
                raise TrainingError(
                    f"model.train is {config.model.train!r} under DeepSpeed, which has little to share out"
                    " then: launch with training/configs/accelerate_8gpu.yaml, or set it to full"
                )
            configure_zero(self.accelerator, clip=self.settings.clip, autocast=half)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        held_out = self.pairs.columns["held_out"]
        rows = some_of(torch.argwhere(~held_out).flatten(), config.data.limit, self.settings.seed)
        weights = {**self.pairs.meta.get("weights", {}), **config.data.weights}
        sources = [self.pairs.columns["source"][row] for row in rows.tolist()]
        self.mixture = Mixture(rows, sources, weights, self.settings.seed)
        self.held_out = some_of(torch.argwhere(held_out).flatten(), self.settings.held_out_pairs, 0)
        per_epoch = math.ceil(len(self.mixture) / self.settings.global_batch)
        self.steps = self.settings.steps or math.ceil(self.settings.epochs * per_epoch)
        self.share = Share(
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            global_batch=self.settings.global_batch,
            micro_batch=self.settings.micro_batch,
        )
        optimizer = adamw([p for p in drm.parameters() if p.requires_grad], self.settings)
        self.model, prepared = self.accelerator.prepare(drm, optimizer)
        self.progress = Run(
            self.accelerator,
            self.out,
            self.accelerator.unwrap_model(self.model),
            prepared.optimizer,
            self.settings,
            self._identity(),
            config.hash(),
        )

    def run(self) -> None:
        """From the last checkpoint, or the start, to the exported model."""
        start = self.progress.resume()
        self.accelerator.init_trackers("drm", config={"hash": self.config.hash()})
        if start < self.steps:
            self._train(start)
        table = self.evaluate(self.steps, CALIBRATION_BINS)
        self.export(table)
        self.accelerator.end_training()

    def _identity(self) -> dict:
        """What must not change within a run; how it is spread, saved and for how long may."""
        tree = json.loads(json.dumps(dataclasses.asdict(self.config)))
        free = {"out", "steps", "epochs", "micro_batch", "save_every", "keep", "evaluate_every", "workers"}
        return {
            "model": tree["model"] | {"gradient_checkpointing": None},
            "data": tree["data"],
            "train": {key: value for key, value in tree["train"].items() if key not in free},
            "pairs": len(self.pairs),
        }

    def _sigmas(self) -> Callable[[torch.Generator, int], Tensor]:
        if self.settings.sigma_draw == "uniform":
            return functools.partial(uniform_sigmas, *self.settings.sigma)
        return functools.partial(logit_normal_sigmas, self.settings.shift)

    def _batches(self, data: Dataset) -> Iterator[tuple[Batch, float]]:
        return timed_batches(data, self.settings.workers, pin_memory=self.device.type == "cuda")

    def _train(self, start: int) -> None:
        data = TrainingBatches(
            self.pairs,
            self.mixture,
            self.share,
            start=start,
            steps=self.steps,
            sigmas=self._sigmas(),
            shared_noise=self.settings.noise == "shared",
            drop_t5=self.config.data.drop_t5,
            text_width=self.text_width,
            seed=self.settings.seed,
        )
        batches = self._batches(data)
        for step in self.progress.steps(start, self.steps, "reward model"):
            row = self._step(step, data.total_weight(step), batches)
            self.progress.record(row, {"loss": f"{row['loss']:.4f}", "accuracy": f"{row['accuracy']:.3f}"})
            done, every = step + 1, self.settings.evaluate_every
            self.progress.save_if_due(done, self.steps)
            if every and done % every == 0 and done != self.steps:
                self.evaluate(done)

    def _step(self, step: int, total_weight: float, batches: Iterator[tuple[Batch, float]]) -> dict:
        begun, waited, tally = time.perf_counter(), 0.0, Tally.empty(self.device)
        for micro in range(self.share.micro_steps):
            batch, seconds = next(batches)
            waited += seconds
            batch = batch.to(self.device)
            last = micro + 1 == self.share.micro_steps
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                chosen, rejected = self._scores(batch)
                loss = pair_losses(chosen, rejected, batch, self.settings.loss)
                # DDP averages over processes, so each gives its part of the global mean times their number.
                share = batch.weight.sum() / total_weight * self.share.world
                self.progress.backward(loss * share, last)
            tally.add(loss, chosen, rejected, batch)
        rate = learning_rate_at(step, self.settings)
        for group in self.progress.optimizer.param_groups:
            group["lr"] = rate
        tally.sums = self.accelerator.reduce(tally.sums, "sum")
        figures = tally.figures()
        advice = f"look at the pairs of that step ({self.mixture_rows(step)})"
        norm = self.progress.update(step, figures["loss"], advice, averages=step)
        seconds = time.perf_counter() - begun
        return {
            "step": step,
            **figures,
            "grad_norm": norm,
            "learning_rate": rate,
            "samples_per_second": round(self.settings.global_batch / seconds, 3),
            "waiting": round(waited / seconds, 4),
        }

    def mixture_rows(self, step: int) -> str:
        """The first few places the pairs of a step came from."""
        per_epoch = math.ceil(len(self.mixture) / self.settings.global_batch)
        number, place = divmod(step, per_epoch)
        rows = self.mixture.epoch(number)[place * self.settings.global_batch :][:3]
        return ", ".join(self.pairs.columns["row"][row] for row in rows.tolist())

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) each, of chosen and rejected."""
        head = self.progress.learned.head
        if isinstance(head, ConvGNHead):
            # Both sides of a pair drop alike, so that they differ in the pictures alone.
            head.drop.numbers = batch.number.repeat(2).tolist()
        with self.autocast:
            scores = self.model(
                batch.noisy,
                batch.sigma.repeat(2),
                batch.prompt_embeds.repeat(2, 1, 1),
                batch.pooled.repeat(2, 1),
            )
        return scores.float().chunk(2)

    @torch.no_grad()
    def evaluate(self, step: int, bins: int | None = None) -> dict:
        """Held-out accuracy by quarter of sigma, by source, and the calibration when `bins` is
        given; {} without held-out pairs. With averaged weights where they are kept.
        """
        if not len(self.held_out):
            return {}
        lengths = self.pairs.t5_lengths
        data = HeldOutBatches(
            self.pairs,
            self.held_out,
            rank=self.share.rank,
            world=self.share.world,
            micro_batch=self.settings.micro_batch,
            sigmas_each=SIGMA_PARTS,
            t5_length=lengths[0] if lengths else None,
            text_width=self.text_width,
            seed=self.settings.seed,
        )
        self.model.eval()
        with self.progress.with_averages():
            found = [self._held_out_scores(batch.to(self.device)) for batch, _ in self._batches(data)]
        self.model.train()
        gathered = self.accelerator.gather(torch.stack(found, dim=1))
        chosen, rejected, sigma = in_order(gathered)
        sources = [self.pairs.columns["source"][row] for row in self.held_out.tolist()]
        table = held_out_table(chosen, rejected, sigma, sources)
        if bins:
            table |= calibrated(chosen, rejected, sigma, bins)
        self.progress.evaluated({"step": step, **table})
        return table

    def _held_out_scores(self, batch: Batch) -> Tensor:
        return as_rows(*self._scores(batch), batch.sigma, batch.weight)

    def export(self, table: dict) -> None:
        """reward.safetensors: adapters merged, averaged weights, and where they come from in the header."""
        with self.progress.with_averages():
            state = checkpoints.whole_weights(self.progress.learned)
        if not self.accelerator.is_main_process:
            return
        drm = trainable.build(self.config.model, seed=self.settings.seed)
        drm.load_state_dict(state)
        facts = self.metadata | export_facts(self.config, self.pairs, self.steps, table)
        save_drm(trainable.plain(drm), self.out / RESULT, metadata=facts, dtype=torch.float16)
        print(f"reward model -> {self.out / RESULT}", file=sys.stderr)


def _check_data(drm: torch.nn.Module, pairs: EncodedPairs) -> None:
    channels = pairs.latent_shape[0]
    if channels != drm.in_channels:
        raise TrainingError(
            f"the encoded latents have {channels} channels, the base model takes {drm.in_channels}: encode"
            " with the VAE of that model"
        )
    embeds, pooled = pairs.prompts([0], pairs.t5_lengths[0] if pairs.t5_lengths else None)
    if embeds.shape[-1] > drm.prompt_dim or pooled.shape[-1] != drm.pooled_dim:
        raise TrainingError(
            f"the encoded prompts are {embeds.shape[-1]} wide and pooled {pooled.shape[-1]}, the base model"
            f" takes {drm.prompt_dim} and {drm.pooled_dim}: encode with the text encoders of that model"
        )
