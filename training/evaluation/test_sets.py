"""The public test sets as columns of the accuracy table: which files a column needs, and its count.

column               test sets                                      counted by (protocols.py)
imagereward          test.json of 466 prompts                       imagereward
pickscore_official   Pick-a-Pic test_unique, validation_unique      pickscore_official, best_threshold
pickscore_unique     Pick-a-Pic test_unique                         pickscore_untied
pickscore_test       Pick-a-Pic test                                pickscore_untied
hpdv2                test.json                                      hpdv2
hpdv3                test.json                                      hpdv3
pairs                prompt, path1 (preferred), path2, confidence   hpdv3

`pairs` is a file of one's own as the DRM authors' code reads it; theirs is sigma 0 and fit square.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from drm.ranges import Count
from training.config import SourceConfig
from training.data.readers import Picture, Ranking, ReaderError, Report, read_rankings
from training.data.readers.files import parquet_files
from training.evaluation import protocols
from training.evaluation.protocols import Credits

FORMATS = {
    "imagereward": "imagereward",
    "pickapic_test": "pickapic",
    "pickapic_test_unique": "pickapic",
    "pickapic_validation_unique": "pickapic",
    "hpdv2": "hpdv2",
    "hpdv3": "hpdv3",
    "pairs": "hpdv3",
}
# Columns of the table and the test sets each needs.
COLUMNS = {
    "imagereward": ("imagereward",),
    "pickscore_official": ("pickapic_test_unique", "pickapic_validation_unique"),
    "pickscore_unique": ("pickapic_test_unique",),
    "pickscore_test": ("pickapic_test",),
    "hpdv2": ("hpdv2",),
    "hpdv3": ("hpdv3",),
    "pairs": ("pairs",),
}

SWAPPED = 2000  # rankings of a test set whose prompts are swapped


class BenchmarkError(RuntimeError):
    """There is no test set to count, or a scorer cannot be counted on it; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """`path`: the published file (for Pick-a-Pic the downloaded folder, or one parquet file); `images`: the
    root of its relative paths, else the folder of `path`; `limit`: only the first rows, for a trial.
    """

    path: str
    images: str | None = None
    limit: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarksConfig:
    """Test sets; one left out leaves its column empty."""

    imagereward: BenchmarkConfig | None = None
    pickapic_test: BenchmarkConfig | None = None
    pickapic_test_unique: BenchmarkConfig | None = None
    pickapic_validation_unique: BenchmarkConfig | None = None
    hpdv2: BenchmarkConfig | None = None
    hpdv3: BenchmarkConfig | None = None
    pairs: BenchmarkConfig | None = None


def read_benchmarks(
    benchmarks: BenchmarksConfig, bad_rows: float
) -> tuple[dict[str, list[Ranking]], dict[str, Report]]:
    """The test sets that are there, and the report of each; BenchmarkError when there is none."""
    found: dict[str, list[Ranking]] = {}
    reports: dict[str, Report] = {}
    for name, kind in FORMATS.items():
        benchmark = getattr(benchmarks, name)
        if benchmark is None:
            continue
        source = source_of(name, kind, benchmark)
        if missing := _missing(source):
            print(f"{name}: {missing}; its column stays empty", file=sys.stderr)
            continue
        report = Report()
        found[name] = list(read_rankings(source, report))
        report.check(bad_rows)
        if not found[name]:
            raise BenchmarkError(
                f"{name}: {benchmark.path} has no row that can be used, of {report.read[kind]}"
            )
        reports[name] = report
    if not found:
        raise BenchmarkError("no test set is there: name at least one file under benchmarks")
    return found, reports


def _missing(source: SourceConfig) -> str | None:
    """Why there is no file, if there is none."""
    path = Path(source.path)
    if not path.exists():
        return f"{path} is not there"
    if source.format == "pickapic" and path.is_dir():
        try:
            parquet_files(source)
        except ReaderError as error:
            return str(error)
    return None


def source_of(name: str, kind: str, benchmark: BenchmarkConfig) -> SourceConfig:
    """The reader's settings of a test set."""
    split = name.removeprefix("pickapic_") if kind == "pickapic" else None
    return SourceConfig(
        format=kind, path=benchmark.path, images=benchmark.images, split=split, limit=benchmark.limit
    )


