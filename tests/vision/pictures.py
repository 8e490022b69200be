"""Pictures of every kind, drawn here: no files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 274  # of EXIF


def drawn(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return u8 [height, width, channels]: smooth, with edges and noise, harder than each alone."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + c) * 60 + np.cos(y / 11 - c) * 60 + 128 for c in range(channels)]
    base = np.stack(waves, -1)
    base[(x // 23 + y // 17) % 5 == 0] = 255
    noise = np.random.default_rng(seed).normal(0, 8, base.shape)
    return np.clip(base + noise, 0, 255).astype(np.uint8)


def photo(height: int = 61, width: int = 87, channels: int = 3) -> Image.Image:
    return Image.fromarray(drawn(height, width, channels).squeeze())


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    """Return a JPEG whose EXIF says how it is to be turned."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(photo(), "JPEG", quality=95, exif=exif)


def animation(form: str) -> bytes:
    frames = [photo(50 + n, 64).crop((0, 0, 64, 50)).rotate(90 * n) for n in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=90)


SIZES = [
    (1, 1), (1, 200), (200, 1), (37, 41), (48, 80), (80, 48), (31, 33), (256, 256), (32, 2048), (333, 517), (480, 640),
    (1200, 900),
]  # fmt: skip


def objects() -> Iterator[tuple[str, Image.Image]]:
    """Yield Pillow images of all modes that the reference reads as we do."""
    for height, width in SIZES:
        yield f"RGB {height} x {width}", photo(height, width)
    grey, four = photo(channels=1), photo(channels=4)
    yield "1", grey.convert("1")
    yield "L", grey
    yield "LA", four.convert("LA")
    yield "RGBA", four
    yield "RGBa", four.convert("RGBa")
    yield "RGBX", photo().convert("RGBX")
    yield "P", photo().quantize(64)
    yield "PA", four.convert("PA")
    yield "CMYK", photo().convert("CMYK")
    yield "YCbCr", photo().convert("YCbCr")
    yield "LAB", Image.merge("LAB", photo().split())
    yield "HSV", photo().convert("HSV")
    yield "I", Image.fromarray(drawn(61, 87, 1)[..., 0].astype(np.int32) * 2 - 90)
    yield "F", Image.fromarray(drawn(61, 87, 1)[..., 0].astype(np.float32) * 1.3 - 20)


def files() -> Iterator[tuple[str, bytes]]:
    """Yield files of all formats that are read."""
    picture, four = photo(), photo(channels=4)
    yield "PNG", encoded(picture, "PNG")
    yield "PNG of grey", encoded(photo(channels=1), "PNG")
    yield "PNG of one bit", encoded(photo(channels=1).convert("1"), "PNG")
    yield "PNG with alpha", encoded(four, "PNG")
    yield "PNG of grey with alpha", encoded(four.convert("LA"), "PNG")
    yield "PNG palette", encoded(picture.quantize(16), "PNG")
    yield "PNG palette, one index clear", encoded(picture.quantize(64), "PNG", transparency=3)
    shades = bytes(range(0, 256, 4))
    yield "PNG palette with alphas", encoded(picture.quantize(64), "PNG", transparency=shades)
    yield "PNG with a clear colour", encoded(picture, "PNG", transparency=(255, 255, 255))
    yield "PNG of grey with a clear shade", encoded(photo(channels=1), "PNG", transparency=255)
    yield "JPEG", encoded(picture, "JPEG", quality=90)
    yield "JPEG progressive", encoded(picture, "JPEG", quality=90, progressive=True)
    yield "JPEG of grey", encoded(photo(channels=1), "JPEG")
    yield "JPEG in CMYK", encoded(picture.convert("CMYK"), "JPEG", quality=95)
    yield "WebP", encoded(picture, "WEBP")
    yield "WebP lossless with alpha", encoded(four, "WEBP", lossless=True)
    yield "GIF", encoded(picture, "GIF")
    yield "GIF with a clear index", encoded(picture.quantize(32), "GIF", transparency=5)
    yield "GIF animation", animation("GIF")
    yield "WebP animation", animation("WEBP")
    yield "PNG animation", animation("PNG")
    yield "BMP", encoded(picture, "BMP")
    yield "BMP of a palette", encoded(picture.quantize(200), "BMP")
