"""Readers of the public preference sets, in the files and columns they are published with.

    for ranking in read_rankings(source, report):      # (prompt, pictures, ranks), test and train files alike
        for pair in to_pairs(ranking, source.ties):    # (prompt, preferred, other, weight, label)

Formats: hpdv3, hpdv2, jsonl (json_sets), pickapic, imagereward. A row that cannot be used is counted and
listed in the report, and reading goes on; `report.check(share)` stops when there are too many. Pictures are
opened later, so one that does not decode raises PictureError at `picture.open()`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from training.config import SourceConfig
from training.data.readers.files import images_root, json_records
from training.data.readers.imagereward import (
    grouped_rankings,
    imagereward_ranking,
    imagereward_records,
    is_picture_row,
)
from training.data.readers.json_sets import hpdv2_ranking, hpdv3_ranking, jsonl_ranking
from training.data.readers.pickapic import pickapic_ranking, pickapic_records
from training.data.readers.pictures import Picture, PictureError, to_rgb
from training.data.readers.records import (
    BadRow,
    LeftOut,
    Pair,
    Ranking,
    ReaderError,
    Report,
    RowError,
    to_pairs,
)

__all__ = [
    "BadRow",
    "Pair",
    "Picture",
    "PictureError",
    "Ranking",
    "ReaderError",
    "Report",
    "read_pairs",
    "read_rankings",
    "to_pairs",
    "to_rgb",
]

Parse = Callable[[dict, SourceConfig, str, str], Ranking]
JSON_SETS: dict[str, Parse] = {"hpdv3": hpdv3_ranking, "hpdv2": hpdv2_ranking, "jsonl": jsonl_ranking}


def read_rankings(source: SourceConfig, report: Report) -> Iterator[Ranking]:
    """The usable rows of a source, at most `limit`; counts and bad rows go to the report.

    Raises ReaderError when the source itself is missing, cut short or of another format.
    """
    if not Path(source.path).exists():
        raise ReaderError(f"{source.path} is not there: `path` of a {source.format} source names its file")
    report.read[source.format] += 0
    return itertools.islice(_rankings(source, report), source.limit)


def _rankings(source: SourceConfig, report: Report) -> Iterator[Ranking]:
    root = images_root(source)
    if source.format in JSON_SETS:
        return _parsed(json_records(Path(source.path)), JSON_SETS[source.format], source, root, report)
    if source.format == "pickapic":
        return _parsed(pickapic_records(source), pickapic_ranking, source, root, report)
    rows = imagereward_records(source)
    first = list(itertools.islice(rows, 1))
    rows = itertools.chain(first, rows)
    if first and is_picture_row(first[0][1]):
        return grouped_rankings(rows, source, root, report)
    return _parsed(rows, imagereward_ranking, source, root, report)


def _parsed(
    rows: Iterator[tuple[str, object]], parse: Parse, source: SourceConfig, root: str, report: Report
) -> Iterator[Ranking]:
    for row, record in rows:
        report.read[source.format] += 1
        try:
            if not isinstance(record, dict):
                raise RowError(f"no JSON object: {str(record)[:80]!r}")
            ranking = parse(record, source, root, row)
        except LeftOut as rule:
            report.leave_out(source.format, str(rule))
        except (RowError, PictureError) as error:
            report.refuse(source.format, row, str(error))
        else:
            report.used[source.format] += 1
            yield ranking


def read_pairs(source: SourceConfig, report: Report) -> Iterator[Pair]:
    """The comparisons of a source, ties as it says; a row with only dropped ties counts as left out."""
    for ranking in read_rankings(source, report):
        pairs = to_pairs(ranking, source.ties)
        if not pairs:
            report.used[source.format] -= ranking.rows
            report.leave_out(source.format, "tie", ranking.rows)
        yield from pairs
