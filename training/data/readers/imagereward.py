"""ImageRewardDB in its three published forms.

    pairs       {prompt, img_better, img_worse}, a path or the picture itself ({bytes, path} in parquet)
    pictures    one row each: {prompt_id, prompt, image_path or image, rank, overall_rating, ...}
    test.json   466 rows {id, prompt, generations: [path, ...], ranking: [rank, ...]}

Lower rank is better. Rows of pictures are gathered by prompt_id; a bad one leaves its group, the rest stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from training.config import SourceConfig
from training.data.readers.files import json_records, open_parquet, parquet_files, parquet_records
from training.data.readers.pictures import Picture, PictureError, file_picture
from training.data.readers.records import Ranking, ReaderError, Report, RowError, number, numbers, prompt_of

PAIR = ("img_better", "img_worse")


def imagereward_records(source: SourceConfig) -> Iterator[tuple[str, dict]]:
    """("file:row", record); pictures inside a parquet file are replaced by their Picture, unread."""
    path = Path(source.path)
    if path.suffix in (".json", ".jsonl"):
        yield from json_records(path)
        return
    for file in parquet_files(source):
        yield from _parquet_records(file)


def _parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow

    schema = open_parquet(path).schema_arrow
    columns, embedded = [], {}
    for field in schema:
        if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            embedded[field.name] = f"{field.name}.bytes"
            if field.type.get_field_index("path") >= 0:
                columns.append(f"{field.name}.path")
        elif pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            embedded[field.name] = field.name
        else:
            columns.append(field.name)
    for row, record in parquet_records(path, tuple(columns)):
        for name, column in embedded.items():
            record[name] = _embedded_picture(path, column, row, record.get(name), record.get("prompt"))
        yield f"{path.name}:{row}", record


def _embedded_picture(path: Path, column: str, row: int, value: object, prompt: object) -> Picture:
    """Known by its prompt and its published file name, which other pairs of the prompt repeat."""
    name = value.get("path") if isinstance(value, dict) else None
    key = f"{path.name}:{row}:{column}"
    if name:
        key = f"{hashlib.sha256(str(prompt).encode()).hexdigest()[:16]}:{name}"
    return Picture(str(path), f"imagereward:{key}", column, row)


def _picture(root: str, value: object) -> Picture:
    return value if isinstance(value, Picture) else file_picture(root, value)


def imagereward_ranking(record: dict, source: SourceConfig, root: str, row: str) -> Ranking:
    """A row of the pair form or of test.json."""
    prompt = prompt_of(record)
    if PAIR[0] in record:
        pictures = tuple(_picture(root, record.get(name)) for name in PAIR)
        return Ranking(prompt=prompt, pictures=pictures, ranks=(0.0, 1.0), source=source.format, row=row)
    names = record.get("generations")
    if not isinstance(names, list) or len(names) < 2:
        raise RowError(f"no list of pictures: {names!r}")
    ranks = numbers(record.get("ranking"), "ranking", len(names))
    pictures = tuple(file_picture(root, name) for name in names)
    return Ranking(prompt=prompt, pictures=pictures, ranks=ranks, source=source.format, row=row)


def is_picture_row(record: object) -> bool:
    """Whether the record is one of the form with a row for each picture."""
    return isinstance(record, dict) and "rank" in record and ("image_path" in record or "image" in record)


def grouped_rankings(
    rows: Iterator[tuple[str, dict]], source: SourceConfig, root: str, report: Report
) -> Iterator[Ranking]:
    """Rankings from rows for single pictures, in the order of each prompt's first row."""
    groups: dict[object, list[tuple[str, str, Picture, float]]] = {}
    for row, record in rows:
        report.read[source.format] += 1
        try:
            if not is_picture_row(record) or record.get("prompt_id") is None:
                raise RowError("no prompt_id: the row belongs to no group")
            picture = _picture(root, record.get("image", record.get("image_path")))
            entry = (row, prompt_of(record), picture, number(record["rank"], "rank"))
            groups.setdefault(record["prompt_id"], []).append(entry)
        except (RowError, PictureError) as error:
            report.refuse(source.format, row, str(error))
    if not groups and not report.read[source.format]:
        raise ReaderError(f"{source.path} holds no rows")
    for group in groups.values():
        names, prompts, pictures, ranks = zip(*group, strict=True)
        if len(group) < 2:
            report.leave_out(source.format, "a single picture of its prompt")
            continue
        report.used[source.format] += len(group)
        yield Ranking(
            prompt=prompts[0],
            pictures=pictures,
            ranks=ranks,
            source=source.format,
            row=names[0],
            rows=len(group),
        )
