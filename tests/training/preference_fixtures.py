"""Small preference sets in the published formats, made of real pictures: the tiles of models/samples.jpg.

    python -m tests.training.preference_fixtures OUT

writes, always the same,

    hpdv3/            train.json, test.json, images/: votes, null and low confidence
    pickapic/data/    train (2 files), validation_unique, test_unique: parquet with JPEG bytes, the published
                      columns and types
    imagereward/      metadata-train.parquet with a row per picture, test.json; pairs/ has the pictures inside
    hpdv2/            train.json (two pictures), test.json (nine)
    own/pairs.jsonl   weights, a soft label, a transparent PNG, a picture its EXIF turns

Each has bad rows as the real sets do: missing and cut files, bytes that are no picture, no prompt, no label,
NaN, a path that leaves the folder. EXPECTED says how many rows of each file are which, counted by hand.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
STYLES = ("fluent", "flat", "noto", "twemoji")
SIZE, COLUMNS = 128, 24


class Expected(NamedTuple):
    """A source's rows counted by hand; `broken` of the used ones fail once their pictures are opened."""

    format: str
    path: str
    split: str | None
    used: int
    left_out: int
    bad: int
    pairs: int
    broken: int = 0


EXPECTED = (
    Expected("hpdv3", "hpdv3/train.json", None, 9, 2, 5, 9, 1),
    Expected("hpdv3", "hpdv3/test.json", None, 4, 0, 0, 4),
    Expected("pickapic", "pickapic", "train", 11, 3, 3, 11, 3),
    Expected("pickapic", "pickapic", "validation_unique", 2, 1, 0, 2),
    Expected("pickapic", "pickapic", "test_unique", 3, 1, 0, 3),
    Expected("imagereward", "imagereward/metadata-train.parquet", None, 11, 1, 3, 9 + 6 + 1),
    Expected("imagereward", "imagereward/pairs", None, 6, 0, 0, 6),
    Expected("imagereward", "imagereward/test.json", None, 3, 0, 2, 6 + 5 + 6),
    Expected("hpdv2", "hpdv2/train.json", None, 6, 0, 2, 6),
    Expected("hpdv2", "hpdv2/test.json", None, 3, 0, 1, 36 + 36 + 34),
    Expected("jsonl", "own/pairs.jsonl", None, 6, 1, 6, 6),
)


def tile(column: int, style: int) -> Image.Image:
    """One demo picture, 128 x 128 RGB."""
    with Image.open(ROOT / "models" / "samples.jpg") as sheet:
        left, top = column % COLUMNS * SIZE, style % len(STYLES) * SIZE
        return sheet.convert("RGB").crop((left, top, left + SIZE, top + SIZE))


def prompt(column: int, style: int) -> str:
    return f"sample {column}, {STYLES[style % len(STYLES)]} style"


