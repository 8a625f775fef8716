"""A shared head learned from picks, on a trunk that stays as it is.

    x_w = (1 - sigma) * w + sigma * eps_w,   x_l likewise with noise of its own
    loss = mean of -log sigmoid(s(x_w, sigma) - s(x_l, sigma))       (Bradley & Terry 1952), one sigma a pair

A step draws 16 pairs: a batch somebody picked from, each as likely, then one of the pairs it implies; four
sigmas, one in each quarter of [0, 1]. All of it is a function of the seed and the step, so that a run which
was stopped goes on as if it had not been. Kept is the running mean of the weights, at the look with the least
loss on held-out batches, whose prompts are never learned from.

The trunk is a callable read(x (n, C, H, W), sigma, prompts) -> Taps, a prompt for each of n.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import held_out
from .flow import add_noise
from .head import ConvHead
from .held_out import PARTS
from .picks import pairs_of
from .preference import bradley_terry_loss
from .shared import SharedDRM, Taps, TrunkFacts

PAIRS, LOOKS = 16, 8
# Every fifth prompt is held out, up to so many.
_HELD_OUT, _MOST_HELD_OUT = 0.2, 64
_AVERAGE = 0.98
_DIM, _HIDDEN = 128, 128
_KINDS = ("drm", "average", "kept")

Read = Callable[[Tensor, float, Sequence[str]], Taps]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A batch of `count` pictures of a prompt, of which some were picked, the most preferred first.

    latents: rows -> (n, C, H, W) in model space. shape: (C, H, W).
    """

    prompt: str
    picks: tuple[int, ...]
    count: int
    shape: tuple[int, ...]
    latents: Callable[[Sequence[int]], Tensor]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(preferred, other), see picks.pairs_of."""
        return pairs_of(self.picks, self.count)


class Drawn(NamedTuple):
    """A pair to learn from: rows win and lose of a batch, at sigma."""

    compared: Compared
    win: int
    lose: int
    sigma: float


class Look(NamedTuple):
    """Loss and accuracy on held-out batches after a step; None where nothing is held out."""

    step: int
    loss: float | None
    accuracy: float | None


@dataclass
class Progress:
    """losses: of every step done."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    @property
    def best(self) -> Look | None:
        """The look that is kept: of the least loss, or the last where nothing is held out."""
        return min(self.looks, key=lambda at: -at.step if at.loss is None else at.loss, default=None)


def split_by_prompt(batches: Sequence[Compared], seed: int) -> tuple[list[Compared], list[Compared]]:
    """(learned from, held out), all batches of a prompt on one side; nothing is held out of one prompt."""
    prompts = sorted({batch.prompt for batch in batches}, key=lambda prompt: _place(prompt, seed))
    count = min(max(1, round(_HELD_OUT * len(prompts))), _MOST_HELD_OUT, len(prompts) - 1)
    aside = set(prompts[:count])
    held = [batch for batch in batches if batch.prompt in aside]
    return [batch for batch in batches if batch.prompt not in aside], held[:_MOST_HELD_OUT]


def _place(prompt: str, seed: int) -> bytes:
    # By the prompt itself, so that few prompts change sides when others come.
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()


def draw(batches: Sequence[Compared], seed: int, step: int) -> list[Drawn]:
    """The pairs of a step, by quarter of sigma."""
    generator = generator_of(seed, "pairs", step)
    places, within = (torch.rand(size, generator=generator).tolist() for size in ((PAIRS, 2), (PARTS,)))
    drawn = []
    for number, (which, pair) in enumerate(places):
        batch, part = batches[int(which * len(batches))], number * PARTS // PAIRS
        pairs = batch.pairs
        drawn.append(Drawn(batch, *pairs[int(pair * len(pairs))], (part + within[part]) / PARTS))
    return drawn


def generator_of(seed: int, *place: object) -> torch.Generator:
    """Random numbers of one place of a training, on the CPU."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _groups(drawn: Sequence[Drawn]) -> list[list[Drawn]]:
    """Pairs of one sigma and one shape, which go through the trunk together."""
    found: dict[tuple, list[Drawn]] = {}
    for pair in drawn:
        found.setdefault((pair.sigma, pair.compared.shape), []).append(pair)
    return list(found.values())


def new_head(trunk: TrunkFacts, seed: int) -> SharedDRM:
    """A head on these taps, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_of(seed, "weights").initial_seed())
        return SharedDRM(trunk, ConvHead(_DIM, _HIDDEN))


