"""Picks: batches of pictures somebody looked at, and which of them were preferred, one file a batch.

    NAME/20261127_101500_1a2b3c4d.safetensors          picked
    NAME/later/20261127_101600_5e6f7a8b.safetensors    the backlog: not picked from yet

    latents     (B, C, H, W) or (B, C, 1, H, W), VAE space, float16
    picture.i   bytes of a small JPEG, uint8, i = 0 .. B-1
    header      kind "drm-picks", version "1", header: JSON {prompt, seed, picks, batch_index, model}

picks are rows of the batch, the most preferred first. They imply pairs: what was picked is better than what
was not, and what was picked earlier better than what was picked later. Files are written under another name
and renamed, so one that is there is whole. A batch stays in the backlog until its picks are written.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .lora import save_tensors
from .shared import OTHER_SHAPES, unlike

KIND, VERSION, LATER = "drm-picks", "1", "later"
_NAME = re.compile(r"\w(?:[\w .-]{0,62}\w)?")
_RECORD = re.compile(r"\d{8}_\d{6}_[0-9a-f]{8}")


class PicksError(ValueError):
    """A file of picks cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a file says besides its pictures. seed, model: None when not known; model is a TrunkFacts' dict
    of the MODEL that drew the pictures. picks: empty in the backlog.
    """

    prompt: str
    batch_index: tuple[int, ...]
    picks: tuple[int, ...] = ()
    seed: int | None = None
    model: dict | None = None


@dataclass(frozen=True)
class Record:
    """A file's facts; its latents (shape: of all of them) are read when asked for."""

    path: Path
    batch: Batch
    shape: tuple[int, ...]

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(n, ...) float32 of these rows, in VAE space. PicksError for NaN, or a file gone since."""
        with _open(self.path) as file:
            whole = file.get_slice("latents")
            found = torch.stack([whole[row] for row in rows]).float()
        if not bool(found.isfinite().all()):
            raise PicksError(f"{self.path.name} holds NaN or infinity: delete the file")
        return found


def pairs_of(picks: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Every implied (preferred, other) among `count` pictures."""
    others = [row for row in range(count) if row not in set(picks)]
    return [(win, lose) for place, win in enumerate(picks) for lose in [*picks[place + 1 :], *others]]


def check_picks(picks: object, count: int) -> tuple[int, ...]:
    """Picks as they came from outside; ValueError unless they are different rows of `count` pictures."""
    rows = picks if isinstance(picks, (list, tuple)) else []
    good = all(type(row) is int and 0 <= row < count for row in rows)
    if not rows or not good or len(set(rows)) < len(rows):
        raise ValueError(
            f"the picks are {str(picks)[:200]}: give one or more different numbers from 0 to {count - 1}"
        )
    return tuple(rows)


