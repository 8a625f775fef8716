"""Encoded preference data on disk: what `training.encode` writes and training reads.

    meta.json                  {"format": "drm-encoded-pairs", "version": 1, "latent": [C, H, W],
                                "t5_lengths": [...], "weights": {source: weight}, ...}
    images-00000.safetensors   latents (n, C, H, W), model space
    prompts-00000.safetensors  clip (n, 77, 2048), pooled (n, 2048), t5_77 (n, 77, 4096), t5_256 (...)
    pairs.parquet              prompt, chosen, rejected (global indices), weight, label = P(chosen preferred),
                               source, held_out, row

A picture or prompt is stored once however many pairs name it. Rows are read one by one through the file map,
so a folder of a terabyte needs no memory. The text a network sees is CLIP's tokens, filled with zeros to T5's
width, then T5's; SD3 has no attention mask, so each T5 length is an embedding of its own.
"""

from __future__ import annotations

import bisect
import itertools
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.engine.atomic import replace_atomically

FORMAT, VERSION = "drm-encoded-pairs", 1
COLUMNS = ("prompt", "chosen", "rejected", "weight", "label", "source", "held_out", "row")


class ShardError(ValueError):
    """The folder cannot be trained from; the message says which file and what to do."""


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    def write(temporary: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors makes files only their owner can read

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, write)


def image_shard(folder: Path, index: int) -> Path:
    return Path(folder) / f"images-{index:05d}.safetensors"


def prompt_shard(folder: Path, index: int) -> Path:
    return Path(folder) / f"prompts-{index:05d}.safetensors"


def write_image_shard(folder: Path, index: int, latents: Tensor) -> None:
    """latents (n, C, H, W) in model space, in the dtype they are to be stored in."""
    _write_tensors(image_shard(folder, index), {"latents": latents})


def write_prompt_shard(folder: Path, index: int, tensors: dict[str, Tensor]) -> None:
    """clip (n, T, D), pooled (n, P) and any t5_<length> (n, length, E)."""
    _write_tensors(prompt_shard(folder, index), tensors)


def write_pairs(folder: Path, columns: dict[str, list]) -> None:
    """The pair table; `columns` has every name of COLUMNS, lists of one length."""
    import pyarrow
    import pyarrow.parquet

    kinds = {
        **dict.fromkeys(("prompt", "chosen", "rejected"), pyarrow.int32()),
        **dict.fromkeys(("weight", "label"), pyarrow.float32()),
        "source": pyarrow.string(),
        "held_out": pyarrow.bool_(),
        "row": pyarrow.string(),
    }
    table = pyarrow.table({name: pyarrow.array(columns[name], kinds[name]) for name in COLUMNS})
    replace_atomically(Path(folder) / "pairs.parquet", lambda path: pyarrow.parquet.write_table(table, path))


def write_meta(folder: Path, meta: dict) -> None:
    """meta.json, with the format and version added; written last, its presence says the folder is whole."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **meta}, indent=1, sort_keys=True)
    replace_atomically(Path(folder) / "meta.json", lambda path: path.write_text(text))


class _Shards:
    """The rows of images-* or prompts-* files, addressed by one running index; files are opened on use."""

    def __init__(self, paths: list[Path]) -> None:
        if not paths:
            raise ShardError("there are no shards")
        self.paths, self.files = paths, {}
        self.ends = list(itertools.accumulate(self._rows(path) for path in paths))

    @staticmethod
    def _rows(path: Path) -> int:
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(next(iter(file.keys()))).get_shape()[0]
        except (SafetensorError, OSError, StopIteration) as error:
            raise ShardError(
                f"{path.name} is damaged or cut short ({error}): delete it and run training.encode again"
            ) from error

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": {}}  # open files do not travel to worker processes

    def _file(self, shard: int):
        if shard not in self.files:
            self.files[shard] = safe_open(self.paths[shard], "pt")
        return self.files[shard]

    def names(self) -> list[str]:
        return sorted(self._file(0).keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(0).get_slice(name).get_shape()[1:])

    def row(self, name: str, index: int) -> Tensor:
        shard = bisect.bisect_right(self.ends, index)
        start = self.ends[shard - 1] if shard else 0
        return self._file(shard).get_slice(name)[index - start]

    def rows(self, name: str, indices: list[int]) -> Tensor:
        return torch.stack([self.row(name, int(index)) for index in indices])


class EncodedPairs:
    """A folder of encoded pairs: `columns` (tensors, lists by name), `meta`, latents and prompts by row."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = self._read_meta()
        try:
            self._images = _Shards(sorted(self.folder.glob("images-*.safetensors")))
            self._prompts = _Shards(sorted(self.folder.glob("prompts-*.safetensors")))
        except ShardError as error:
            raise ShardError(f"{self.folder}: {error}") from error
        self.columns = self._read_columns()

    def _read_meta(self) -> dict:
        path = self.folder / "meta.json"
        if not path.is_file():
            raise ShardError(
                f"{self.folder} holds no finished encoded pairs (no meta.json): run training.encode first"
            )
        meta = json.loads(path.read_text())
        if meta.get("format") != FORMAT or meta.get("version") != VERSION:
            raise ShardError(
                f"{path} is {meta.get('format')} version {meta.get('version')}, wanted {FORMAT} {VERSION}:"
                " encode again with this release"
            )
        return meta

    def _read_columns(self) -> dict[str, Tensor | list[str]]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(self.folder / "pairs.parquet", columns=list(COLUMNS))
        except (OSError, pyarrow.ArrowException) as error:
            raise ShardError(f"{self.folder}/pairs.parquet cannot be read: {error}") from error
        columns: dict[str, Tensor | list[str]] = {}
        for name in COLUMNS:
            values = table.column(name)
            if name in ("source", "row"):
                columns[name] = values.to_pylist()
            else:
                columns[name] = torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
        for name, rows in (("prompt", self._prompts), ("chosen", self._images), ("rejected", self._images)):
            if len(columns[name]) and int(columns[name].max()) >= len(rows):
                raise ShardError(
                    f"{self.folder}: a pair names {name} {int(columns[name].max())} of {len(rows)}, a shard"
                    " is missing: run training.encode again"
                )
        return columns

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._images.shape("latents")

    @property
    def t5_lengths(self) -> tuple[int, ...]:
        names = self._prompts.names()
        return tuple(sorted(int(name.removeprefix("t5_")) for name in names if name.startswith("t5_")))

    def latents(self, indices: list[int]) -> Tensor:
        """(n, C, H, W) float32 in model space."""
        return self._images.rows("latents", indices).float()

    def prompts(
        self, indices: list[int], t5_length: int | None, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """prompt_embeds (n, T, width) and pooled_prompt_embeds (n, P) as stored; without T5 when its length
        is None. width: what CLIP's tokens are filled to, T5's own when not given.
        """
        clip = self._prompts.rows("clip", indices)
        t5 = None if t5_length is None else self._prompts.rows(f"t5_{t5_length}", indices)
        width = width or (clip if t5 is None else t5).shape[-1]
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        embeds = clip if t5 is None else torch.cat([clip, t5], dim=1)
        return embeds, self._prompts.rows("pooled", indices)
