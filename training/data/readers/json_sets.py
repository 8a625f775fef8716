"""HPDv3, HPDv2 and plain pairs.jsonl.

HPDv3  {prompt, path1 (always the preferred one), path2, choice_dist: [12, 7] | null, confidence | null}
HPDv2  train {prompt, file_path: [2], human_preference: [1, 0]}, test {prompt, image_path: [n], rank: [n]}
jsonl  {prompt, chosen, rejected, weight?, label?}, label = P(chosen preferred)
"""

from __future__ import annotations

from training.config import SourceConfig
from training.data.readers.pictures import file_picture
from training.data.readers.records import LeftOut, Ranking, RowError, number, numbers, prompt_of


def hpdv3_ranking(record: dict, source: SourceConfig, root: str, row: str) -> Ranking:
    """A row of train.json, all.json or test.json; null confidence counts as certain."""
    confidence = record.get("confidence")
    if confidence is not None and number(confidence, "confidence") < source.min_confidence:
        raise LeftOut(f"confidence below {source.min_confidence:g}")
    pictures = tuple(file_picture(root, record.get(key)) for key in ("path1", "path2"))
    return Ranking(
        prompt=prompt_of(record),
        pictures=pictures,
        ranks=(0.0, 1.0),
        preference=_share_of_votes(record.get("choice_dist")),
        source=source.format,
        row=row,
    )


def _share_of_votes(choice_dist: object) -> float | None:
    """Votes for the preferred picture over all; the larger count is path1's, since path1 is preferred."""
    if choice_dist is None:
        return None
    votes = numbers(choice_dist, "choice_dist", 2)
    if min(votes) < 0:
        raise RowError(f"choice_dist below zero: {choice_dist!r}")
    return max(votes) / sum(votes) if sum(votes) else None


def hpdv2_ranking(record: dict, source: SourceConfig, root: str, row: str) -> Ranking:
    """A row of train.json (two pictures) or of test.json (nine)."""
    test = "image_path" in record
    names = record.get("image_path" if test else "file_path")
    if not isinstance(names, list) or len(names) < 2:
        raise RowError(f"no list of pictures: {names!r}")
    if test:
        ranks = numbers(record.get("rank"), "rank", len(names))
    else:
        preferences = numbers(record.get("human_preference"), "human_preference", len(names))
        ranks = tuple(1 - preference for preference in preferences)
    prompt = prompt_of(record)
    pictures = tuple(file_picture(root, name) for name in names)
    return Ranking(prompt=prompt, pictures=pictures, ranks=ranks, source=source.format, row=row)


def jsonl_ranking(record: dict, source: SourceConfig, root: str, row: str) -> Ranking:
    """One's own pairs. A label below a half says that `rejected` is the better one."""
    weight, label = number(record.get("weight", 1.0), "weight"), record.get("label")
    if weight < 0:
        raise RowError(f"weight below zero: {weight}")
    if label is not None and not 0 <= number(label, "label") <= 1:
        raise RowError(f"label is not in 0 to 1: {label}")
    share = 1.0 if label is None else float(label)
    pictures = tuple(file_picture(root, record.get(key)) for key in ("chosen", "rejected"))
    return Ranking(
        prompt=prompt_of(record),
        pictures=pictures,
        ranks=(float(share < 0.5), float(share > 0.5)),
        weight=weight,
        label=None if label is None else share,
        source=source.format,
        row=row,
    )
