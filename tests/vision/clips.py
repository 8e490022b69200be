"""Clips of many kinds, drawn and encoded here."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np

from tests.vision.pictures import drawn

# Name -> container, codec, pixel format, options of `clip`.
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "MP4 H.264": ("mp4", "libx264", "yuv420p", {}),
    "MP4 H.264 of 29.97 a second": ("mp4", "libx264", "yuv420p", {"fps": Fraction(30000, 1001), "count": 95}),
    "MP4 HEVC": ("mp4", "libx265", "yuv420p", {"count": 20}),
    "MP4 AV1": ("mp4", "libsvtav1", "yuv420p", {"count": 20}),
    "MP4 MPEG-4": ("mp4", "mpeg4", "yuv420p", {}),
    "MOV of JPEGs": ("mov", "mjpeg", "yuvj420p", {"count": 11}),
    "WebM VP9": ("webm", "libvpx-vp9", "yuv420p", {"count": 30}),
    "WebM VP8": ("webm", "libvpx", "yuv420p", {}),
    "Matroska H.264": ("matroska", "libx264", "yuv420p", {}),
    "AVI MPEG-4": ("avi", "mpeg4", "yuv420p", {}),
    "MPEG-TS H.264": ("mpegts", "libx264", "yuv420p", {}),
    "GIF": ("gif", "gif", "rgb8", {"count": 20, "fps": 10}),
    "two frames": ("mp4", "libx264", "yuv420p", {"count": 2}),
    "three frames": ("mp4", "libx264", "yuv420p", {"count": 3}),
    "one a second": ("mp4", "libx264", "yuv420p", {"count": 9, "fps": 1}),
    "120 a second": ("mp4", "libx264", "yuv420p", {"count": 200, "fps": 120}),
    "tall": ("mp4", "libx264", "yuv420p", {"shape": (322, 34)}),
}  # fmt: skip


def frames(count: int, shape: tuple[int, int] = (96, 130)) -> np.ndarray:
    """Return u8 [count, rows, columns, 3]: a picture that moves and grows lighter."""
    picture = drawn(*shape)
    moved = [np.roll(picture, 2 * n, 1) // 2 + np.uint8(n % 120) for n in range(count)]
    return np.stack(moved)


def clip(
    container: str,
    codec: str,
    pixels: str,
    count: int = 50,
    shape: tuple[int, int] = (96, 130),
    fps: Any = 25,
    **options: str,
) -> bytes:
    """Return the bytes of a file. `shape` is rows and columns."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=fps, options={"preset": "9"} if "av1" in codec else {})
        stream.height, stream.width, stream.pix_fmt = *shape, pixels
        for picture in frames(count, shape):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                out.mux(packet)
        out.mux(stream.encode())
    return buffer.getvalue()


def kind(name: str) -> bytes:
    container, codec, pixels, options = KINDS[name]
    return clip(container, codec, pixels, **options)