def folder_of(root: Path, name: str) -> Path:
    """The folder of picks of this name below root; ValueError for a name that is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"the name is {str(name)[:80]!r}: wanted up to 64 letters, digits, spaces, dots, - and _,"
            " not a path; choose such a name"
        )
    return root / name


def write_batch(path: Path, batch: Batch, latents: Tensor, pictures: Sequence[Tensor]) -> None:
    """latents (B, ...) of any float kind; pictures: B tensors of uint8, the bytes of a JPEG each."""
    kept = latents.detach().to("cpu", torch.float16)
    if len(pictures) != len(kept) or not bool(kept.isfinite().all()):
        raise PicksError(
            f"{len(kept)} latents, of which {int(kept.isfinite().flatten(1).all(1).sum())} are finite, and"
            f" {len(pictures)} pictures cannot be kept: give a picture for each latent, without NaN"
        )
    tensors = {"latents": kept, **{f"picture.{i}": picture for i, picture in enumerate(pictures)}}
    save_tensors(tensors, path, {"kind": KIND, "version": VERSION, "header": json.dumps(asdict(batch))})


def keep_for_later(folder: Path, batch: Batch, latents: Tensor, pictures: Sequence[Tensor]) -> str:
    """Puts a batch into the backlog; its name there."""
    record = f"{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(4)}"
    write_batch(_path(folder, record, later=True), batch, latents, pictures)
    return record


def settle(folder: Path, record: str, picks: Sequence[int]) -> None:
    """Gives a batch of the backlog its picks."""
    _move(folder, record, tuple(picks), later=False)


def undo(folder: Path) -> str | None:
    """Puts the batch that was picked from last back into the backlog; its name, None when there is none."""
    done = sorted(folder.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not done:
        return None
    _move(folder, done[-1].stem, (), later=True)
    return done[-1].stem


def discard(folder: Path, record: str) -> None:
    """Takes a batch out of the backlog."""
    _path(folder, record, later=True).unlink(missing_ok=True)


def _move(folder: Path, record: str, picks: tuple[int, ...], later: bool) -> None:
    old = _path(folder, record, later=not later)
    found = read_record(old)
    with _open(old) as file:
        latents = file.get_tensor("latents")
        pictures = [file.get_tensor(f"picture.{i}") for i in range(len(latents))]
    batch = Batch(**{**vars(found.batch), "picks": picks})
    write_batch(_path(folder, record, later), batch, latents, pictures)
    old.unlink()


def backlog(folder: Path) -> list[str]:
    """Names of the batches to pick from, the oldest first."""
    # Where both are there, a stop came between writing one and removing the other.
    return sorted(
        path.stem
        for path in (folder / LATER).glob("*.safetensors")
        if not (folder / path.name).exists() and _RECORD.fullmatch(path.stem)
    )


def read_waiting(folder: Path, record: str) -> Record:
    """A batch of the backlog."""
    return read_record(_path(folder, record, later=True))


def read_picture(folder: Path, record: str, row: int) -> bytes:
    """The JPEG of one picture of a batch, picked from or not."""
    path = _path(folder, record, later=True)
    with _open(path if path.exists() else _path(folder, record, later=False)) as file:
        return file.get_tensor(f"picture.{row}").numpy().tobytes()


def _path(folder: Path, record: str, later: bool) -> Path:
    if not isinstance(record, str) or not _RECORD.fullmatch(record):
        raise ValueError(f"the batch is called {str(record)[:80]!r}: wanted a name that this node gave")
    return (folder / LATER if later else folder) / f"{record}.safetensors"


def read_records(folder: Path) -> tuple[list[Record], list[str]]:
    """Everything picked, in order of names, and a sentence on each file that cannot be used.

    PicksError when there is no such folder, or nothing in it.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        state = "holds no picks" if folder.is_dir() else "is not there"
        later = len(backlog(folder))
        raise PicksError(
            f"the folder of picks {folder} {state}"
            f"{f' but {later} batches to pick from later' * (later > 0)}: pick in a DRM Pick node of that"
            " name, or give the name of another"
        )
    found, broken = [], []
    for path in paths:
        try:
            found.append(read_record(path))
        except PicksError as error:
            broken.append(str(error))
    return found, broken


def read_record(path: Path) -> Record:
    """A file's facts. PicksError when it is missing, damaged or none of ours."""
    with _open(path) as file:
        header = file.metadata() or {}
        if (header.get("kind"), header.get("version")) != (KIND, VERSION):
            raise PicksError(f"{path.name} is no file of picks of version {VERSION}: move it elsewhere")
        try:
            facts = json.loads(header["header"])
            shape = tuple(file.get_slice("latents").get_shape())
            batch = Batch(**{**facts, **{key: tuple(facts[key]) for key in ("picks", "batch_index")}})
            if batch.picks:
                check_picks(batch.picks, shape[0])
        except Exception as error:
            raise PicksError(f"{path.name} is damaged ({error}): delete it or copy it again") from error
    return Record(path, batch, shape)


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        # Reads what is asked for: a folder of thousands is opened by its headers.
        return safe_open(os.fspath(path), framework="pt")
    except FileNotFoundError as error:
        raise PicksError(f"{path.name} is not in {path.parent}: it was picked from or moved") from error
    except (SafetensorError, OSError) as error:
        raise PicksError(f"{path.name} is damaged or cut short ({error}): delete it") from error


def check_one_model(records: Sequence[Record], own: dict) -> list[str]:
    """What is to be said of records that were picked on another fine-tune of the model `own`.

    own: a TrunkFacts' dict. PicksError when records are of another model, which names one and its model.
    """
    wanted, said = _words(own), []
    for record in records:
        found = record.batch.model
        if record.shape[1] != own["latent_channels"]:
            raise PicksError(
                f"{record.path.name} has latents of {record.shape[1]} channels and the MODEL draws"
                f" {own['latent_channels']}: connect the model it was picked on, or keep the picks of each"
                " model under a name of their own"
            )
        difference = unlike(found["fingerprint"], own["fingerprint"]) if found else None
        if found and (_words(found) != wanted or difference == OTHER_SHAPES):
            raise PicksError(
                f"{record.path.name} was picked on a {_words(found)} and the MODEL is a {wanted}: connect the"
                " model it was picked on, or keep the picks of each model under a name of their own"
            )
        said += [difference] if difference else []
    if not said:
        return []
    return [
        f"{len(said)} of {len(records)} batches were picked on another fine-tune ({said[0]}): that is fine"
    ]


def _words(model: dict) -> str:
    return f"{model['family']} model of {model['num_blocks']} blocks, {model['width']} wide"
