"""What an encode pass has to do, worked out once and kept, so that a run that is started again does the same.

    out/plan/pictures.arrow   path, column, row: every picture once, in the order they are first named
    out/plan/prompts.arrow    prompt: every text once
    out/plan/pairs.arrow      prompt, chosen, rejected (numbers in those tables), weight, label, source, row
    out/plan/report.json      rows read, used, left out and bad
    out/plan/plan.json        the settings all this follows from; written last

The tables are read through the file map: processes and decoding workers share them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.config import ConfigError, EncodeConfig, SourceConfig, check_numbers
from training.data.readers import Pair, Picture, ReaderError, Report, read_pairs
from training.engine.atomic import replace_atomically

PLAN_VERSION = 1
PROMPTS_A_PICTURE_SHARD = 8  # a prompt weighs some twenty pictures, so its shards hold fewer rows


class PlanError(ValueError):
    """The folder belongs to other settings; the message names the first that differs."""


def check(config: EncodeConfig) -> None:
    """ConfigError for a value no pass can be made with."""
    check_numbers(config, "encode.")
    if not config.sources:
        raise ConfigError("encode.sources is empty: wanted at least one")


def source_names(sources: tuple[SourceConfig, ...]) -> list[str]:
    """What each source is called in the pair table: its format, numbered where two share one."""
    names: list[str] = []
    for source in sources:
        count = sum(other.format == source.format for other in sources[: len(names)])
        names.append(source.format if count == 0 else f"{source.format}-{count + 1}")
    return names


def identity(config: EncodeConfig, encoders: dict[str, str]) -> dict:
    """The settings that decide what a shard holds. Another batch size or worker count may finish a folder."""
    sources = [dataclasses.asdict(dataclasses.replace(source, weight=1.0)) for source in config.sources]
    shared = {
        key: getattr(config, key)
        for key in ("resolution", "fit", "posterior", "t5_lengths", "dtype", "shard_size")
    }
    tree = {"version": PLAN_VERSION, "encoders": encoders, **shared, "sources": sources}
    return json.loads(json.dumps(tree))


def is_held_out(prompt: str, share: float, seed: int) -> bool:
    """Whether a prompt belongs to the share only evaluated on, decided by its hash: in any set, any run."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Numbers(dict):
    """Numbers for things in the order they are first asked for."""

    def __missing__(self, key: str) -> int:
        self[key] = len(self)
        return self[key]


class _Tables:
    """The three tables while they grow."""

    def __init__(self) -> None:
        self.prompts, self.keys = _Numbers(), _Numbers()
        self.pictures: list[Picture] = []
        self.numbers = {name: array("i") for name in ("prompt", "chosen", "rejected")}
        self.floats = {name: array("f") for name in ("weight", "label")}
        self.texts: dict[str, list[str]] = {"source": [], "row": []}

    def _picture(self, picture: Picture) -> int:
        number = self.keys[picture.key]
        if number == len(self.pictures):
            self.pictures.append(picture)
        return number

    def add(self, pair: Pair, source: str) -> None:
        self.numbers["prompt"].append(self.prompts[pair.prompt])
        self.numbers["chosen"].append(self._picture(pair.chosen))
        self.numbers["rejected"].append(self._picture(pair.rejected))
        self.floats["weight"].append(pair.weight)
        self.floats["label"].append(pair.label)
        self.texts["source"].append(source)
        self.texts["row"].append(pair.row)

    def write(self, folder: Path) -> None:
        import pyarrow

        numbers = {name: np.frombuffer(values, np.int32) for name, values in self.numbers.items()}
        floats = {name: np.frombuffer(values, np.float32) for name, values in self.floats.items()}
        _write_table(folder / "pairs.arrow", {**numbers, **floats, **self.texts})
        _write_table(folder / "prompts.arrow", {"prompt": list(self.prompts)})
        _write_table(
            folder / "pictures.arrow",
            {
                "path": [picture.path for picture in self.pictures],
                "column": pyarrow.array([picture.column for picture in self.pictures], pyarrow.string()),
                "row": [picture.row for picture in self.pictures],
            },
        )


def _write_table(path: Path, columns: dict) -> None:
    import pyarrow.feather

    table = pyarrow.table(columns)
    replace_atomically(
        path, lambda temporary: pyarrow.feather.write_feather(table, temporary, compression="uncompressed")
    )


