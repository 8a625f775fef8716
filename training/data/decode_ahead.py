"""A plan's pictures, decoded by worker processes some batches ahead of the VAE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.encode_plan import Plan
from training.data.encoders import prepare_picture
from training.data.readers import PictureError

AHEAD = 4  # batches each worker keeps ready

# Numbers of the pictures that decoded, (n, r, r, 3) uint8, and {number: reason} of the others.
Decoded = tuple[list[int], Tensor, dict[int, str]]


class WorkerDied(RuntimeError):  # noqa: N818 - says what happened
    """A decoding process ended by itself or was killed, most often for memory."""

    @classmethod
    def saying(cls, error: Exception) -> WorkerDied:
        """With what torch made of it, in one line."""
        what = " ".join(str(error).split())[:160]
        return cls(
            f"a decoding worker died ({what}): is memory or /dev/shm full? Lower `workers` and start again,"
            " the finished shards are kept"
        )


class _Pictures(Dataset):
    """Decodes a batch of the plan's pictures: as Decoded."""

    def __init__(self, folder: Path, resolution: int, fit: str) -> None:
        self.folder, self.resolution, self.fit, self.plan = folder, resolution, fit, None

    def __getitem__(self, numbers: list[int]) -> Decoded:
        self.plan = self.plan or Plan(self.folder)  # opened where it is used: maps do not travel to workers
        good, pixels, bad = [], [], {}
        for number in numbers:
            try:
                image = self.plan.picture(number).open()
                pixels.append(prepare_picture(image, self.resolution, self.fit))
                good.append(number)
            except PictureError as error:
                bad[number] = str(error)
        stacked = np.stack(pixels) if pixels else np.zeros((0, self.resolution, self.resolution, 3), np.uint8)
        return good, torch.from_numpy(stacked), bad


def decode_ahead(
    folder: Path, resolution: int, fit: str, batches: list[list[int]], *, workers: int, pin_memory: bool
) -> Iterator[Decoded]:
    """The batches in their order; `folder` is the plan's. WorkerDied when a process is lost."""
    loader = DataLoader(
        _Pictures(folder, resolution, fit),
        batch_size=None,
        sampler=batches,
        num_workers=min(workers, len(batches)),
        prefetch_factor=AHEAD if workers and batches else None,
        pin_memory=pin_memory,
    )
    ready = iter(loader)  # named, so that it outlives an error: its end would print another one
    try:
        yield from ready
    except (ConnectionError, EOFError) as error:  # a batch was half way when its worker died
        raise WorkerDied.saying(error) from error
