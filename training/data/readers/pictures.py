"""Pictures where the published sets keep them: files below a folder, or bytes in a parquet column.

Nothing is read before `open`. A parquet column is walked forwards, a page and a few rows in memory at a time,
so pictures opened in the order of their rows cost one pass over the file.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import io
import itertools
import os
import struct
import threading
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError)
BROKEN = (*_BROKEN, struct.error, zlib.error, Image.DecompressionBombError)
ROWS_AT_ONCE = 16
OPEN_COLUMNS = 8


class PictureError(ValueError):
    """The picture cannot be used; the message is `kind: which one`."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright as its EXIF says, in RGB, on white where it is transparent.

    16-bit gray becomes 8-bit. ValueError for 32-bit numbers, whole (mode I) or not (F), of which nobody knows
    which is white, and for LAB.
    """
    kind = image.format
    image = ImageOps.exif_transpose(image)
    # Pillow before 11.3 reads the 16-bit gray of PNG and PGM as I.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"of 32-bit numbers, mode {image.mode}: save it with 8 or 16 bits")
    if image.mode == "LAB":
        raise ValueError("of mode LAB, which Pillow turns into other colours: save it as RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


class _Column:
    """One binary column of a parquet file, read forwards; going back starts the row group again."""

    def __init__(self, path: str, column: str) -> None:
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        groups = range(self.file.metadata.num_row_groups)
        rows = (self.file.metadata.row_group(group).num_rows for group in groups)
        self.ends = [0, *itertools.accumulate(rows)]
        self.column, self.group, self.first, self.last = column, -1, 0, 0

    def read(self, row: int) -> bytes | None:
        group = bisect.bisect_right(self.ends, row) - 1
        if group != self.group or row < self.first:
            self.batches = self.file.iter_batches(ROWS_AT_ONCE, [group], [self.column])
            self.group, self.first, self.last = group, self.ends[group], self.ends[group]
        while row >= self.last:
            batch = next(self.batches)
            self.first, self.last = self.last, self.last + batch.num_rows
            self.values = batch.column(0)
        value = self.values[row - self.first].as_py()
        return next(iter(value.values())) if isinstance(value, dict) else value  # {"bytes": ...} of an Image


_local = threading.local()


def _open_column(path: str, column: str) -> _Column:
    """The thread's own reader of the column; the ones not used for longest are closed."""
    if getattr(_local, "pid", None) != os.getpid():  # a forked worker shares nothing with its parent
        _local.pid, _local.columns = os.getpid(), collections.OrderedDict()
    columns = _local.columns
    if (path, column) not in columns:
        columns[path, column] = _Column(path, column)
        if len(columns) > OPEN_COLUMNS:
            columns.popitem(last=False)
    columns.move_to_end((path, column))
    return columns[path, column]


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A picture file, or with `column` the one in that row of a parquet file. Equal pictures, equal key."""

    path: str
    key: str
    column: str | None = None
    row: int = 0

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.path if self.column is None else f"{self.path}:{self.row}:{self.column}"

    def open(self) -> Image.Image:
        """The decoded RGB picture; PictureError when it is missing, empty, cut short or no picture."""
        try:
            with Image.open(self._source()) as image:
                return to_rgb(image)
        except PictureError:
            raise
        except FileNotFoundError as error:
            raise PictureError(f"missing file: {self.name}") from error
        except UnidentifiedImageError as error:
            raise PictureError(f"broken picture: {self.name} (of no known format)") from error
        except BROKEN as error:
            what = " ".join(str(error).split())[:120]
            raise PictureError(f"broken picture: {self.name} ({what or type(error).__name__})") from error

    def _source(self) -> str | io.BytesIO:
        if self.column is None:
            return self.path
        data = _open_column(self.path, self.column).read(self.row)
        if not data:
            raise PictureError(f"empty picture: {self.name}")
        return io.BytesIO(data)


def _leaves(name: str) -> bool:
    """Whether a published path is absolute or climbs, on Windows or elsewhere."""
    name = name.replace("\\", "/")
    return name.startswith("/") or name[1:2] == ":" or ".." in name.split("/") or "\0" in name


def file_picture(root: str, name: object) -> Picture:
    """The picture called `name` below `root`; PictureError when it is not there or would lie outside."""
    if not isinstance(name, str) or not name:
        raise PictureError(f"no path: {name!r}")
    if _leaves(name):
        raise PictureError(f"path outside the images folder: {name!r}")
    path = os.path.normpath(os.path.join(root, name))
    if not os.path.isfile(path):
        raise PictureError(f"missing file: {name}")
    return Picture(path, f"file:{path}")
