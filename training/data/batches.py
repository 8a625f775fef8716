"""Which pairs a step learns from, with which noise: a pure function of (seed, step), whoever computes it.

    epoch      every source's pairs `weight` times (a fraction by drawing), shuffled; the last batch is short
    step       global_batch slots; slot j has its own pair, sigma and noise, all slots one T5 length
    process    an equal run of slots, in micro-batches; slots without a pair weigh nothing

So a run that was stopped goes on as if it had not been, and any number of processes sees the same batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from drm import flow
from training.data.shards import EncodedPairs, ShardError
from training.engine.launch import TrainingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """B pairs: noisy latents (2B, C, H, W), chosen first, then rejected, in the same order; sigma (B,);
    prompt_embeds (B, T, D), pooled (B, P); weight and label = P(chosen preferred), (B,).
    """

    noisy: Tensor
    sigma: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    weight: Tensor
    label: Tensor
    number: Tensor  # (B,) whole, another one for every pair of a run: seeds what a head drops

    def to(self, device: torch.device) -> Batch:
        return Batch(
            **{
                field.name: getattr(self, field.name).to(device, non_blocking=True)
                for field in dataclasses.fields(self)
            }
        )

    def pin_memory(self) -> Batch:  # called by DataLoader
        return Batch(
            **{field.name: getattr(self, field.name).pin_memory() for field in dataclasses.fields(self)}
        )


def generator(*numbers: int) -> torch.Generator:
    """Random numbers of their own for every tuple of whole numbers."""
    state = 0
    for number in numbers:  # splitmix64, so that neighbouring tuples share nothing
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


class Mixture:
    """The pairs of one epoch after another. `rows` (N,): the pairs that may be used; `sources`: whose each
    is; `weights` by source, 1 where not named.
    """

    def __init__(self, rows: Tensor, sources: list[str], weights: Mapping[str, float], seed: int) -> None:
        self.seed = seed
        names = sorted(set(sources))
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ShardError(f"data.weights names {unknown[0]}: the encoded sources are {', '.join(names)}")
        of = torch.tensor([names.index(source) for source in sources])
        self.parts = [(rows[of == i], float(weights.get(name, 1.0))) for i, name in enumerate(names)]
        if len(self) == 0:
            raise ShardError("no pair is left to train on: every one is held out, or every weight is 0")

    @staticmethod
    def _count(part: Tensor, weight: float) -> int:
        return round(weight * len(part))

    def __len__(self) -> int:
        return sum(self._count(part, weight) for part, weight in self.parts)

    def epoch(self, number: int) -> Tensor:
        """Rows of the pairs of this epoch, in order, (len(self),)."""
        rng = generator(self.seed, 1, number)
        drawn = []
        for part, weight in self.parts:
            count = self._count(part, weight)
            whole = count // max(1, len(part))
            drawn += [part] * whole
            drawn.append(part[torch.randperm(len(part), generator=rng)[: count - whole * len(part)]])
        order = torch.cat(drawn)
        return order[torch.randperm(len(order), generator=rng)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every global batch this process computes."""

    rank: int
    world: int
    global_batch: int
    micro_batch: int

    @property
    def slots(self) -> int:
        """Slots of one process; together they may be a few more than the global batch."""
        return math.ceil(self.global_batch / self.world)

    @property
    def micro_steps(self) -> int:
        return math.ceil(self.slots / self.micro_batch)

    def slots_of(self, micro: int) -> range:
        """Global slots of one micro-batch; some may lie beyond the global batch. Never more than needed."""
        size = math.ceil(self.slots / self.micro_steps)
        start = self.rank * self.slots + micro * size
        return range(start, min(start + size, (self.rank + 1) * self.slots))


def uniform_sigmas(low: float, high: float, draw: torch.Generator, count: int) -> Tensor:
    """(count,) from low to high."""
    return low + (high - low) * torch.rand(count, generator=draw)


def logit_normal_sigmas(shift: float, draw: torch.Generator, count: int) -> Tensor:
    """(count,) of the schedule 1, 0.999, ..., 0.001 after its shift, s -> shift s / (1 + (shift - 1) s); the
    place is logit-normal, sigmoid(N(0, 1)) of the way (the DRM authors' and SD3's).
    """
    place = (1000 * torch.randn(count, generator=draw).sigmoid()).long().clamp(max=999)
    even = 1 - place / 1000
    return shift * even / (1 + (shift - 1) * even)


