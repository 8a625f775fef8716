"""Every mode Pillow opens: its own values as people see them, or a refusal that the readers count."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from training.readers.pictures import Picture, PictureError, to_rgb

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
COLOURS = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], axis=-1)
GREY = np.stack([RAMP] * 3, axis=-1)
LEFT = np.indices(RAMP.shape)[1] < 128


def on_white(picture: np.ndarray) -> np.ndarray:
    """Its left half seen through."""
    return np.where(LEFT[..., None], 255, picture)


def opened(path: Path) -> np.ndarray:
    return np.asarray(Picture(str(path), "key").open()).astype(int)


def lab(picture: Image.Image) -> Image.Image:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    return ImageCms.applyTransform(picture, to_lab)


def with_alpha(picture: Image.Image, mode: str) -> Image.Image:
    picture = picture.convert(mode)
    picture.putalpha(Image.fromarray(np.where(LEFT, 0, 255).astype(np.uint8)))
    return picture


def make(mode: str) -> tuple[Image.Image, np.ndarray, int]:
    """A picture in this mode, what it shows, and how far the mode's own precision may be off."""
    colours, grey = Image.fromarray(COLOURS), Image.fromarray(RAMP)
    if mode == "LAB":
        soft = COLOURS // 2 + 64  # between the most vivid colours a step of L, a or b is many of red
        return lab(Image.fromarray(soft)), soft, 6
    if mode == "1":
        black_and_white = np.where(LEFT, 0, 255).astype(np.uint8)
        return Image.fromarray(black_and_white).convert("1"), np.stack([black_and_white] * 3, -1), 0
    if mode == "LA":
        return with_alpha(grey, "LA"), on_white(GREY), 0
    if mode == "PA":
        return with_alpha(grey, "P").convert("PA"), on_white(GREY), 0
    if mode == "RGBA":
        return with_alpha(colours, "RGBA"), on_white(COLOURS), 0
    if mode in ("L", "P"):
        return grey.convert(mode), GREY, 0
    return colours.convert(mode), COLOURS, 3


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *((mode, "p.png") for mode in ("1", "L", "P", "LA", "RGB", "RGBA")),
        *((mode, "p.tiff") for mode in ("1", "L", "P", "LA", "PA", "RGB", "RGBA")),
        *((mode, "p.tiff") for mode in ("CMYK", "YCbCr", "LAB")),
    ],
)
def test_eight_bits(tmp_path: Path, mode: str, name: str):
    picture, wanted, tolerance = make(mode)
    picture.save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
    assert np.abs(opened(tmp_path / name) - wanted).max() <= tolerance


@pytest.mark.parametrize("mode", ["HSV", "RGBX"])
def test_modes_of_no_file(mode: str):
    picture = Image.fromarray(COLOURS).convert(mode)
    assert np.abs(np.asarray(to_rgb(picture)).astype(int) - COLOURS).max() <= 6


DEEP = RAMP.astype(np.uint16) * 257


def write_tiff(path: Path, values: np.ndarray, bits: int, photometric: int, order: str) -> None:
    """One strip of packed grey, written by hand: Pillow writes neither 12 bits nor white as 0."""
    if bits == 12:
        first, second = values.reshape(-1, 2).T.astype(np.uint32)
        packed = first << 12 | second
        data = b"".join(int(value).to_bytes(3, "big") for value in packed)
    else:
        data = values.astype(f"{order}u2").tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data))]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", 8 + len(data)) + data
    path.write_bytes(head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("bits", "photometric", "order"), [(16, 1, "<"), (16, 1, ">"), (16, 0, "<"), (12, 1, "<")]
)
def test_deep_grey_tiff(tmp_path: Path, bits: int, photometric: int, order: str):
    values = DEEP if bits == 16 else np.rint(DEEP / 65535 * 4095).astype(np.uint16)
    values = 2**bits - 1 - values if photometric == 0 else values
    write_tiff(tmp_path / "p.tiff", values, bits, photometric, order)
    with Image.open(tmp_path / "p.tiff") as image:
        assert image.mode == ("I;16B" if order == ">" else "I;16")
    assert np.array_equal(opened(tmp_path / "p.tiff"), GREY)


@pytest.mark.parametrize("name", ["p.png", "p.jp2", "p.pgm"])
def test_deep_grey_of_other_formats(tmp_path: Path, name: str):
    if name == "p.pgm":
        (tmp_path / name).write_bytes(b"P5 256 4 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP).save(tmp_path / name)
    assert np.abs(opened(tmp_path / name) - GREY).max() <= (name == "p.jp2")


def test_deep_grey_with_a_transparent_value(tmp_path: Path):
    Image.fromarray(DEEP).save(tmp_path / "p.png", transparency=100 * 257)
    wanted = np.where(GREY == 100, 255, GREY)
    assert np.array_equal(opened(tmp_path / "p.png"), wanted)


def test_deep_grey_lies_as_its_exif_says(tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(DEEP).save(tmp_path / "p.png", exif=exif)
    assert np.array_equal(opened(tmp_path / "p.png"), GREY[::-1, ::-1])


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("F", RAMP.astype(np.float32) / 255),
        ("F", RAMP.astype(np.float32)),
        ("I", RAMP.astype(np.int32)),
        ("I", DEEP.astype(np.int32) - 30000),
    ],
)
def test_a_white_nobody_states_is_refused(tmp_path: Path, mode: str, values: np.ndarray):
    Image.fromarray(values).save(tmp_path / "p.tiff")
    with pytest.raises(
        PictureError, match=rf"broken picture: .*p\.tiff \(mode {mode} has no stated white: save"
    ):
        opened(tmp_path / "p.tiff")
