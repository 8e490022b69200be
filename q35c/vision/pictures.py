"""Open pictures that may be hostile, and make them RGB.

What is opened: a path, the bytes of a file, a Pillow image, or a u8 or u16 array of rows, columns and channels. Pillow
alone would warn at 89 megapixels, refuse at 179, and decode what 10 kB of PNG say first: so the size is looked at before
anything is decoded, and a small file may not become a large picture.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, cast

import numpy as np

from q35c import arguments
from q35c.errors import MediaError, Q35CError
from q35c.vision.packages import pillow
from q35c.vision.sizes import check_aspect

MAX_PIXELS = 64 << 20  # as the cameras of telephones have them: 192 MiB as RGB
MAX_FILE_BYTES = 64 << 20
# Pillow knows forty formats, and runs other programs for some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Above so many bytes a picture must have at least a byte of file for so many of its own: photos have one for 2 to 40, white
# pages one for 200, what is made to burst memory one for 1000 (the most that deflate can do).
_SMALL_BYTES = 32 << 20
_MAX_EXPANSION = 256
# Every scan of a progressive JPEG passes over the whole picture, a second for 1000 megapixels; encoders write about ten.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 12 * MAX_PIXELS
_STRIP_PIXELS = 1 << 20
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_BANDS_OF_MODES = {"1": 1, "L": 1, "P": 1, "I": 4, "F": 4, "LA": 4, "PA": 4}
_SOURCES = "a path, the bytes of a file, a Pillow image or an array"
_HINT = f"{', '.join(FORMATS)} are read"


def read_rgb(source: Any, where: str = "image") -> Any:
    """Return a picture as a Pillow image in RGB: turned as its EXIF says, its first frame, over white where transparent.

    `where` names the picture in messages. Raises MediaError, or OptionError for a path that cannot be one.
    """
    image = open_picture(source, where)
    try:
        image.load()
        turned = pillow("PIL.ImageOps").exif_transpose(image)
        return to_rgb(turned)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them
        raise _unreadable(error, where) from None


def open_picture(source: Any, where: str = "image") -> Any:
    """Return a Pillow image, of a file not decoded yet, whose size is allowed. Raises MediaError or OptionError."""
    if isinstance(source, (str, os.PathLike)):
        source = read_file(source, where)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(cast(bytes, source)), where)
    if isinstance(source, np.ndarray):
        source = _from_array(cast(np.ndarray, source), where)
    if not isinstance(source, pillow().Image):
        raise MediaError("is no picture", where=where, expected=_SOURCES, got=type(source).__name__)
    _check_size(source, None, where)
    return source


def read_file(path: Any, where: str, most: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of a regular file. Raises MediaError for one that is missing or too large, OptionError for no path."""
    place = arguments.path(where, path)
    try:
        if not place.is_file():  # a device or a pipe might never end
            raise MediaError("no such file", where=where, got=place)
        return _read_bounded(place, most, where)
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}", where=where, got=place) from None


def _read_bounded(place: Path, most: int, where: str) -> bytes:
    with open(place, "rb") as file:
        data = file.read(most + 1)
    check_bytes(len(data), where, most)
    return data


def check_bytes(count: int, where: str, most: int = MAX_FILE_BYTES) -> None:
    """Refuse a file that is too large. Raises MediaError."""
    if count > most:
        raise MediaError("the file is too large", where=where, expected=f"at most {most} bytes")


def _open_bytes(data: bytes, where: str) -> Any:
    check_bytes(len(data), where)
    try:
        image = pillow().open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error, where) from None
    _check_size(image, len(data), where)
    _check_scans(image, data, where)
    return image


def _check_scans(image: Any, data: bytes, where: str) -> None:
    """Refuse a JPEG that says the same thing over and over."""
    if image.format != "JPEG":
        return
    width, height = image.size
    most = min(_MAX_SCANS, _MAX_SCANNED_PIXELS // (width * height))
    if (found := data.count(b"\xff\xda")) > most:
        raise MediaError("too many scans", where=where, expected=f"at most {most}", got=found)


def _unreadable(error: Exception, where: str) -> Exception:
    if isinstance(error, Q35CError):
        return error
    kind = pillow()
    if isinstance(error, getattr(kind, "UnidentifiedImageError", ())):
        return MediaError("is no picture of a known format", where=where, hint=_HINT)
    return MediaError(
        "the picture cannot be decoded", where=where, got=f"{error!s:.200}", hint=_HINT
    )


def _check_size(image: Any, file_bytes: int | None, where: str) -> None:
    """Refuse a picture that is empty, has absurd sides, or would take more memory than its file promises."""
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError("the picture is empty", where=where, got=f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise MediaError(
            "the picture is too large",
            where=where,
            expected=f"at most {MAX_PIXELS} pixels",
            got=f"{width} x {height} pixels",
            hint="make it smaller",
        )
    check_aspect(height, width, where)
    decoded = width * height * _BANDS_OF_MODES.get(image.mode, len(image.mode))
    if file_bytes is not None and decoded > max(_SMALL_BYTES, _MAX_EXPANSION * file_bytes):
        raise MediaError(
            "a small file of a large picture",
            where=where,
            expected=f"at least a byte for {_MAX_EXPANSION} of the picture",
            got=f"{file_bytes} bytes of {width} x {height} pixels",
            hint="make the picture smaller",
        )


def _from_array(array: np.ndarray, where: str) -> Any:
    """Return rows, columns and 1, 3 or 4 channels as a Pillow image."""
    is_image = array.dtype.str[1:] in ("u1", "u2") and array.ndim in (2, 3)
    if is_image and array.ndim == 3:
        is_image = array.shape[2] in (1, 3, 4)
    if not is_image:
        raise MediaError(
            "the array is no picture",
            where=where,
            expected="u8 or u16 [rows, columns] or [rows, columns, 1, 3 or 4 channels]",
            got=f"{array.dtype} {list(array.shape)}",
            hint="multiply values from 0 to 1 by 255, and move the channels to the end",
        )
    if array.itemsize == 2:
        array = _to_bytes(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape:
        raise MediaError("the picture is empty", where=where, got=f"{list(array.shape)}")
    return pillow().fromarray(np.ascontiguousarray(array))


def _to_bytes(sixteen: np.ndarray) -> np.ndarray:
    """Return 16-bit values as 8-bit ones, rounded: 65535 is 255 * 257."""
    return ((sixteen.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_rgb(image: Any) -> Any:
    """Return a loaded Pillow image in RGB, composited over white where it is transparent.

    Pillow would clip 16-bit grey at 255, which leaves a white page: it is scaled instead.
    """
    if image.mode in _SIXTEEN_BITS:
        image = pillow().fromarray(_to_bytes(np.asarray(image)))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Any) -> Any:
    """Composite strip by strip: at no time are there two more pictures of four channels."""
    module = pillow()
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    result = module.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        white = module.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(module.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result
