"""Scores of test pictures: each picture and prompt once per scorer and sigma, kept on disk as they come.

    scores/pictures.jsonl               [digest, reason] of every picture that cannot be opened
    scores/NAME-FINGERPRINT.jsonl       [digest, sigma, score] of a scorer; sigma is null for a baseline's,
                                        which sees clean pictures

A line is written when its batch is done, so a run that was killed goes on where it stopped; batches are cut
from the whole list of pictures, so what is scored after a restart is what would have been scored without one.
A reward model sees x_sigma = (1 - sigma) * x0 + sigma * noise with noise that depends on the seed and the
prompt alone: all pictures of a prompt share it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from drm import DRM
from drm.flow import add_noise
from training.data.readers import Picture, PictureError, Ranking
from training.evaluation.baselines import Score

if TYPE_CHECKING:
    from training.data.encoders import SD3Encoders

AHEAD = 3  # batches of pictures opened before they are needed


class ScoringError(RuntimeError):
    """The scores cannot be had; the message names the scorer, the picture and what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture under one prompt."""

    prompt: str
    picture: Picture

    @property
    def key(self) -> tuple[str, str]:
        return self.prompt, self.picture.key

    @functools.cached_property
    def digest(self) -> str:
        """Of prompt, picture and its file's size and time: a file that was replaced is scored again."""
        facts = os.stat(self.picture.path)
        text = json.dumps([*self.key, facts.st_size, facts.st_mtime_ns])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def jobs_of(rankings: Iterable[Ranking]) -> list[Job]:
    """Every picture and prompt of the rankings, once, in order."""
    jobs: dict[tuple[str, str], Job] = {}
    for ranking in rankings:
        for picture in ranking.pictures:
            job = Job(ranking.prompt, picture)
            jobs.setdefault(job.key, job)
    return list(jobs.values())


class Lines:
    """An append-only file of JSON lines; a last line cut short by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[list] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in data.splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, list):
                break
            self.rows.append(row)
            whole += len(line)
        if whole < len(data):
            os.truncate(path, whole)

    def append(self, rows: Sequence[list]) -> None:
        if rows:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


class Bad(dict[str, str]):
    """Digest to reason, of pictures that cannot be opened."""

    def __init__(self, folder: Path) -> None:
        self.lines = Lines(folder / "pictures.jsonl")
        super().__init__(self.lines.rows)

    def add(self, found: dict[str, str]) -> None:
        self.lines.append([list(item) for item in found.items()])
        self.update(found)


class Scores(dict[tuple[str, float | None], float]):
    """(digest, sigma) to score, of one scorer."""

    def __init__(self, folder: Path, name: str, fingerprint: str) -> None:
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
        self.lines = Lines(folder / f"{safe}-{fingerprint[:16]}.jsonl")
        super().__init__({(digest, sigma): score for digest, sigma, score in self.lines.rows})

    def add(self, found: dict[tuple[str, float | None], float]) -> None:
        self.lines.append([[*key, score] for key, score in found.items()])
        self.update(found)


class Opened(NamedTuple):
    """A decoded picture, and its square of uint8 pixels where a VAE will want them."""

    picture: Image.Image
    pixels: np.ndarray | None


class Batch:
    """Opened pictures with their prompts; latents and embeddings are made when first asked for."""

    def __init__(
        self, jobs: list[Job], opened: list[Opened], encoders: SD3Encoders | None, seed: int
    ) -> None:
        self.jobs, self.encoders, self.seed = jobs, encoders, seed
        self.pictures, self.pixels = ([one[place] for one in opened] for place in (0, 1))
        self._prompts: dict[int | None, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def latents(self) -> Tensor:
        """(B, C, H, W), clean, model space."""
        return self.encoders.encode_pixels(torch.from_numpy(np.stack(self.pixels))).float()

    @functools.cached_property
    def noise(self) -> Tensor:
        shape = self.latents.shape[1:]
        drawn = torch.stack([prompt_noise(job.prompt, shape, self.seed) for job in self.jobs])
        return drawn.to(self.latents.device)

    def prompts(self, t5_length: int | None) -> tuple[Tensor, Tensor]:
        """(B, T, D) and (B, P) with this many T5 tokens."""
        if t5_length not in self._prompts:
            texts = list(dict.fromkeys(job.prompt for job in self.jobs))
            embeds, pooled = self.encoders.encode_prompts(texts, t5_length)
            places = torch.tensor([texts.index(job.prompt) for job in self.jobs], device=embeds.device)
            self._prompts[t5_length] = (embeds[places], pooled[places])
        return self._prompts[t5_length]


def prompt_noise(prompt: str, shape: Sequence[int], seed: int) -> Tensor:
    """Unit noise of `shape`, a pure function of (seed, prompt), drawn on the CPU."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(*shape, generator=generator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelScorer:
    """A reward model at each of `sigmas`; raw scores, on the scale it was trained at."""

    name: str
    fingerprint: str
    model: DRM
    sigmas: tuple[float | None, ...]
    t5_length: int | None
    device: torch.device

    @torch.no_grad()
    def score(self, batch: Batch, sigma: float) -> list[float]:
        noisy = add_noise(batch.latents, batch.noise, sigma)
        embeds, pooled = (tensor.to(self.device) for tensor in batch.prompts(self.t5_length))
        return self.model(noisy.to(self.device), sigma, embeds, pooled).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineScorer:
    """Someone else's scorer, on clean pictures."""

    name: str
    fingerprint: str
    function: Score
    sigmas: tuple[float | None, ...] = (None,)

    def score(self, batch: Batch, sigma: None) -> list[float]:
        places: dict[str, list[int]] = {}
        for place, job in enumerate(batch.jobs):
            places.setdefault(job.prompt, []).append(place)
        scores = [math.nan] * len(batch.jobs)
        for prompt, own in places.items():
            given = list(self.function(prompt, [batch.pictures[place] for place in own]))
            if len(given) != len(own):
                raise ScoringError(
                    f"{self.name} gives {len(given)} scores for {len(own)} pictures: wanted one each"
                )
            for place, score in zip(own, given, strict=True):
                scores[place] = float(score)
        return scores


