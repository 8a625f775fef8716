"""The text files people write and download: UTF-8, with or without its byte order mark, and nothing else."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path


class EncodingError(ValueError):
    """The file is no UTF-8 text; the sentence names file, line and byte, and says what to do."""


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, read as they are asked for; EncodingError or OSError.

    A NUL byte is refused too: UTF-16 without its mark is valid UTF-8 full of them.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                text, wrong = line.decode(), line.find(b"\0")
            except UnicodeDecodeError as error:
                text, wrong = "", error.start
            if wrong >= 0:
                raise EncodingError(
                    f"{path}, line {number} is not UTF-8 text (byte 0x{line[wrong]:02x}):"
                    " save the file as UTF-8"
                )
            yield text


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file; EncodingError or OSError."""
    return "".join(text_lines(path))