class TrainingBatches(Dataset):
    """Item i is micro-batch i % micro_steps of step `start + i // micro_steps`, for one process."""

    def __init__(
        self,
        pairs: EncodedPairs,
        mixture: Mixture,
        share: Share,
        *,
        start: int,
        steps: int,
        sigmas: Callable[[torch.Generator, int], Tensor],
        shared_noise: bool,
        drop_t5: float,
        text_width: int,
        seed: int,
    ) -> None:
        self.pairs, self.mixture, self.share = pairs, mixture, share
        self.start, self.steps, self.drop_t5 = start, steps, drop_t5
        self.draw_sigmas, self.shared_noise = sigmas, shared_noise
        self.text_width, self.seed = text_width, seed
        self._epoch: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return (self.steps - self.start) * self.share.micro_steps

    def rows(self, step: int) -> Tensor:
        """The pairs of a step, (global_batch,) or fewer at the end of an epoch."""
        size = self.share.global_batch
        per_epoch = math.ceil(len(self.mixture) / size)
        number, place = divmod(step, per_epoch)
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = (number, self.mixture.epoch(number))
        return self._epoch[1][place * size : (place + 1) * size]

    def total_weight(self, step: int) -> float:
        """Sum of the weights of a step's pairs over all processes."""
        return float(self.pairs.columns["weight"][self.rows(step)].double().sum())

    def sigmas(self, step: int) -> Tensor:
        """(global_batch,)."""
        return self.draw_sigmas(generator(self.seed, 2, step), self.share.global_batch)

    def t5_length(self, step: int) -> int | None:
        """One length for all slots, because SD3 has no attention mask and a batch one shape."""
        lengths = self.pairs.t5_lengths
        if not lengths:
            return None
        drop, which = torch.rand(2, generator=generator(self.seed, 3, step)).tolist()
        return None if drop < self.drop_t5 else lengths[int(which * len(lengths))]

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.share.micro_steps)
        step += self.start
        rows, slots = self.rows(step), list(self.share.slots_of(micro))
        real = torch.tensor([slot < len(rows) for slot in slots])
        picked = torch.stack([rows[slot if slot < len(rows) else 0] for slot in slots])
        draws = [generator(self.seed, 4, step, slot) for slot in slots]
        sides = 1 if self.shared_noise else 2
        noise = torch.stack(
            [torch.randn(sides, *self.pairs.latent_shape, generator=draw) for draw in draws], dim=1
        )
        sigma = self.sigmas(step)[torch.tensor(slots).clamp(max=self.share.global_batch - 1)]
        batch = make_batch(self.pairs, picked, noise, sigma, self.t5_length(step), self.text_width, real)
        number = torch.tensor(slots) + step * self.share.global_batch + (self.seed << 32)
        return dataclasses.replace(batch, number=number)


def make_batch(
    pairs: EncodedPairs,
    rows: Tensor,
    noise: Tensor,
    sigma: Tensor,
    t5_length: int | None,
    text_width: int,
    real: Tensor | None = None,
) -> Batch:
    """Reads the pairs `rows` (B,) and noises both sides of each at the same sigma (B,), with noise (1, B, C,
    H, W) for both or (2, B, C, H, W) for one each. Pairs that are not `real` (B,) get weight 0.
    """
    columns = pairs.columns
    chosen, rejected = (pairs.latents(columns[name][rows].tolist()) for name in ("chosen", "rejected"))
    embeds, pooled = pairs.prompts(columns["prompt"][rows].tolist(), t5_length, text_width)
    weight = columns["weight"][rows]
    return Batch(
        noisy=torch.cat(
            [flow.add_noise(chosen, noise[0], sigma), flow.add_noise(rejected, noise[-1], sigma)]
        ),
        sigma=sigma,
        prompt_embeds=embeds,
        pooled=pooled,
        weight=weight if real is None else weight * real,
        label=columns["label"][rows],
        number=torch.zeros(len(rows), dtype=torch.long),
    )


class HeldOutBatches(Dataset):
    """`sigmas_each` noisy views of every held-out pair, one in each equal part of [0, 1], the same at every
    evaluation. Item i is one process's i-th micro-batch; padding has weight 0.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        rows: Tensor,
        *,
        rank: int,
        world: int,
        micro_batch: int,
        sigmas_each: int,
        t5_length: int | None,
        text_width: int,
        seed: int,
    ) -> None:
        self.pairs, self.rows, self.sigmas_each = pairs, rows, sigmas_each
        self.rank, self.world, self.micro_batch = rank, world, micro_batch
        self.t5_length, self.text_width, self.seed = t5_length, text_width, seed

    @property
    def views(self) -> int:
        return len(self.rows) * self.sigmas_each

    def __len__(self) -> int:
        return math.ceil(self.views / (self.micro_batch * self.world))

    def __getitem__(self, index: int) -> Batch:
        start = (index * self.world + self.rank) * self.micro_batch
        views = torch.arange(start, start + self.micro_batch)
        real, views = views < self.views, views.clamp(max=self.views - 1)
        draws = [generator(self.seed, 5, int(view)) for view in views]
        part = views % self.sigmas_each
        uniform = torch.stack([torch.rand((), generator=draw) for draw in draws])
        noise = torch.stack([torch.randn(self.pairs.latent_shape, generator=draw) for draw in draws])[None]
        sigma = (part + uniform) / self.sigmas_each
        rows = self.rows[views // self.sigmas_each]
        return make_batch(self.pairs, rows, noise, sigma, self.t5_length, self.text_width, real)


def timed_batches(dataset: Dataset, workers: int, pin_memory: bool) -> Iterator[tuple[Batch, float]]:
    """Each batch of a set, read ahead by `workers` processes, and the seconds it was waited for."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    while True:
        begun = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a process that reads data died ({str(error).splitlines()[0]}): it may have run out of"
                " memory; start the same command again, with a smaller train.workers if it recurs"
            ) from error
        yield batch, time.perf_counter() - begun
