"""Files made to harm whoever opens them: pictures and clips, each with what must become of it.

`python -m tests.vision.hostile` opens them all in this process and prints seconds and peak memory of each as JSON.
"""

from __future__ import annotations

import json
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from q35c.errors import Q35CError
from q35c.vision.clips import clip_frames
from q35c.vision.parameters import ImageLimits, VideoLimits, VisionParameters
from q35c.vision.patches import image_frame
from tests.vision.clips import clip
from tests.vision.pictures import animation, encoded, photo, turned

# Small outputs, so that what is measured is what opening takes.
PARAMETERS = VisionParameters(image=ImageLimits(1024, 65536), video=VideoLimits(4096, 1 << 20))
READ = "read"


@dataclass(frozen=True)
class Case:
    """A file, and a word of the message that refuses it, or READ where it is a picture like others."""

    name: str
    is_clip: bool
    data: Callable[[], bytes]
    outcome: str


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int,
    height: int,
    depth: int = 8,
    colour: int = 0,
    body: bytes | None = None,
    *extra: bytes,
) -> bytes:
    """Return a PNG, black unless `body` says what its compressed data are; `extra` chunks come before it."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if body is None:
        body = squeezed((1 + (width * bits + 7) // 8) * height)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def squeezed(count: int) -> bytes:
    """Return so many zeros as deflate packs them, a thousand to one."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [
        packer.compress(block[: min(len(block), count - at)]) for at in range(0, count, len(block))
    ]
    return b"".join([*parts, packer.flush()])


def ordinary(form: str = "PNG", **options: object) -> bytes:
    return encoded(photo(), form, **options)