def make_plan(config: EncodeConfig, settings: dict, *, quiet: bool = False) -> None:
    """Reads every source and writes out/plan, unless the same settings did before.

    PlanError when the folder was begun with others, ReaderError when a source cannot be read, more than
    `bad_rows` of its rows are bad, or nothing is left to learn from.
    """
    folder = Path(config.out) / "plan"
    if (folder / "plan.json").is_file():
        _refuse_others(json.loads((folder / "plan.json").read_text()), settings, Path(config.out))
        return
    folder.mkdir(parents=True, exist_ok=True)
    tables, report = _Tables(), Report()
    with tqdm(desc="reading pairs", unit="", unit_scale=True, disable=quiet) as bar:
        for source, name in zip(config.sources, source_names(config.sources), strict=True):
            for pair in read_pairs(source, report):
                tables.add(pair, name)
                bar.update()
    report.write(folder / "report.json")
    report.check(config.bad_rows, folder / "report.json")
    if not tables.pictures:
        raise ReaderError(
            "the sources hold no pair to learn from: see plan/report.json for what was left out"
        )
    tables.write(folder)
    text = json.dumps(settings, indent=1)
    replace_atomically(folder / "plan.json", lambda temporary: temporary.write_text(text))


def _refuse_others(old: dict, new: dict, folder: Path) -> None:
    for key, value in new.items():
        if old.get(key) != value:
            raise PlanError(
                f"{folder} was begun with {key} {old.get(key)!r}, it is {value!r} now: give another `out`, or"
                " delete the folder to start again"
            )


class Plan:
    """A written plan. `pairs` holds its columns as arrays (source and row stay in arrow)."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.feather

        self.folder = folder
        tables = [
            pyarrow.feather.read_table(folder / f"{name}.arrow", memory_map=True)
            for name in ("pictures", "prompts", "pairs")
        ]
        self._pictures, self._prompts, self._pairs = tables
        names = ("prompt", "chosen", "rejected", "weight", "label")
        self.pairs = {name: self._pairs.column(name).to_numpy() for name in names}
        self.sources, self.rows = self._pairs.column("source"), self._pairs.column("row")

    @property
    def num_pictures(self) -> int:
        return self._pictures.num_rows

    @property
    def num_prompts(self) -> int:
        return self._prompts.num_rows

    def picture(self, number: int) -> Picture:
        path, column, row = (
            self._pictures.column(name)[number].as_py() for name in ("path", "column", "row")
        )
        return Picture(path, f"{number}", column, row)

    def prompt(self, number: int) -> str:
        return self._prompts.column("prompt")[number].as_py()

    def usable(self, bad_pictures: dict[int, str], bad_prompts: dict[int, str]) -> tuple[np.ndarray, Report]:
        """Which pairs keep both pictures and their prompt; the report with the rows of the others as bad."""
        report = Report.from_dict(json.loads((self.folder / "report.json").read_text()))
        lost = np.isin(self.pairs["prompt"], list(bad_prompts))
        for side in ("chosen", "rejected"):
            lost |= np.isin(self.pairs[side], list(bad_pictures))
        seen = set()
        for pair in np.flatnonzero(lost).tolist():
            source, row = self.sources[pair].as_py(), self.rows[pair].as_py()
            if (source, row) not in seen:
                seen.add((source, row))
                report.lose(source.split("-")[0], row, self._reason(pair, bad_pictures, bad_prompts))
        return ~lost, report

    def _reason(self, pair: int, bad_pictures: dict[int, str], bad_prompts: dict[int, str]) -> str:
        chosen, rejected = (int(self.pairs[side][pair]) for side in ("chosen", "rejected"))
        return (
            bad_pictures.get(chosen)
            or bad_pictures.get(rejected)
            or bad_prompts[int(self.pairs["prompt"][pair])]
        )


@dataclasses.dataclass(frozen=True)
class Shards:
    """How `total` rows are cut into files of `size`; `path` names the file of a shard."""

    kind: str
    total: int
    size: int
    path: Callable[[Path, int], Path]

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def rows(self, shard: int) -> range:
        return range(shard * self.size, min(self.total, (shard + 1) * self.size))

    def batches(self, shard: int, size: int) -> list[list[int]]:
        """The shard's row numbers in lists of at most `size`."""
        rows = list(self.rows(shard))
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def prompt_shard_size(shard_size: int) -> int:
    return max(1, shard_size // PROMPTS_A_PICTURE_SHARD)
