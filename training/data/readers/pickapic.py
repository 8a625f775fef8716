"""Pick-a-Pic v2: parquet files <split>-00000-of-00645-<hash>.parquet with both pictures' bytes in each row.

Read here: caption, label_0, label_1 (1/0, 0/1, tie 0.5/0.5), has_label, are_different,
num_example_per_prompt, image_0_uid, image_1_uid. The bytes (jpg_0, jpg_1) stay in the file until opened.
Training weighs a row by 1 / num_example_per_prompt, so that a prompt counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from training.config import SourceConfig
from training.data.readers.files import open_parquet, parquet_files, parquet_records, split_of
from training.data.readers.pictures import Picture
from training.data.readers.records import LeftOut, Ranking, RowError, number, prompt_of

LABELS = ("caption", "label_0", "label_1", "has_label", "are_different", "num_example_per_prompt")
UIDS = ("image_0_uid", "image_1_uid")


def pickapic_records(source: SourceConfig) -> Iterator[tuple[str, dict]]:
    """("file:row", record without the pictures) of the split's files."""
    for path in parquet_files(source):
        names = open_parquet(path, (*LABELS, "jpg_0", "jpg_1")).schema_arrow.names
        columns = (*LABELS, *(uid for uid in UIDS if uid in names))
        place = {"path": str(path), "train": split_of(path, source) == "train"}
        for row, record in parquet_records(path, columns):
            yield f"{path.name}:{row}", {**record, **place, "row": row}


def pickapic_ranking(record: dict, source: SourceConfig, root: str, row: str) -> Ranking:
    """A row of any split; only training rows are weighed down."""
    if record["has_label"] is False:
        raise RowError("no label: has_label is false")
    labels = tuple(number(record[key], key) for key in ("label_0", "label_1"))
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise RowError(f"labels are not 1/0, 0/1 or 0.5/0.5: {labels}")
    if record["train"] and record["are_different"] is False:  # the official count keeps them
        raise LeftOut("one picture twice (are_different is false)")
    weight = 1.0
    if record["train"]:
        examples = number(record["num_example_per_prompt"], "num_example_per_prompt")
        if examples < 1:
            raise RowError(f"num_example_per_prompt below 1: {examples}")
        weight = 1 / examples
    return Ranking(
        prompt=prompt_of(record, "caption"),
        pictures=(_picture(record, 0), _picture(record, 1)),
        ranks=(1 - labels[0], 1 - labels[1]),
        weight=weight,
        source=source.format,
        row=row,
    )


def _picture(record: dict, side: int) -> Picture:
    uid = record.get(UIDS[side]) or f"{Path(record['path']).name}:{record['row']}:{side}"
    return Picture(record["path"], f"pickapic:{uid}", f"jpg_{side}", record["row"])