Scorer = ModelScorer | BaselineScorer


def t5_length(text_length: int | None, clip_length: int = 77) -> int | None:
    """T5 tokens beside CLIP's in a reward model's text length; None without T5. A model that does not say
    is given 256, as SD3's pipeline does.
    """
    if text_length is None:
        return 256
    return text_length - clip_length if text_length > clip_length else None


def score_all(
    jobs: Sequence[Job],
    scorers: Sequence[Scorer],
    folder: Path,
    encoders: SD3Encoders | None,
    *,
    resolution: int,
    fit: str = "centre",
    seed: int,
    batch_size: int,
    workers: int,
) -> tuple[dict[str, Scores], Bad]:
    """Fills what is missing in the books of `folder` and returns them, with a bar on stderr."""
    books = {scorer.name: Scores(folder, scorer.name, scorer.fingerprint) for scorer in scorers}
    bad = Bad(folder)

    def missing(part: Sequence[Job]) -> list[tuple[Scorer, float | None]]:
        digests = [job.digest for job in part if job.digest not in bad]
        return [
            (scorer, sigma)
            for scorer in scorers
            for sigma in scorer.sigmas
            if any((digest, sigma) not in books[scorer.name] for digest in digests)
        ]

    parts = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    todo = [(part, asked) for part in parts if (asked := missing(part))]
    left = sum(len(part) for part, _ in todo)
    bar = tqdm(total=len(jobs), initial=len(jobs) - left, desc="scoring", unit="picture", dynamic_ncols=True)
    with bar:
        found = open_ahead([part for part, _ in todo], workers, resolution if encoders else None, fit)
        for (part, asked), opened in zip(todo, found, strict=True):
            bad.add({job.digest: one for job, one in zip(part, opened, strict=True) if isinstance(one, str)})
            usable = [(job, one) for job, one in zip(part, opened, strict=True) if isinstance(one, Opened)]
            if usable:
                batch = Batch(*(list(column) for column in zip(*usable, strict=True)), encoders, seed)
                for scorer, sigma in asked:
                    books[scorer.name].add(_scored(scorer, batch, sigma))
            bar.update(len(part))
    return books, bad


def _scored(scorer: Scorer, batch: Batch, sigma: float | None) -> dict[tuple[str, float | None], float]:
    try:
        scores = scorer.score(batch, sigma)
    except torch.OutOfMemoryError as error:
        raise ScoringError(
            f"{scorer.name}: the device is out of memory: lower batch, or give fewer models"
        ) from error
    except (ValueError, TypeError) as error:
        raise ScoringError(f"{scorer.name}: {error}") from error
    for job, score in zip(batch.jobs, scores, strict=True):
        if not math.isfinite(score):
            at = "" if sigma is None else f" at sigma {sigma:g}"
            raise ScoringError(
                f"{scorer.name} gives {score}{at} for {job.picture.name} ({job.prompt[:60]!r}): the weights"
                " may be damaged, or overflow in this dtype (try dtype float32)"
            )
    return {(job.digest, sigma): score for job, score in zip(batch.jobs, scores, strict=True)}


def open_ahead(
    parts: Sequence[Sequence[Job]], workers: int, resolution: int | None, fit: str
) -> Iterator[list[Opened | str]]:
    """The pictures of each part, or the reason why not, made ready by threads a few parts ahead."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: collections.deque = collections.deque()
        for part in parts:
            waiting.append([pool.submit(_open, job.picture, resolution, fit) for job in part])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def _open(picture: Picture, resolution: int | None, fit: str) -> Opened | str:
    try:
        image = picture.open()
    except PictureError as error:
        return str(error)
    if resolution is None:
        return Opened(image, None)
    from training.data.encoders import prepare_picture

    return Opened(image, prepare_picture(image, resolution, fit))