class HeadTrainer:
    """Learns one head: `work` until `done`. `kept` is the best head so far.

    read: see above; called without gradients. learned, held_out: see split_by_prompt.
    """

    def __init__(
        self,
        trunk: TrunkFacts,
        learned: Sequence[Compared],
        held_out: Sequence[Compared],
        *,
        steps: int,
        rate: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if not learned or not all(batch.pairs for batch in (*learned, *held_out)):
            raise ValueError(
                f"{len(learned) + len(held_out)} batches are given, and some or all say of no picture that"
                " it is better than another: give batches of two pictures or more with a pick each"
            )
        self.learned, self.held_out = list(learned), list(held_out)
        self.steps, self.seed, self.device = steps, seed, torch.device(device)
        self.drm, self.average, self.kept = (new_head(trunk, seed).to(self.device) for _ in _KINDS)
        self.optimizer = torch.optim.AdamW(self.drm.parameters(), lr=rate, weight_decay=0.01)
        self.progress = Progress()

    @property
    def looked(self) -> int:
        """The step of the last look."""
        return self.progress.looks[-1].step if self.progress.looks else 0

    @property
    def next_look(self) -> int:
        """The step of the next look."""
        every = math.ceil(self.steps / LOOKS)
        return min(self.steps, (self.looked // every + 1) * every)

    @property
    def done(self) -> bool:
        return self.looked >= self.steps

    def prompts(self, until: int) -> list[str]:
        """What the steps up to `until` and a look read."""
        steps = range(self.progress.step, until)
        found = [pair.compared.prompt for step in steps for pair in draw(self.learned, self.seed, step)]
        return list(dict.fromkeys([batch.prompt for batch in self._looked_at] + found))

    @property
    def _looked_at(self) -> list[Compared]:
        return self.held_out or self.learned[:_MOST_HELD_OUT]

    def advance(self, read: Read) -> None:
        """One step. ValueError when tokens or loss are not finite."""
        step, total = self.progress.step, 0.0
        noise = generator_of(self.seed, "noise", step)
        self.optimizer.zero_grad(set_to_none=True)
        for group in _groups(draw(self.learned, self.seed, step)):
            loss = self._loss(read, group, noise) * len(group) / PAIRS
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ValueError(
                f"the loss is {total} after {step} steps: the rate is too high, give a lower one"
            )
        torch.nn.utils.clip_grad_norm_(self.drm.parameters(), 1.0)
        self.optimizer.step()
        self._move_average(step)
        self.progress.step += 1
        self.progress.losses.append(total)

    def _loss(self, read: Read, group: Sequence[Drawn], noise: torch.Generator) -> Tensor:
        both = [pair.compared.latents([pair.win, pair.lose]) for pair in group]
        x0 = torch.stack(both, dim=1).flatten(0, 1)  # every better one, then every worse one
        prompts, sigma = [pair.compared.prompt for pair in group] * 2, group[0].sigma
        win, lose = self.drm(self._taps(read, x0, sigma, prompts, noise), sigma).chunk(2)
        return bradley_terry_loss(win, lose)

    @torch.no_grad()
    def _taps(
        self, read: Read, x0: Tensor, sigma: float, prompts: Sequence[str], noise: torch.Generator
    ) -> Taps:
        """Of x0 (n, C, H, W), each with noise of its own."""
        taps = read(add_noise(x0, torch.randn(x0.shape, generator=noise), sigma), sigma, prompts)
        if not all(bool(tokens.isfinite().all()) for tokens in taps.tokens):
            raise ValueError(
                f"the MODEL's tokens at sigma {sigma:.3g} hold NaN or infinity: load it in bfloat16 or"
                " float32, or read earlier blocks"
            )
        return taps

    @torch.no_grad()
    def _move_average(self, step: int) -> None:
        weight = 1 - min(_AVERAGE, (1 + step) / (10 + step))
        for mean, value in zip(self.average.parameters(), self.drm.parameters(), strict=True):
            mean.lerp_(value, weight)

    @torch.no_grad()
    def look(self, read: Read) -> None:
        """Looks at the held-out batches, and keeps the head if it is the best so far."""
        loss = accuracy = None
        if self.held_out:
            judged = self.judged(read, self.average)
            loss, accuracy = held_out.loss_of(judged), held_out.accuracy_of(judged)
        self.progress.looks.append(Look(self.progress.step, loss, accuracy))
        if self.progress.best is self.progress.looks[-1]:
            self.keep_average()

    def keep_average(self) -> None:
        """Takes the head as it is now for the best."""
        self.kept.load_state_dict(self.average.state_dict())

    def judged(self, read: Read, drm: SharedDRM | None = None) -> list[held_out.Judged]:
        """What a head, the kept one when none is given, makes of the held-out batches; of those learned from
        where there are none.
        """
        drm = self.kept if drm is None else drm

        def scorer(number: int, batch: Compared) -> held_out.Score:
            def score(rows: Sequence[int], part: int) -> Tensor:
                sigma = held_out.SIGMAS[part]
                noise = generator_of(self.seed, "look", number, rows[0], part)
                taps = self._taps(read, batch.latents(rows), sigma, [batch.prompt] * len(rows), noise)
                return drm(taps, sigma).cpu()

            return score

        return [held_out.judge(batch, scorer(i, batch)) for i, batch in enumerate(self._looked_at)]

    @torch.no_grad()
    def facts(self, read: Read) -> dict:
        """What a file says of the head that is kept: its calibration, and its accuracy on what was held out,
        None where nothing was.
        """
        judged = self.judged(read)
        table = held_out.accuracy_table(judged) if self.held_out else None
        return {"calibration": held_out.calibration_of(judged), "accuracy": table}

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON-able facts that a stopped run goes on from."""
        tensors = {
            f"{kind}.{name}": value
            for kind in _KINDS
            for name, value in getattr(self, kind).state_dict().items()
        }
        for i, parameter in enumerate(self.drm.parameters()):
            tensors |= {f"{key}.{i}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return {name: value.detach().cpu() for name, value in tensors.items()}, asdict(self.progress)

    def go_on(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Takes what `state` gave."""
        for kind in _KINDS:
            names = getattr(self, kind).state_dict()
            getattr(self, kind).load_state_dict({name: tensors[f"{kind}.{name}"] for name in names})
        for i, parameter in enumerate(self.drm.parameters()):
            if f"step.{i}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{i}"].clone(),
                    "exp_avg": tensors[f"exp_avg.{i}"].to(self.device, copy=True),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{i}"].to(self.device, copy=True),
                }
        self.progress = Progress(**{**facts, "looks": [Look(*look) for look in facts["looks"]]})