def jpeg(column: int, style: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A demo picture's JPEG file."""
    data = io.BytesIO()
    tile(column, style).resize(size).save(data, "JPEG", quality=90)
    return data.getvalue()


def _save(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.name


def _write_json(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


def _hpdv3(folder: Path) -> None:
    images = folder / "images"
    for column in range(8):
        for style in range(4):
            _save(images / f"{column}_{style}.jpg", jpeg(column, style))
    _save(images / "cut.jpg", jpeg(0, 0)[:900])

    def row(column: int, votes: list[int] | None, confidence: float | None, **changes: object) -> dict:
        return {
            "prompt": prompt(column, 0),
            "choice_dist": votes,
            "confidence": confidence,
            "path1": f"images/{column}_0.jpg",
            "path2": f"images/{column}_1.jpg",
            "model1": "fluent",
            "model2": "flat",
        } | changes

    train = [
        row(0, [12, 7], 0.98),
        row(1, [19, 0], 1.0),
        row(2, None, None),  # null is certain
        row(3, [11, 8], 0.6),  # left out
        row(4, [15, 4], 0.95),
        row(4, [18, 1], 0.99, path2="images/4_2.jpg"),
        row(5, [14, 5], None, path1="images/5_3.jpg"),
        row(6, [10, 9], 0.94),  # left out
        row(7, [16, 3], 0.97),
        row(0, [17, 2], 0.99, path1="images/missing.jpg"),
        row(1, [17, 2], 0.99, prompt=None),
        row(2, [17, 2], math.nan),
        row(3, [17, 2], 0.99, path2="../../outside.jpg"),
        row(4, [17, 2], 0.99, path2=None),
        row(5, [17, 2], 0.99, path2="images/cut.jpg"),  # used, and bad when opened
        row(6, [13, 6], 0.96, path1="images/6_2.jpg", path2="images/6_3.jpg"),
    ]
    _write_json(folder / "train.json", train)
    test = [row(column, None, None) for column in range(4)]
    _write_json(
        folder / "test.json",
        [{k: r[k] for k in ("prompt", "path1", "path2", "model1", "model2")} for r in test],
    )


PICKAPIC = pyarrow.schema(
    [
        ("are_different", pyarrow.bool_()),
        ("best_image_uid", pyarrow.string()),
        ("caption", pyarrow.string()),
        ("created_at", pyarrow.timestamp("ns")),
        ("has_label", pyarrow.bool_()),
        ("image_0_uid", pyarrow.string()),
        ("image_0_url", pyarrow.string()),
        ("image_1_uid", pyarrow.string()),
        ("image_1_url", pyarrow.string()),
        ("jpg_0", pyarrow.binary()),
        ("jpg_1", pyarrow.binary()),
        ("label_0", pyarrow.float64()),
        ("label_1", pyarrow.float64()),
        ("model_0", pyarrow.string()),
        ("model_1", pyarrow.string()),
        ("ranking_id", pyarrow.int64()),
        ("user_id", pyarrow.int64()),
        ("num_example_per_prompt", pyarrow.int64()),
        ("__index_level_0__", pyarrow.int64()),
    ]
)


def _pickapic_row(column: int, styles: tuple[int, int], label: float, number: int, **changes: object) -> dict:
    uids = [f"uid-{column}-{style}" for style in styles]
    best = "tie" if label == 0.5 else uids[int(label == 0)]
    return {
        "are_different": True,
        "best_image_uid": best,
        "caption": prompt(column, 0),
        "created_at": datetime.datetime(2023, 5, 1, 12, 0, number),
        "has_label": True,
        **{f"image_{side}_uid": uids[side] for side in (0, 1)},
        **{f"image_{side}_url": f"https://example.org/{uids[side]}" for side in (0, 1)},
        **{f"jpg_{side}": jpeg(column, styles[side], (160, SIZE)) for side in (0, 1)},
        "label_0": label,
        "label_1": 1 - label,
        **{f"model_{side}": STYLES[styles[side]] for side in (0, 1)},
        "ranking_id": number,
        "user_id": number % 3,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    } | changes


def _pickapic(folder: Path) -> None:
    def write(name: str, rows: list[dict]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows, PICKAPIC)
        pyarrow.parquet.write_table(table, folder / name, row_group_size=4)

    row = _pickapic_row
    first = [row(8, (0, k), 1.0, k, num_example_per_prompt=3) for k in (1, 2, 3)]  # one picture in three rows
    first += [
        row(9, (0, 1), 0.0, 4),
        row(10, (0, 1), 0.5, 5),  # tie
        row(11, (2, 3), 1.0, 6, num_example_per_prompt=2),
        row(11, (0, 3), 0.5, 7, num_example_per_prompt=2),  # tie
        row(12, (0, 1), 1.0, 8, has_label=False, label_0=None, label_1=None),
    ]
    second = [
        row(13, (0, 1), 0.0, 9),
        row(14, (1, 2), 1.0, 10, label_0=math.nan, label_1=math.nan),
        row(15, (1, 2), 1.0, 11, caption=None),
        row(16, (1, 2), 1.0, 12, are_different=False),  # left out
        row(17, (0, 1), 1.0, 13, jpg_1=b"no picture at all", image_1_uid="uid-broken"),  # bad when opened
        row(18, (0, 1), 0.0, 14, jpg_0=jpeg(18, 0)[:700], image_0_uid="uid-cut"),  # bad when opened
        row(19, (0, 1), 1.0, 15, jpg_1=None, image_1_uid="uid-empty"),  # bad when opened
        row(20, (0, 1), 0.0, 16),
        row(21, (2, 3), 1.0, 17),
    ]
    write("train-00000-of-00002-0a1b2c3d4e5f6071.parquet", first)
    write("train-00001-of-00002-8192a3b4c5d6e7f8.parquet", second)
    for split, labels in (("validation_unique", (1.0, 0.5, 0.0)), ("test_unique", (0.0, 1.0, 0.5, 1.0))):
        rows = [row(k, (1, 3), label, k, num_example_per_prompt=5) for k, label in enumerate(labels)]
        write(f"{split}-00000-of-00001-1122334455667788.parquet", rows)


IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def _imagereward(folder: Path) -> None:
    for column in range(4):
        for style in range(4):
            data = io.BytesIO()
            tile(column, style).save(data, "WEBP", quality=90)
            _save(folder / f"images/train/train_1/{column}-{style}.webp", data.getvalue())

    def row(column: int, style: int, rank: float | None, **changes: object) -> dict:
        return {
            "image_path": f"images/train/train_1/{column}-{style}.webp",
            "prompt_id": f"00{column}-0001",
            "prompt": prompt(column, 2),
            "classification": "Illustrations",
            "image_amount_in_total": 4,
            "rank": rank,
            "overall_rating": 5,
            "image_text_alignment_rating": 4,
            "fidelity_rating": 6,
        } | changes

    rows = [row(0, style, rank) for style, rank in enumerate((2, 1, 2, 3))]  # one tie
    rows += [row(1, style, rank) for style, rank in enumerate((1, 2, 3, 4))]
    rows += [
        row(2, 0, 1),
        row(2, 1, 2),
        row(2, 2, None),
        row(2, 3, 1, image_path="images/train/train_1/gone.webp"),
        row(3, 0, 1, image_path="/etc/passwd"),
        row(3, 1, 2),  # alone, left out
        row(0, 0, 5, image_path="images/train/train_1/3-0.webp"),  # a late row of the first prompt
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "metadata-train.parquet")

    def picture(column: int, style: int) -> dict:
        return {"bytes": jpeg(column, style), "path": f"{column}-{style}.jpg"}

    pairs = [
        {"prompt": prompt(c, 2), "img_better": picture(c, 0), "img_worse": picture(c, style)}
        for c in range(3)
        for style in (1, 2)
    ]
    (folder / "pairs").mkdir()
    schema = pyarrow.schema([("prompt", pyarrow.string()), ("img_better", IMAGE), ("img_worse", IMAGE)])
    table = pyarrow.Table.from_pylist(pairs, schema)
    pyarrow.parquet.write_table(table, folder / "pairs" / "train-00000-of-00001.parquet", row_group_size=2)
    test = [
        {
            "id": f"{column:04d}",
            "prompt": prompt(column, 0),
            "generations": [f"images/train/train_1/{column}-{style}.webp" for style in range(4)],
            "ranking": ranking,
        }
        for column, ranking in enumerate(([1, 2, 3, 4], [2, 2, 1, 3], [4, 3, 2, 1], [1, 2, 3], [1, 2, 3, 4]))
    ]
    test[4]["prompt"] = None
    _write_json(folder / "test.json", test)


def _hpdv2(folder: Path) -> None:
    for column in range(8):
        for style in range(2):
            _save(folder / "train" / f"{column * 2 + style:08d}.jpg", jpeg(column, style))
    for number in range(27):
        _save(folder / "test" / f"{number:05d}.jpg", jpeg(number % COLUMNS, number // COLUMNS))

    def row(column: int, preference: list | None, **changes: object) -> dict:
        names = [f"train/{column * 2 + style:08d}.jpg" for style in (0, 1)]
        return {"human_preference": preference, "prompt": prompt(column, 1), "file_path": names} | changes

    preferences = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]
    rows = [row(column, preference) for column, preference in enumerate(preferences)]
    rows += [row(6, None), row(7, [1, 0], file_path=["train/00000014.jpg", "train/nowhere.jpg"])]
    _write_json(folder / "train.json", rows)
    ranks = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1], [1, 1, 3, 4, 4, 6, 7, 8, 9]]
    test = [
        {
            "prompt": prompt(k, 3),
            "image_path": [f"test/{9 * k + i:05d}.jpg" for i in range(9)],
            "rank": rank,
            "raw_annotations": [{"rank": rank, "user_hash": "a"}, {"rank": rank, "user_hash": "b"}],
        }
        for k, rank in enumerate(ranks)
    ]
    test.append(test[0] | {"rank": [1, 2, 3]})
    _write_json(folder / "test.json", test)


def _own(folder: Path) -> None:
    for column in range(20, 24):
        for style in range(4):
            _save(folder / f"{column}-{style}.jpg", jpeg(column, style, (SIZE, 160)))
    glass = tile(22, 0).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    glass.save(folder / "glass.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    tile(23, 0).resize((160, SIZE)).save(folder / "turned.jpg", exif=turned, quality=90)

    def row(chosen: str, rejected: str, **more: object) -> str:
        return json.dumps({"prompt": prompt(20, 0), "chosen": chosen, "rejected": rejected, **more})

    lines = [
        row("20-0.jpg", "20-1.jpg"),
        row("21-0.jpg", "21-1.jpg", weight=2.5),
        row("22-0.jpg", "22-1.jpg", label=0.8),
        row("23-0.jpg", "23-1.jpg", label=0.25),
        row("glass.png", "22-2.jpg", label=0.5),  # tie
        "",
        row("turned.jpg", "23-2.jpg", prompt="in own words: ä, 猫"),
        row("20-3.jpg", "glass.png"),
        row("20-0.jpg", "20-1.jpg", label=1.5),
        row("20-0.jpg", "20-1.jpg", weight=math.nan),
        row("20-0.jpg", "nothing.jpg"),
        row("20-0.jpg", "C:\\pictures\\20-1.jpg"),
        '{"prompt": "cut sho',
        "[1, 2]",
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_fixtures(folder: str | Path) -> Path:
    """Writes all sets below `folder`, which it returns."""
    folder = Path(folder)
    (folder / "own").mkdir(parents=True)
    _hpdv3(folder / "hpdv3")
    _pickapic(folder / "pickapic" / "data")
    _imagereward(folder / "imagereward")
    _hpdv2(folder / "hpdv2")
    _own(folder / "own")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="a folder that does not exist yet")
    print(make_fixtures(parser.parse_args().out))
