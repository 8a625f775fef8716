"""What every reader yields, and the report of the rows it could not use.

A published row becomes a Ranking, (prompt, pictures, ranks), lower is better; a Ranking becomes Pairs,
(prompt, preferred picture, other picture, weight, label). Of each source's rows

    read = used + left out (by the set's rules: below the confidence, a dropped tie) + bad
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Literal

from training.data.readers.pictures import Picture
from training.engine.atomic import replace_atomically

MAX_LISTED = 100_000


class ReaderError(ValueError):
    """A source cannot be read at all, or too many of its rows cannot; one sentence says what to do."""


class RowError(ValueError):
    """A row that cannot be used; the message is `kind: what was found`."""


class LeftOut(Exception):  # noqa: N818 - no error: the set's own rules leave the row out
    """A sound row that the set's rules or the configuration leave out; the message says which rule."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Pictures of one prompt in order of preference.

    ranks: lower is better, equal is a tie. preference: with two pictures, P(the first preferred) by published
    votes. label: P(the first preferred) as the row's author wants it learned. row: "file:number" of the first
    of the `rows` it is made of.
    """

    prompt: str
    pictures: tuple[Picture, ...]
    ranks: tuple[float, ...]
    weight: float = 1.0
    preference: float | None = None
    label: float | None = None
    source: str
    row: str
    rows: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One comparison; label is P(chosen preferred), 0.5 for a tie that is kept."""

    prompt: str
    chosen: Picture
    rejected: Picture
    weight: float = 1.0
    label: float = 1.0
    source: str
    row: str


def to_pairs(ranking: Ranking, ties: Literal["drop", "soft"] = "drop") -> list[Pair]:
    """Every comparison inside a ranking, the better picture as chosen.

    ties "soft": tied pictures stay, labelled 0.5, and published votes become the label. A label of the row's
    own is kept in both cases.
    """
    preference = ranking.label
    if preference is None and ties == "soft":
        preference = ranking.preference
    pairs = []
    for i, j in itertools.combinations(range(len(ranking.pictures)), 2):
        first, second = ranking.ranks[i], ranking.ranks[j]
        if first == second and ties == "drop":
            continue
        label = 0.5 if first == second else 1.0
        if preference is not None:
            label = preference if first <= second else 1 - preference
        chosen, rejected = (i, j) if first <= second else (j, i)
        pairs.append(
            Pair(
                prompt=ranking.prompt,
                chosen=ranking.pictures[chosen],
                rejected=ranking.pictures[rejected],
                weight=ranking.weight,
                label=label,
                source=ranking.source,
                row=ranking.row,
            )
        )
    return pairs


@dataclasses.dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be used: its source, "file:number", and `kind: what was found`."""

    source: str
    row: str
    reason: str


@dataclasses.dataclass
class Report:
    """Counts rows read, used, left out and bad by source, and lists the bad ones (the first 100,000)."""

    read: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    used: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    left_out: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)
    bad: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)
    bad_rows: list[BadRow] = dataclasses.field(default_factory=list)

    def leave_out(self, source: str, reason: str, rows: int = 1) -> None:
        self.left_out.setdefault(source, collections.Counter())[reason] += rows

    def refuse(self, source: str, row: str, reason: str) -> None:
        kind = reason.split(":", 1)[0]
        self.bad.setdefault(source, collections.Counter())[kind] += 1
        if len(self.bad_rows) < MAX_LISTED:
            self.bad_rows.append(BadRow(source, row, reason))

    def lose(self, source: str, row: str, reason: str) -> None:
        """A row counted as used turns out bad, such as when its picture does not decode."""
        self.used[source] -= 1
        self.refuse(source, row, reason)

    def num_bad(self, source: str) -> int:
        return sum(self.bad.get(source, {}).values())

    def check(self, share: float, listed: Path | None = None) -> None:
        """ReaderError when more than `share` of a source's rows are bad; `listed`: where they all are."""
        for source, read in self.read.items():
            bad = self.num_bad(source)
            if bad > share * read:
                first = next((row for row in self.bad_rows if row.source == source), None)
                example = f", such as {first.row} ({first.reason})" if first else ""
                raise ReaderError(
                    f"{source}: {bad} of {read} rows cannot be used{example}; at most {share:.1%} may be:"
                    f" mend them, or raise bad_rows{f'; all are listed in {listed}' if listed else ''}"
                )

    def as_dict(self) -> dict:
        sources = {
            source: {
                "read": self.read[source],
                "used": self.used[source],
                "left_out": dict(sorted(self.left_out.get(source, {}).items())),
                "bad": dict(sorted(self.bad.get(source, {}).items())),
            }
            for source in sorted(self.read)
        }
        return {"sources": sources, "bad_rows": [dataclasses.asdict(row) for row in self.bad_rows]}

    @classmethod
    def from_dict(cls, tree: dict) -> Report:
        report = cls(bad_rows=[BadRow(**row) for row in tree["bad_rows"]])
        for source, counts in tree["sources"].items():
            report.read[source], report.used[source] = counts["read"], counts["used"]
            report.left_out[source] = collections.Counter(counts["left_out"])
            report.bad[source] = collections.Counter(counts["bad"])
        return report

    def write(self, path: str | Path) -> None:
        """The report as JSON."""
        text = json.dumps(self.as_dict(), indent=1)
        replace_atomically(Path(path), lambda temporary: temporary.write_text(text))


def prompt_of(record: dict, key: str = "prompt") -> str:
    """The row's text; RowError when there is none."""
    prompt = record.get(key)
    if not isinstance(prompt, str) or not prompt.strip():
        raise RowError(f"no prompt: {prompt!r}")
    return prompt


def number(value: object, what: str) -> float:
    """A finite number; RowError names `what` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{what} is no number: {value!r}")
    return float(value)


def numbers(values: object, what: str, length: int) -> tuple[float, ...]:
    """A list of `length` finite numbers; RowError names `what` otherwise."""
    if not isinstance(values, list | tuple) or len(values) != length:
        raise RowError(f"{what} is no list of {length}: {values!r}")
    return tuple(number(value, what) for value in values)
