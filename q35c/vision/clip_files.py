"""Open the files of clips, which may be hostile, with libav.

Only common containers and codecs are opened, none of which names other files, and bytes come through a Python file: so libav
has no way to the network or the disk.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from q35c import arguments
from q35c.errors import MediaError, Q35CError
from q35c.vision.packages import pillow, pyav

FORMATS = "mov,matroska,webm,avi,mpegts,gif"
CODECS = "h264,hevc,vp8,vp9,av1,libdav1d,libvpx,libvpx-vp9,mpeg4,mjpeg,gif"
MAX_FILE_BYTES = 1 << 30
# Of one frame: decoders may keep 16 of them, 4096 x 2304 in 13.5 MiB each.
MAX_FRAME_PIXELS = 4096 * 2304
MAX_FRAMES = 1 << 18  # 2.4 hours at 30 a second
_PROBED_BYTES = 1 << 20
_TURNS = {90: "ROTATE_90", 180: "ROTATE_180", 270: "ROTATE_270"}
_HINT = "convert it to MP4 (H.264), or give its frames as pictures"


class ClipFile:
    """A clip in a file: a path or its bytes. `deadline` is a time of `time.monotonic`."""

    def __init__(self, source: Any, where: str, deadline: float) -> None:
        self._where, self._deadline = where, deadline
        self._file = _open_file(source, where)
        try:
            self._container = self._guarded(self._open)
            self._stream = self._guarded(self._find_stream)
        except BaseException:
            self._file.close()
            raise
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else math.nan
        if not 1e-3 <= self.fps <= 1e6:
            self.close()
            raise MediaError("the clip has no rate of frames", where=where, got=rate, hint=_HINT)

    def count(self) -> int:
        """Return how many frames there are, by the packets: containers may not say, or lie."""
        return self._guarded(self._count)

    def decode(self) -> Iterator[Callable[[], Any]]:
        """Yield, for each frame from the first on, what makes a Pillow image in RGB of it."""
        self._guarded(lambda: self._container.seek(0))
        frames = self._container.decode(self._stream)
        while (frame := self._guarded(lambda: next(frames, None))) is not None:
            self._check_time()
            yield lambda f=frame: self._guarded(lambda: _picture(f))

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> ClipFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> Any:
        return pyav().open(
            self._file,
            container_options={
                "format_whitelist": FORMATS,
                "codec_whitelist": CODECS,
                "protocol_whitelist": "",
                "probesize": str(_PROBED_BYTES),
                "max_streams": "32",
            },
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            metadata_errors="replace",
        )

    def _find_stream(self) -> Any:
        """Return the first stream of pictures, if its codec and size are allowed."""
        if not self._container.streams.video:
            raise MediaError("the clip holds no pictures", where=self._where, hint=_HINT)
        stream = self._container.streams.video[0]
        codec = stream.codec_context
        if codec is None or codec.name not in CODECS.split(","):
            name = None if codec is None else codec.name
            raise MediaError(
                "unknown codec", where=self._where, expected=CODECS, got=name, hint=_HINT
            )
        if not 0 < codec.width * codec.height <= MAX_FRAME_PIXELS:
            raise MediaError(
                "frames have no size that is allowed",
                where=self._where,
                expected=f"at most {MAX_FRAME_PIXELS} pixels",
                got=f"{codec.width} x {codec.height} pixels",
                hint="make it smaller",
            )
        return stream

    def _count(self) -> int:
        found = 0
        for packet in self._container.demux(self._stream):
            found += packet.size > 0 and not packet.is_discard
            if found > MAX_FRAMES:
                raise MediaError(
                    "too many frames",
                    where=self._where,
                    expected=f"at most {MAX_FRAMES}",
                    hint="cut it",
                )
            if found % 1024 == 0:
                self._check_time()
        return found

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise MediaError("reading the clip takes too long", where=self._where, hint="cut it")

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Call libav. Raises MediaError for whatever a damaged file makes it raise."""
        try:
            return call()
        except Exception as error:
            # libav raises a kind of MemoryError of its own where a file asks for absurd sizes.
            if isinstance(error, Q35CError) or type(error) is MemoryError:
                raise
            raise MediaError(
                "the clip cannot be decoded",
                where=self._where,
                got=f"{error!s:.200}",
                hint=_HINT,
            ) from None


def _open_file(source: Any, where: str) -> IO[bytes]:
    """Return a file of bounded size. Raises MediaError, or OptionError for what cannot be a path."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        file: IO[bytes] = io.BytesIO(cast(bytes, source))
    elif isinstance(source, (str, os.PathLike)):
        place = arguments.path(where, source)
        try:
            if not place.is_file():  # a device or a pipe might never end
                raise MediaError("no such file", where=where, got=place)
            file = open(place, "rb")  # noqa: SIM115 - the clip closes it
        except OSError as error:
            raise MediaError(f"cannot be read: {error.strerror}", where=where, got=place) from None
    else:
        raise MediaError(
            "is no clip",
            where=where,
            expected="a path, the bytes of a file, or pictures",
            got=type(source).__name__,
        )
    count = file.seek(0, os.SEEK_END)
    file.seek(0)
    if count > MAX_FILE_BYTES:
        file.close()
        raise MediaError("the file is too large", where=where, expected=MAX_FILE_BYTES, got=count)
    return file


def _picture(frame: Any) -> Any:
    """Return a decoded frame as a Pillow image in RGB, turned upright as the file says.

    The reference's reader leaves the clips of telephones lying; pictures are turned, and so are these.
    """
    module = pillow()
    image = module.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS.get(round(frame.rotation) % 360)
    return image.transpose(module.Transpose[turn]) if turn else image
