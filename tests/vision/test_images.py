"""Pictures become the patches that transformers makes of them, bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from q35c.errors import MediaError
from q35c.vision.parameters import VisionParameters
from q35c.vision.patches import cut, image_frame
from q35c.vision.pictures import read_rgb
from tests.vision.pictures import drawn, encoded, files, objects, photo, turned
from tests.vision.reference import PARAMETERS, reference_image

OBJECTS, FILES = dict(objects()), dict(files())


def check(source: Any, reference: Image.Image) -> None:
    frame = image_frame(source, PARAMETERS)
    patches, rows, columns = reference_image(reference)
    assert (frame.rows, frame.columns) == (rows, columns)
    assert np.array_equal(frame.patches, patches)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_pillow_image_of_any_mode_is_as_in_the_reference(name: str) -> None:
    check(OBJECTS[name], OBJECTS[name])


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_format_is_as_in_the_reference(name: str) -> None:
    check(FILES[name], Image.open(io.BytesIO(FILES[name])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_upright(orientation: int) -> None:
    data = turned(orientation)
    check(data, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def test_an_orientation_turns_as_it_should() -> None:
    upright = np.asarray(read_rgb(turned(1)))
    lying = np.asarray(read_rgb(turned(6)))
    assert np.array_equal(lying, np.rot90(upright, -1))


@pytest.mark.parametrize("name", ["JPEG", "PNG palette, one index clear"])
def test_paths_bytes_and_objects_give_the_same(name: str, tmp_path: Path) -> None:
    place = tmp_path / "picture"
    place.write_bytes(FILES[name])
    want = np.asarray(read_rgb(FILES[name]))
    sources = (
        place,
        str(place),
        bytearray(FILES[name]),
        memoryview(FILES[name]),
        Image.open(place),
    )
    for source in sources:
        assert np.array_equal(np.asarray(read_rgb(source)), want)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_array_is_a_picture(channels: int) -> None:
    array = drawn(61, 87, channels)
    check(array, Image.fromarray(array.squeeze()))


def test_an_array_without_channels_is_grey() -> None:
    array = drawn(61, 87, 1)
    grey = np.asarray(read_rgb(array[:, :, 0]))
    assert np.array_equal(grey, np.repeat(array, 3, 2))


def test_transparency_lies_over_white() -> None:
    four = np.zeros((40, 40, 4), np.uint8)
    four[20:, :, 3] = 255
    rgb = np.asarray(read_rgb(four))
    assert (rgb[:20] == 255).all() and (rgb[20:] == 0).all()


def test_strips_of_a_large_transparent_picture_fit_together() -> None:
    four = photo(1100, 1300, 4)
    white = Image.new("RGBA", four.size, (255, 255, 255, 255))
    want = np.asarray(Image.alpha_composite(white, four).convert("RGB"))
    assert np.array_equal(np.asarray(read_rgb(four)), want)


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled(byte_order: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(byte_order).reshape(64, 64)
    want = np.rint(ramp / 257.0)
    for source in (ramp, encoded(Image.fromarray(ramp.astype("<u2")), "PNG")):
        got = np.asarray(read_rgb(source))
        assert np.array_equal(got, np.repeat(want[..., None], 3, 2).astype(np.uint8))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "no picture of a known format"),
        (b"GIF89a", "no picture of a known format"),
        (FILES["PNG"][:-900], "cannot be decoded"),
        (FILES["JPEG"][:-900], "cannot be decoded"),
        (b"%PDF-1.7", "no picture of a known format"),
        (np.zeros((4, 4), np.float32), "no picture"),
        (np.zeros((3, 40, 40), np.uint8), "no picture"),
        (np.zeros((0, 40, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 9)), "empty"),
        (7, "no picture"),
        (Path("nowhere.png"), "no such file"),
        (Path("/dev/zero"), "no such file"),
        (drawn(2, 402), "sides differ too much"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        image_frame(source, PARAMETERS)


def test_frames_that_fit_no_patches_are_refused() -> None:
    with pytest.raises(MediaError, match="multiple"):
        cut([drawn(33, 64)] * 2, VisionParameters())


def test_a_patch_holds_channel_frame_row_column_and_a_token_its_four() -> None:
    code = np.arange(64 * 96 * 3, dtype=np.uint32).reshape(64, 96, 3)
    frames = [(code * factor % 251).astype(np.uint8) for factor in (1, 7)]
    made = cut(frames, VisionParameters()).patches.reshape(2, 3, 2, 2, 3, 2, 16, 16)
    for block_row, block, my, mx, channel, depth, y, x in np.random.default_rng(0).integers(
        0, made.shape, (200, 8)
    ):
        row, column = (block_row * 2 + my) * 16 + y, (block * 2 + mx) * 16 + x
        got = made[block_row, block, my, mx, channel, depth, y, x]
        assert got == frames[depth][row, column, channel]
