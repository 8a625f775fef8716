"""The readers against files of the published formats, with counts, ranks and labels worked out by hand."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.training.preference_fixtures import EXPECTED, make_fixtures, prompt, tile
from training.config import SourceConfig
from training.data.readers import (
    PictureError,
    Ranking,
    ReaderError,
    Report,
    read_pairs,
    read_rankings,
    to_pairs,
)
from training.data.readers.pickapic import pickapic_ranking
from training.data.readers.pictures import Picture, _Column, file_picture
from training.data.readers.records import LeftOut


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_fixtures(tmp_path_factory.mktemp("sets"))


def source(sets, format, path, **kwargs):
    return SourceConfig(format=format, path=str(sets / path), **kwargs)


def rankings(sets, format, path, **kwargs):
    report = Report()
    return list(read_rankings(source(sets, format, path, **kwargs), report)), report


def opens(picture):
    try:
        return picture.open().mode == "RGB"
    except PictureError:
        return False


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda e: f"{e.path}-{e.split}")
def test_every_row_is_used_left_out_or_bad(sets, expected):
    report = Report()
    pairs = list(read_pairs(source(sets, expected.format, expected.path, split=expected.split), report))
    counts = report.as_dict()["sources"][expected.format]
    assert len(pairs) == expected.pairs
    assert counts["used"] == expected.used
    assert sum(counts["left_out"].values()) == expected.left_out
    assert sum(counts["bad"].values()) == expected.bad == len(report.bad_rows)
    assert counts["read"] == expected.used + expected.left_out + expected.bad
    assert sum(not (opens(pair.chosen) and opens(pair.rejected)) for pair in pairs) == expected.broken


def test_hpdv3_prefers_path1_and_takes_null_confidence_as_certain(sets):
    found, report = rankings(sets, "hpdv3", "hpdv3/train.json")
    assert [r.row.split(":")[1] for r in found] == ["0", "1", "2", "4", "5", "6", "8", "14", "15"]
    assert found[0].preference == pytest.approx(12 / 19)
    assert found[2].preference is None
    assert found[0].ranks == (0.0, 1.0)
    assert found[0].pictures[0].path.endswith("images/0_0.jpg")
    assert report.left_out["hpdv3"] == {"confidence below 0.95": 2}
    everything, _ = rankings(sets, "hpdv3", "hpdv3/train.json", min_confidence=0.0)
    assert len(everything) == 11


def test_bad_rows_are_named_with_their_reason(sets):
    _, report = rankings(sets, "hpdv3", "hpdv3/train.json")
    assert {row.row: row.reason for row in report.bad_rows} == {
        "train.json:9": "missing file: images/missing.jpg",
        "train.json:10": "no prompt: None",
        "train.json:11": "confidence is no number: nan",
        "train.json:12": "path outside the images folder: '../../outside.jpg'",
        "train.json:13": "no path: None",
    }


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "C:\\a.jpg", "\\\\host\\a.jpg", "..\\a.jpg", "a\0.jpg"],
)
def test_a_path_that_leaves_the_images_folder_is_refused(tmp_path, name):
    with pytest.raises(PictureError, match="outside the images folder"):
        file_picture(str(tmp_path), name)


def test_pickapic_weighs_training_rows_by_their_prompts_rows(sets):
    train, _ = rankings(sets, "pickapic", "pickapic", split="train")
    assert [r.weight for r in train[:6]] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1, 1 / 2])
    assert train[0].ranks == (0.0, 1.0)
    assert train[3].ranks == (1.0, 0.0)
    assert train[4].ranks == (0.5, 0.5)
    assert train[0].prompt == prompt(8, 0)
    test, _ = rankings(sets, "pickapic", "pickapic/data", split="test_unique")
    assert [r.weight for r in test] == [1.0] * 4
    assert [r.ranks for r in test] == [(1, 0), (0, 1), (0.5, 0.5), (0, 1)]


def test_one_picture_in_three_rows_has_one_key(sets):
    train, _ = rankings(sets, "pickapic", "pickapic", split="train")
    assert len({r.pictures[0].key for r in train[:3]}) == 1
    assert len({r.pictures[1].key for r in train[:3]}) == 3
    pairs, _ = rankings(sets, "imagereward", "imagereward/pairs")
    assert len({r.pictures[0].key for r in pairs}) == 3  # each better picture is in two rows
    assert len({p.key for r in pairs for p in r.pictures}) == 9


def test_a_split_is_chosen_by_file_name(sets):
    with pytest.raises(ReaderError, match="splits test_unique, train, validation_unique: set `split`"):
        rankings(sets, "pickapic", "pickapic")
    with pytest.raises(ReaderError, match="no split 'test'"):
        rankings(sets, "pickapic", "pickapic", split="test")
    file = sets / "pickapic/data/validation_unique-00000-of-00001-1122334455667788.parquet"
    assert [r.weight for r in rankings(sets, "pickapic", file)[0]] == [1.0] * 3


def test_parquet_pictures_are_those_of_their_rows_in_any_order(sets):
    train, _ = rankings(sets, "pickapic", "pickapic", split="train")
    pictures = [p for r in train for p in r.pictures if opens(p)]
    forwards = [p.open().tobytes() for p in pictures]
    backwards = [p.open().tobytes() for p in reversed(pictures)]
    assert forwards == backwards[::-1]
    wanted = tile(8, 2).resize((160, 128))
    difference = abs(sum(wanted.convert("L").tobytes()) - sum(pictures[3].open().convert("L").tobytes()))
    assert difference < 0.02 * 255 * 160 * 128


def test_a_parquet_column_is_read_a_few_rows_at_a_time(tmp_path):
    rows = [os.urandom(100_000) for _ in range(256)]
    path = tmp_path / "one_group.parquet"
    table = pyarrow.table({"data": rows})
    pyarrow.parquet.write_table(table, path, row_group_size=256, use_dictionary=False, write_batch_size=8)
    column = _Column(str(path), "data")
    before, most = pyarrow.total_allocated_bytes(), 0
    for i, row in enumerate(rows):
        assert column.read(i) == row
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert column.read(3) == rows[3]
    assert most < sum(map(len, rows)) / 4  # pages of a megabyte and sixteen rows


def test_imagereward_gathers_the_rows_of_a_prompt(sets):
    found, report = rankings(sets, "imagereward", "imagereward/metadata-train.parquet")
    assert [r.ranks for r in found] == [(2, 1, 2, 3, 5), (1, 2, 3, 4), (1, 2)]
    assert [r.rows for r in found] == [5, 4, 2]
    assert {row.row.split(":")[1] for row in report.bad_rows} == {"10", "11", "12"}
    best = to_pairs(found[0])[0]
    assert best.chosen.path.endswith("0-1.webp")
    assert best.rejected.path.endswith("0-0.webp")


def test_a_downloaded_imagereward_folder_is_read_by_split(sets, tmp_path):
    folder = tmp_path / "ImageRewardDB"
    shutil.copytree(sets / "imagereward/images", folder / "images")
    for split in ("train", "test"):
        shutil.copy(sets / "imagereward/metadata-train.parquet", folder / f"metadata-{split}.parquet")
    report = Report()
    wanted = SourceConfig(format="imagereward", path=str(folder), split="train")
    assert len(list(read_pairs(wanted, report))) == 16
    assert report.read["imagereward"] == 15
    with pytest.raises(ReaderError, match="holds the splits test, train: set `split`"):
        list(read_pairs(dataclasses.replace(wanted, split=None), Report()))


def test_a_ranking_of_nine_gives_every_untied_pair(sets):
    found, _ = rankings(sets, "hpdv2", "hpdv2/test.json")
    assert [len(to_pairs(r)) for r in found] == [36, 36, 34]
    assert [len(to_pairs(r, "soft")) for r in found] == [36, 36, 36]
    worst_first = to_pairs(found[1])[0]
    assert (worst_first.chosen, worst_first.rejected) == (found[1].pictures[1], found[1].pictures[0])
    train, _ = rankings(sets, "hpdv2", "hpdv2/train.json")
    assert [r.ranks for r in train[:2]] == [(0, 1), (1, 0)]


def two(ranks, **kwargs):
    pictures = (Picture("a", "a"), Picture("b", "b"))
    return Ranking(prompt="p", pictures=pictures, ranks=ranks, source="s", row="f:0", **kwargs)


def test_labels_of_pairs():
    def pair(*args, ties="drop", **kwargs):
        return [(p.chosen.key, p.rejected.key, p.label) for p in to_pairs(two(*args, **kwargs), ties)]

    assert pair((0, 1)) == [("a", "b", 1.0)]
    assert pair((1, 0)) == [("b", "a", 1.0)]
    assert pair((1, 1)) == []
    assert pair((1, 1), ties="soft") == [("a", "b", 0.5)]
    assert pair((0, 1), preference=0.75) == [("a", "b", 1.0)]  # votes become labels only when asked for
    assert pair((0, 1), preference=0.75, ties="soft") == [("a", "b", 0.75)]
    assert pair((0, 1), label=0.75) == [("a", "b", 0.75)]
    assert pair((1, 0), label=0.25) == [("b", "a", 0.75)]  # a label below a half turns the pair around


def test_own_pairs_keep_weights_labels_and_transparency(sets):
    report = Report()
    pairs = list(read_pairs(source(sets, "jsonl", "own/pairs.jsonl", ties="soft"), report))
    assert [(p.weight, p.label) for p in pairs] == [
        (1, 1),
        (2.5, 1),
        (1, 0.8),
        (1, 0.75),
        (1, 0.5),
        (1, 1),
        (1, 1),
    ]
    assert pairs[3].chosen.path.endswith("23-1.jpg")
    assert [row.row for row in report.bad_rows][-1] == "pairs.jsonl:14"  # lines count from 1, empty ones too
    glass = pairs[4].chosen.open()
    top, original = glass.getpixel((64, 0)), tile(22, 0).getpixel((64, 127))
    assert top == (255, 255, 255)
    assert glass.getpixel((64, 127)) == pytest.approx(original, abs=2)
    turned = pairs[5].chosen.open()
    assert turned.size == (128, 160)  # stored as 160 x 128


def test_a_transparent_palette_picture_is_drawn_on_white(tmp_path):
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((0, 0), 1)
    picture.save(tmp_path / "p.png", transparency=0)
    image = file_picture(str(tmp_path), "p.png").open()
    assert image.getpixel((0, 0)) == (0, 0, 255)
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_limit_reads_no_further(sets):
    found, report = rankings(sets, "hpdv2", "hpdv2/train.json", limit=2)
    assert len(found) == 2
    assert report.read["hpdv2"] == 2


def test_too_many_bad_rows_stop_with_an_example(sets):
    _, report = rankings(sets, "hpdv3", "hpdv3/train.json")
    report.check(5 / 16)
    with pytest.raises(ReaderError, match=r"hpdv3: 5 of 16 rows .* train.json:9 \(missing file: .*at most 2"):
        report.check(0.02)


def test_report_returns_from_its_json_as_it_was(sets, tmp_path):
    _, report = rankings(sets, "jsonl", "own/pairs.jsonl")
    report.lose("jsonl", "pairs.jsonl:1", "broken picture: 20-0.jpg")
    report.write(tmp_path / "report.json")
    tree = json.loads((tmp_path / "report.json").read_text())
    assert Report.from_dict(tree).as_dict() == report.as_dict()
    assert tree["sources"]["jsonl"]["bad"]["broken picture"] == 1
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("format", "name", "content", "message"),
    [
        ("hpdv3", "gone.json", None, "is not there"),
        ("hpdv3", "cut.json", b'[{"prompt": "a", "pa', "cut short"),
        ("hpdv2", "object.json", b'{"prompt": "a"}', "wanted a JSON list"),
        ("pickapic", "cut.parquet", b"PAR1 cut short", "no parquet or cut short"),
        ("imagereward", "cut.parquet", b"PAR1 cut short", "no parquet or cut short"),
    ],
)
def test_an_unusable_file_ends_in_one_clear_sentence(tmp_path, format, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ReaderError, match=message):
        list(read_rankings(SourceConfig(format=format, path=str(tmp_path / name)), Report()))


def test_another_sets_parquet_names_the_missing_columns(sets):
    with pytest.raises(ReaderError, match=r"has no column caption, label_0.* is it of another set"):
        rankings(sets, "pickapic", "imagereward/pairs/train-00000-of-00001.parquet")


def test_a_missing_images_folder_is_named(sets):
    with pytest.raises(ReaderError, match="nowhere is no folder: `images`"):
        rankings(sets, "hpdv3", "hpdv3/train.json", images=str(sets / "nowhere"))


@pytest.mark.parametrize("train", [True, False])
def test_pickapic_rows_of_one_picture_twice_are_left_out_of_training_only(train: bool):
    record = {
        "caption": "a cat",
        "label_0": 1.0,
        "label_1": 0.0,
        "has_label": True,
        "are_different": False,
        "num_example_per_prompt": 1,
        "path": "test.parquet",
        "row": 0,
        "train": train,
    }
    source = SourceConfig(format="pickapic", path="pickapic")
    if train:
        with pytest.raises(LeftOut):
            pickapic_ranking(record, source, "", "row 0")
    else:
        assert pickapic_ranking(record, source, "", "row 0").ranks == (0.0, 1.0)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(sets, tmp_path, suffix):
    rows = (sets / "own/pairs.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    path, form = (
        tmp_path / f"pairs.{suffix}",
        ("\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]"),
    )
    path.write_text(form, encoding="utf-8-sig")
    found, report = rankings(tmp_path, "jsonl", path, images=str(sets / "own"))
    assert [r.prompt for r in found] == [json.loads(row)["prompt"] for row in rows]
    assert report.num_bad("jsonl") == 0


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_text_in_another_encoding_stops_with_file_and_line(sets, tmp_path, suffix):
    rows = (sets / "own/pairs.jsonl").read_text(encoding="utf-8").splitlines()[:1]
    rows.append(json.dumps({**json.loads(rows[0]), "prompt": "一只猫坐在房子前面"}, ensure_ascii=False))
    path, form = tmp_path / f"pairs.{suffix}", "[" * (suffix == "json") + (",\n".join(rows))
    path.write_text(form, encoding="gbk")
    with pytest.raises(ReaderError, match=rf"pairs\.{suffix}, line 2 is not UTF-8"):
        rankings(tmp_path, "jsonl", path, images=str(sets / "own"))


def test_a_parquet_text_in_another_encoding_stops(sets, tmp_path):
    path = next((sets / "pickapic/data").glob("train-*.parquet"))
    table = pyarrow.parquet.read_table(path)
    place = table.column_names.index("caption")
    gbk = pyarrow.array(["一只猫坐在房子前面".encode("gbk")] * len(table), pyarrow.binary()).cast(
        pyarrow.string(), safe=False
    )
    pyarrow.parquet.write_table(table.set_column(place, "caption", gbk), tmp_path / path.name)
    with pytest.raises(ReaderError, match="damaged at row 0"):
        rankings(tmp_path, "pickapic", tmp_path / path.name)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("name", "picture", "wanted"),
    [
        ("gray.png", Image.fromarray(RAMP), RAMP),
        ("gray16.png", Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP),
        ("gray16.tiff", Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP),
        ("gray16.pgm", Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP),
        ("bits.png", Image.fromarray(RAMP > 127), np.where(RAMP > 127, 255, 0)),
        ("palette.png", Image.fromarray(RAMP).convert("P"), RAMP),
        ("alpha.png", Image.fromarray(np.stack([RAMP, np.full_like(RAMP, 255)], -1), "LA"), RAMP),
        ("clear.png", Image.fromarray(np.stack([RAMP, np.zeros_like(RAMP)], -1), "LA"), 255 + 0 * RAMP),
        ("rgb.webp", Image.fromarray(np.stack([RAMP] * 3, -1)), RAMP),
        ("rgba.png", Image.fromarray(np.stack([RAMP] * 3 + [0 * RAMP + 255], -1), "RGBA"), RAMP),
        ("cmyk.tiff", Image.fromarray(np.stack([0 * RAMP] * 3 + [255 - RAMP], -1), "CMYK"), RAMP),
        ("ycbcr.tiff", Image.fromarray(np.stack([RAMP, 0 * RAMP + 128, 0 * RAMP + 128], -1), "YCbCr"), RAMP),
    ],
)
def test_every_mode_has_its_own_right_values(tmp_path, name, picture, wanted):
    options = {"lossless": True} if name.endswith("webp") else {}
    picture.save(tmp_path / name, **options)
    found = np.asarray(file_picture(str(tmp_path), name).open()).astype(int)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - wanted[..., None]).max() <= 1


@pytest.mark.parametrize(("name", "dtype"), [("float.tiff", np.float32), ("integers.tiff", np.int32)])
def test_numbers_without_a_white_are_refused(tmp_path, name, dtype):
    Image.fromarray((RAMP / 255).astype(dtype)).save(tmp_path / name)
    with pytest.raises(PictureError, match=r"broken picture: .*of 32-bit numbers, mode [IF]: save it with 8"):
        file_picture(str(tmp_path), name).open()


def test_lab_is_refused(tmp_path):
    """Pillow's own conversion makes blue of a gray."""
    Image.new("LAB", (8, 8), (128, 0, 0)).save(tmp_path / "lab.tiff")
    with pytest.raises(PictureError, match="of mode LAB"):
        file_picture(str(tmp_path), "lab.tiff").open()