def resized_jpeg(width: int, height: int) -> bytes:
    """Return a JPEG whose header lies about its size."""
    data = bytearray(ordinary("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(side: int, count: int) -> bytes:
    """Return a progressive JPEG that refines the same thing over and over."""
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * count + data[end:]


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(ordinary("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def long_gif(frames: int) -> bytes:
    """Return an animation that repeats its second frame."""
    data = animation("GIF")
    starts = [at for at in range(len(data)) if data.startswith(b"!\xf9\x04", at)]
    return data[: starts[2]] + data[starts[1] : starts[2]] * frames + b";"


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(ordinary("WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28
    data[at : at + 4] = (bits | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(data)


def bmp_of(width: int, height: int, compression: int = 0, bits: int = 8) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 256, 0)
    body = header + bytes(1024) + b"\xff\x00" * 64
    return b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + 40 + 1024) + body


def looping_exif() -> bytes:
    """Return a JPEG whose EXIF directory names itself as the next."""
    entry = struct.pack(">HHII", 0x8769, 4, 1, 8)
    exif = (
        b"Exif\0\0MM\0*"
        + struct.pack(">I", 8)
        + struct.pack(">H", 1)
        + entry
        + struct.pack(">I", 8)
    )
    data = ordinary("JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def svg() -> bytes:
    return b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


def pictures() -> Iterator[tuple[str, Callable[[], bytes], str]]:
    other = "no picture of a known format"
    yield "PNG bomb 9000 x 9000", lambda: png(9000, 9000), "too large"
    yield "PNG bomb 30000 x 30000 of one bit", lambda: png(30000, 30000, 1), "picture"
    yield "PNG bomb below the limit of pixels", lambda: png(7900, 7900, 8, 2), "small file"
    yield "PNG bomb of four channels", lambda: png(4000, 4000, 8, 6), "small file"
    yield "PNG bomb of 16 bits", lambda: png(6000, 6000, 16), "small file"
    yield "PNG of 2 ** 31 - 1 a side", lambda: png(2**31 - 1, 2**31 - 1, body=b""), "picture"
    yield "PNG of nothing", lambda: png(0, 5, body=b""), "picture"
    yield "PNG without height", lambda: png(5, 0, body=b""), "picture"
    yield "PNG 1 x 300000", lambda: png(1, 300_000), "sides differ"
    yield (
        "PNG with less data than it says",
        lambda: png(900, 900, body=squeezed(5)),
        "cannot be decoded",
    )
    yield "PNG with much more data than it says", lambda: png(64, 64, body=squeezed(1 << 28)), READ
    yield "PNG of garbage", lambda: png(64, 64, body=b"garbage" * 99), "cannot be decoded"
    yield "PNG cut off", lambda: ordinary()[:-500], "cannot be decoded"
    yield (
        "PNG with a broken checksum",
        lambda: ordinary().replace(b"IDAT", b"IDAU"),
        other,
    )
    yield (
        "PNG with a bomb of text",
        lambda: png(8, 8, 8, 0, None, chunk(b"zTXt", b"a\0\0" + squeezed(1 << 28))),
        "cannot|no picture",
    )
    yield (
        "PNG with bombs of text",
        lambda: png(8, 8, 8, 0, None, *[chunk(b"zTXt", b"a\0\0" + squeezed(1 << 20))] * 90),
        "cannot|no picture",
    )
    yield (
        "PNG with a bomb of a profile",
        lambda: png(8, 8, 8, 0, None, chunk(b"iCCP", b"a\0\0" + squeezed(1 << 28))),
        f"cannot|no picture|{READ}",
    )
    yield "PNG of a palette without one", lambda: png(64, 64, 8, 3), READ
    yield "JPEG cut off", lambda: ordinary("JPEG")[:-300], "cannot be decoded"
    yield "JPEG of 65500 a side", lambda: resized_jpeg(65500, 65500), "picture"
    yield "JPEG of 8000 a side in a small file", lambda: resized_jpeg(8000, 8000), "small file"
    yield "JPEG with thousands of scans", lambda: many_scans(64, 5000), "too many scans"
    yield "JPEG with many scans of many pixels", lambda: many_scans(5000, 60), "too many scans"
    yield "JPEG without a scan", lambda: ordinary("JPEG").split(b"\xff\xda")[0], "no picture|cannot"
    yield "JPEG with garbage behind", lambda: ordinary("JPEG") + b"\0" * 4096, READ
    yield "JPEG turned as nothing knows", lambda: turned(9), READ
    yield "JPEG whose EXIF loops", looping_exif, READ
    yield "GIF with a canvas of 65535 a side", lambda: gif_of(65535, 65535), "picture"
    yield "GIF whose frame leaves the canvas", lambda: gif_of(20, 20), f"cannot|{READ}"
    yield "GIF of 5000 frames", lambda: long_gif(5000), READ
    yield "GIF cut off", lambda: ordinary("GIF")[:-400], "cannot be decoded"
    yield "WebP of 16383 a side", lambda: webp_of(16383, 16383), "picture"
    yield "WebP larger than its data", lambda: webp_of(3000, 3000), "cannot|no picture"
    yield "WebP cut off", lambda: ordinary("WEBP")[:-300], "cannot|no picture"
    yield "BMP of 2 ** 31 a side", lambda: bmp_of(2**31 - 1, 2**31 - 1), "picture"
    yield "BMP of 60000 rows of runs", lambda: bmp_of(60000, 60000, 1), "picture"
    yield "BMP of runs that end early", lambda: bmp_of(1000, 1000, 1), f"cannot|{READ}"
    yield "BMP of negative width", lambda: bmp_of(-100, 100), "picture"
    yield "TIFF", lambda: ordinary("TIFF"), other
    yield "EPS, for which another program would be run", lambda: ordinary("EPS"), other
    yield "SVG that names a file", svg, other
    yield "PDF", lambda: ordinary("PDF"), other
    yield "ICO", lambda: ordinary("ICO"), other
    yield "JPEG 2000", lambda: ordinary("JPEG2000"), other
    yield "nothing", lambda: b"", other
    yield "text", lambda: b"hello" * 1000, other
    yield "64 MiB and a byte", lambda: bytes((64 << 20) + 1), "too large"


def h264(**options: object) -> bytes:
    return clip("mp4", "libx264", "yuv420p", **{"count": 8, **options})  # type: ignore[arg-type]


def patched(data: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """Return a file with bytes replaced, so far behind a name."""
    at = data.index(name) + len(name) + offset
    return data[:at] + value + data[at + len(value) :]


def endless(frames: int) -> bytes:
    """Return a Matroska clip that goes on and on with empty frames."""
    data = clip("matroska", "mjpeg", "yuvj420p", count=2, shape=(64, 64), live="1")
    cluster = b"\x1f\x43\xb6\x75\x01\xff\xff\xff\xff\xff\xff\xff\xe7\x81\x00"  # of unknown size, at time 0
    block = b"\xa3\x86\x81\x00\x00\x80\xff\xd8"  # a simple block of two bytes
    return data + cluster + block * frames


def wav() -> bytes:
    body = bytes(8000)
    form = struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", len(body))
        + body
    )


def clips() -> Iterator[tuple[str, Callable[[], bytes], str]]:
    closed = "cannot be decoded"
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    yield "a playlist that names a file", lambda: playlist, closed
    yield (
        "a script that names a file",
        lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        closed,
    )
    yield (
        "a session that names a host",
        lambda: (
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
        ),
        closed,
    )
    yield (
        "a manifest that names a host",
        lambda: (
            b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1/</BaseURL></MPD>'
        ),
        closed,
    )
    yield "an SVG", svg, closed
    yield "a PNG", ordinary, closed
    yield "sound alone", wav, closed
    yield "no bytes", lambda: b"", closed
    yield "zeros", lambda: bytes(1 << 20), closed
    yield "an MP4 cut off", lambda: h264()[:-600], "cannot|no pictures"
    yield "an MP4 of zeros behind its first box", lambda: h264()[:48] + bytes(4096), closed
    yield (
        "an MP4 that promises 2 ** 32 - 1 samples",
        lambda: patched(h264(), b"stsz", 8, b"\xff\xff\xff\xff"),
        f"cannot|frames|{READ}",
    )
    yield (
        "an MP4 whose samples last for ever",
        lambda: patched(h264(), b"stts", 12, b"\xff\xff\xff\xff"),
        f"cannot|rate|{READ}",
    )
    yield (
        "an MP4 of samples without end in its table",
        lambda: patched(h264(), b"stts", 4, b"\xff\xff\xff\xff"),
        f"cannot|rate|{READ}",
    )
    yield (
        "an MP4 with frames of 16384 x 16384 on its label",
        lambda: patched(h264(), b"avc1", 24, b"\x40\x00\x40\x00"),
        f"cannot|size|{READ}",
    )
    yield "an MP4 with absurd sides", lambda: h264(shape=(16, 3600)), "sides differ"
    yield (
        "an MP4 whose pictures are garbage",
        lambda: patched(h264(), b"mdat", 60, b"\x5a" * 900),
        f"cannot|more frames|{READ}",
    )
    yield (
        "an AVI that promises four thousand million frames",
        lambda: patched(clip("avi", "mpeg4", "yuv420p", count=8), b"avih", 20, b"\xff\xff\xff\xff"),
        READ,
    )
    yield (
        "an AVI of a codec that is not taken",
        lambda: clip("avi", "ffv1", "yuv420p", count=8),
        "cannot|unknown codec",
    )
    yield "a Matroska that never ends", lambda: endless(400_000), "too many frames|cannot"
    yield "a GIF of 5000 frames", lambda: long_gif(5000), READ
    yield "a GIF with a canvas of 65535 a side", lambda: gif_of(65535, 65535), "cannot|size"
    yield "one frame", lambda: h264(count=1), "more frames"
    yield (
        "a transport stream of noise",
        lambda: b"".join(
            b"G" + bytes(np.random.default_rng(n).integers(0, 255, 187, np.uint8))
            for n in range(4000)
        ),
        closed,
    )


def cases() -> list[Case]:
    drawn = [Case(name, False, data, outcome) for name, data, outcome in pictures()]
    return drawn + [Case(name, True, data, outcome) for name, data, outcome in clips()]


def open_case(case: Case, data: bytes) -> str:
    """Open one, and return the message that refuses it, or READ."""
    try:
        if case.is_clip:
            clip_frames(data, PARAMETERS)
        else:
            image_frame(data, PARAMETERS)
    except Q35CError as error:
        return f"{type(error).__name__}: {error}"
    return READ


def _memory(name: str) -> int:
    """Return a figure of this process in bytes: VmRSS, or VmHWM, the most since it was reset."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(name))


def main() -> None:
    """Print a line of JSON for each case."""
    image_frame(ordinary(), PARAMETERS), clip_frames(h264(), PARAMETERS)  # imports are no case's
    for case in cases():
        data = case.data()
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before, start = _memory("VmRSS"), time.perf_counter()
        outcome = open_case(case, data)
        seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
        line = {
            "name": case.name,
            "outcome": outcome,
            "seconds": round(seconds, 4),
            "peak_bytes": peak,
        }
        print(json.dumps(line))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
