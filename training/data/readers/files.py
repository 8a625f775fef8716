"""The files of a source: JSON lists, JSON lines, and parquet by the names that published splits have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from drm.text_files import EncodingError, text_lines
from training.config import SourceConfig
from training.data.readers.records import ReaderError

if TYPE_CHECKING:
    import pyarrow.parquet

SPLITS = ("train", "validation", "test", "validation_unique", "test_unique")


def images_root(source: SourceConfig) -> str:
    """Where relative paths start: `images`, else the folder the source's file is in."""
    path = Path(source.path)
    root = Path(source.images) if source.images else (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise ReaderError(f"{root} is no folder: `images` of {source.path} names where its pictures are")
    return str(root)


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """("file:number", record) of a JSON list, numbered from 0, or of JSON lines, numbered from 1.

    A line that is no JSON is yielded as None, since only that row is lost.
    ReaderError when the file is no UTF-8.
    """
    if path.suffix == ".jsonl":
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield f"{path.name}:{number}", _parsed(line)
        return
    try:
        records = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise ReaderError(
            f"{path} is no JSON or cut short ({error}): download it again (JSON lines belong in a .jsonl)"
        ) from error
    if not isinstance(records, list):
        raise ReaderError(f"{path} holds {type(records).__name__}: wanted a JSON list of rows")
    for number, record in enumerate(records):
        yield f"{path.name}:{number}", record


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from text_lines(path)
    except EncodingError as error:
        raise ReaderError(str(error)) from error
    except OSError as error:
        raise ReaderError(f"cannot read {path}: {error.strerror}") from error


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def split_of(path: Path, source: SourceConfig) -> str:
    """The split a parquet file belongs to, by its name; `split` of the source where the name says none."""
    name = path.name.removeprefix("metadata-").removesuffix(".parquet").split("-")[0]
    return name if name in SPLITS else (source.split or "train")


def parquet_files(source: SourceConfig) -> list[Path]:
    """The file, or of a folder (or its data/) those of the source's split, in order."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if not found:
        raise ReaderError(f"{path} is no file and holds no *.parquet: give the downloaded file or folder")
    splits = sorted({split_of(file, source) for file in found})
    if source.split is None and len(splits) > 1:
        raise ReaderError(f"{path} holds the splits {', '.join(splits)}: set `split` to one of them")
    files = [file for file in found if source.split in (None, split_of(file, source))]
    if not files:
        raise ReaderError(f"{path} has no split {source.split!r}: it holds {', '.join(splits)}")
    return files


def open_parquet(path: Path, columns: tuple[str, ...] = ()) -> pyarrow.parquet.ParquetFile:
    """The opened file, with the columns a format must have; ReaderError otherwise."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ReaderError(f"{path} is no parquet or cut short ({error}): download it again") from error
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise ReaderError(
            f"{path} has no column {', '.join(missing)}, only {', '.join(file.schema_arrow.names)}:"
            " is it of another set?"
        )
    return file


def parquet_records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """(row, record) with only the named columns, a few thousand rows in memory at a time."""
    import pyarrow

    file, row = open_parquet(path), 0
    try:
        for batch in file.iter_batches(4096, columns=list(columns)):
            for record in batch.to_pylist():
                yield row, record
                row += 1
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ReaderError(f"{path} is damaged at row {row} ({error}): download it again") from error
