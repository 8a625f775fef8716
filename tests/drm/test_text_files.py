"""One reader of text: UTF-8 with or without a byte order mark; everything else is refused by its line."""

from pathlib import Path

import pytest

from drm.text_files import EncodingError, read_text, text_lines

TEXT = "# Käse\r\n猫と家\n\nlast line"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8(tmp_path: Path, encoding: str):
    (tmp_path / "t.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "t.txt") == TEXT
    assert list(text_lines(tmp_path / "t.txt")) == TEXT.splitlines(keepends=True)


def test_a_mark_inside_the_file_is_text(tmp_path: Path):
    (tmp_path / "t.txt").write_text("a\n\ufeffb", encoding="utf-8")
    assert read_text(tmp_path / "t.txt") == "a\n\ufeffb"


@pytest.mark.parametrize(
    ("text", "encoding", "line"),
    [
        ("plain\nKäse", "cp1252", 2),
        ("plain\n\n一只猫坐在房子前面", "gbk", 3),
        ("plain", "utf-16", 1),
        ("plain", "utf-16-le", 1),
        ("plain", "utf-16-be", 1),
        ("plain", "utf-32", 1),
    ],
)
def test_other_encodings(tmp_path: Path, text: str, encoding: str, line: int):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(EncodingError, match=rf"t\.txt, line {line} is not UTF-8 text \(byte 0x..\): save"):
        read_text(path)


def test_an_empty_file(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf")
    assert read_text(tmp_path / "t.txt") == ""
