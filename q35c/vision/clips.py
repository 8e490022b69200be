"""Make a clip what the tower reads: sampled frames, resized as they are decoded, in groups that one patch is deep.

At full size 768 frames would be gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from q35c import arguments
from q35c.errors import MediaError
from q35c.vision.clip_files import MAX_FRAMES, ClipFile
from q35c.vision.parameters import VisionParameters
from q35c.vision.patches import Frame, cut, resize
from q35c.vision.pictures import read_rgb
from q35c.vision.sampling import sample, timestamps
from q35c.vision.sizes import video_size

MAX_SECONDS = 60.0  # that reading a clip may take
DEFAULT_FPS = 24.0  # of frames that come without a rate, as in the reference


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip as its frames: Pillow images, arrays, or one array [frames, rows, columns, channels]; `fps` of them a second."""

    frames: Sequence[Any] | np.ndarray
    fps: float = DEFAULT_FPS


@dataclass(frozen=True, slots=True)
class ClipFrames:
    """What the tower reads of a clip, one group of frames after the other, and the middle of each in seconds."""

    frames: tuple[Frame, ...]
    seconds: tuple[float, ...]


class Reader(Protocol):
    """A clip that is open."""

    @property
    def fps(self) -> float: ...

    def count(self) -> int:
        """Return how many frames there should be."""
        ...

    def decode(self) -> Iterator[Callable[[], Any]]:
        """Yield, for each frame from the first on, what makes a Pillow image in RGB of it."""
        ...

    def __enter__(self) -> Reader: ...

    def __exit__(self, *error: object) -> None: ...


def clip_frames(
    source: Any,
    parameters: VisionParameters,
    where: str = "video",
    max_seconds: float = MAX_SECONDS,
) -> ClipFrames:
    """Return the sampled frames of a clip, resized and cut.

    `source` is a path, the bytes of a file, `Clip`, or what their `frames` may be. `max_seconds` bounds the wall time
    that reading a file takes. Raises MediaError, or OptionError for what cannot be a path or rate.
    """
    if not isinstance(source, Clip) and arguments.is_sequence(source):
        source = Clip(source)
    if isinstance(source, Clip):
        reader: Reader = _Stills(source, where)
    else:
        reader = ClipFile(source, where, time.monotonic() + max_seconds)
    with reader:
        return _read(reader, parameters, where)


def _read(reader: Reader, parameters: VisionParameters, where: str) -> ClipFrames:
    """Sample a clip; once more if it turns out to have fewer frames than it says."""
    indices = sample(reader.count(), reader.fps, parameters.video)
    frames, found = _frames(reader, indices, parameters, where)
    if found <= indices[-1]:
        indices = sample(found, reader.fps, parameters.video) if found else []
        frames, _ = _frames(reader, indices, parameters, where)
    step = parameters.temporal_patch_size
    frames += frames[-1:] * (-len(frames) % step)
    groups = (frames[at : at + step] for at in range(0, len(frames), step))
    made = tuple(cut(group, parameters) for group in groups)
    return ClipFrames(made, timestamps(indices, reader.fps, step))


def _frames(
    reader: Reader, indices: Sequence[int], parameters: VisionParameters, where: str
) -> tuple[list[np.ndarray], int]:
    """Return the frames at those indices, resized, and how many there were up to the last of them."""
    step = parameters.temporal_patch_size
    if len(indices) < step:
        raise MediaError(
            "a clip needs more frames", where=where, expected=f"at least {step}", got=len(indices)
        )
    wanted, made, found = set(indices), list[np.ndarray](), 0
    first, shape = (0, 0), (0, 0)
    for load in reader.decode():
        if found in wanted:
            image = load()
            if not made:
                first = image.size
                shape = video_size(len(indices), image.height, image.width, parameters, where)
            if image.size != first:
                raise MediaError(
                    "frames differ in size", where=where, expected=first, got=image.size
                )
            made.append(resize(image, *shape))
        found += 1
        if found > indices[-1]:
            break
    return made, found


class _Stills:
    """A clip of pictures that are there already."""

    def __init__(self, pictures: Clip, where: str) -> None:
        if not arguments.is_sequence(pictures.frames):
            raise MediaError(
                "is no clip",
                where=where,
                expected="a path, the bytes of a file, or pictures",
                got=type(pictures.frames).__name__,
            )
        self._pictures, self._where = cast(Sequence[Any], pictures.frames), where
        self.fps = arguments.real(f"{where}: fps", pictures.fps, 1e-3, 1e6)

    def count(self) -> int:
        count = len(self._pictures)
        if count > MAX_FRAMES:
            raise MediaError("too many frames", where=self._where, expected=MAX_FRAMES, got=count)
        return count

    def decode(self) -> Iterator[Callable[[], Any]]:
        for index, picture in enumerate(self._pictures):
            yield lambda p=picture, i=index: read_rgb(p, f"{self._where}[{i}]")

    def __enter__(self) -> _Stills:
        return self

    def __exit__(self, *error: object) -> None:
        pass