def drop_unscored(
    rankings: dict[str, list[Ranking]],
    reports: dict[str, Report],
    reason: Callable[[str, Picture], str | None],
) -> dict[str, list[Ranking]]:
    """The rankings whose pictures could all be opened; the others go to their set's report. Of a ranking made
    of a row for each picture, only those rows. reason(prompt, picture): why it could not, or None.
    """
    kept: dict[str, list[Ranking]] = {}
    for name, ones in rankings.items():
        kept[name] = []
        for ranking in ones:
            why = [reason(ranking.prompt, picture) for picture in ranking.pictures]
            lost = [text for text in why if text is not None]
            for text in lost[: ranking.rows]:
                reports[name].lose(ranking.source, ranking.row, text)
            if not lost:
                kept[name].append(ranking)
            elif ranking.rows > 1 and len(why) - len(lost) > 1:
                kept[name].append(_without(ranking, why))
            elif len(lost) < ranking.rows:
                reports[name].used[ranking.source] -= ranking.rows - len(lost)
                reports[name].leave_out(
                    ranking.source, "a single picture of its prompt", ranking.rows - len(lost)
                )
    return kept


def with_other_prompts(rankings: Sequence[Ranking]) -> list[Ranking]:
    """The same pictures and ranks, each prompt changed for the next of its length, SWAPPED rankings at most,
    spread evenly; [] where there is but one prompt.
    """
    some = rankings[:: max(1, math.ceil(len(rankings) / SWAPPED))]
    prompts = sorted({ranking.prompt for ranking in some}, key=lambda prompt: (len(prompt), prompt))
    if len(prompts) < 2:
        return []
    other = dict(zip(prompts, [*prompts[1:], prompts[0]], strict=True))
    return [dataclasses.replace(ranking, prompt=other[ranking.prompt]) for ranking in some]


def _without(ranking: Ranking, why: Sequence[str | None]) -> Ranking:
    places = [place for place, text in enumerate(why) if text is None]
    return dataclasses.replace(
        ranking,
        pictures=tuple(ranking.pictures[place] for place in places),
        ranks=tuple(ranking.ranks[place] for place in places),
        rows=len(places),
    )


def _in_order(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> tuple[list, list, list]:
    """Scores of the preferred and the other picture, and the prompts, of rankings of two."""
    chosen, rejected = [], []
    for ranking, (first, second) in zip(rankings, scores, strict=True):
        swap = ranking.ranks[0] > ranking.ranks[1]
        chosen.append(second if swap else first)
        rejected.append(first if swap else second)
    return chosen, rejected, [ranking.prompt for ranking in rankings]


def _labelled(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> tuple[list, list, list]:
    """score_0, score_1 and label_0 of rankings of two."""
    labels = [0.5 + 0.5 * ((r.ranks[1] > r.ranks[0]) - (r.ranks[1] < r.ranks[0])) for r in rankings]
    return [pair[0] for pair in scores], [pair[1] for pair in scores], labels


def count(
    column: str, rankings: dict[str, list[Ranking]], score: Callable[[Ranking], list[float]]
) -> tuple[Credits, float | None]:
    """The column's credits, and PickScore's threshold; `score` gives one for each picture of a ranking."""
    own = rankings[COLUMNS[column][0]]
    scores = [score(ranking) for ranking in own]
    prompts = [ranking.prompt for ranking in own]
    if column in ("hpdv3", "pairs"):
        return protocols.hpdv3(*_in_order(own, scores)), None
    if column in ("imagereward", "hpdv2"):
        return getattr(protocols, column)(scores, [ranking.ranks for ranking in own]), None
    if column == "pickscore_official":
        validation = rankings["pickapic_validation_unique"]
        threshold = protocols.best_threshold(*_labelled(validation, [score(r) for r in validation]))
        return protocols.pickscore_official(*_labelled(own, scores), threshold, prompts), threshold
    return protocols.pickscore_untied(*_labelled(own, scores), prompts), 0.0


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def files_of(benchmarks: BenchmarksConfig) -> dict[str, dict[str, str]]:
    """sha256 of every file that the test sets' rows came from."""
    found: dict[str, dict[str, str]] = {}
    for name, kind in FORMATS.items():
        benchmark = getattr(benchmarks, name)
        if benchmark is None or _missing(source := source_of(name, kind, benchmark)):
            continue
        path = Path(benchmark.path)
        files = [path] if path.is_file() else parquet_files(source)
        found[name] = {str(file): file_sha256(file) for file in files}
    return found
