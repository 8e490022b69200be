"""Let a model see: pictures and clips become rows in the width of its text, and what was seen once is kept."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from q35c import arguments
from q35c.errors import MediaError, PromptError
from q35c.runtime.attachments import Attachment
from q35c.runtime.device import Rows
from q35c.runtime.multimodal import MultimodalPrompt, Picture
from q35c.vision.clips import ClipFrames, clip_frames
from q35c.vision.parameters import VisionParameters
from q35c.vision.patches import Frame, image_frame
from q35c.vision.pictures import read_file
from q35c.vision_config import MERGE, VisionConfig

KEPT_BYTES = 256 << 20
_CHUNK = 1 << 20
Tower = Callable[[Frame], Rows]


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture, or the frames of a clip and the middle of each in seconds."""

    pictures: tuple[Picture, ...]
    seconds: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        return sum(len(picture.rows) for picture in self.pictures)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is still to be seen."""

    key: bytes
    frames: tuple[Frame, ...]
    seconds: tuple[float, ...] | None

    @property
    def tokens(self) -> int:
        return sum(frame.tokens(MERGE) for frame in self.frames)


class Eyes:
    """A model's vision. Safe to share between threads; two that look at the same thing at once both compute it."""

    def __init__(
        self,
        config: VisionConfig,
        parameters: VisionParameters,
        tower: Tower,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """`tower` returns rows f32 [tokens, hidden] of one picture or group of frames."""
        self.config = config
        self._parameters, self._tower, self._most_bytes = parameters, tower, kept_bytes
        self._kept: OrderedDict[bytes, Seen] = OrderedDict()
        self.kept_bytes = 0
        self._lock = threading.Lock()

    def look(
        self,
        attachments: Sequence[Attachment],
        room: int,
        salt: str = "",
        *,
        is_blank: bool = False,
    ) -> list[Seen]:
        """Return what pictures and clips look like to the text model.

        All are opened, and their tokens added up, before the first is computed. What was seen is shared between callers of the same `salt`.
        If `is_blank`, nothing is computed and rows are zeros: for who only counts.
        Raises PromptError where they take more than
        `room`; MediaError, OptionError for what cannot be opened; all name the part.
        """
        prepared: list[Seen | _Prepared] = []
        tokens = 0
        for attachment in attachments:
            prepared.append(self._prepare(attachment, salt))
            tokens += prepared[-1].tokens
            if tokens > room:
                raise PromptError(
                    "the pictures take more tokens than the context holds",
                    where=attachment.where,
                    expected=f"at most {room}",
                    got=f"{tokens} up to this one",
                    hint="show fewer or smaller ones, or load the model with a larger context",
                )
        tower = self._blank if is_blank else self._tower
        return [self._see(one, tower) if isinstance(one, _Prepared) else one for one in prepared]

    def _prepare(self, attachment: Attachment, salt: str) -> Seen | _Prepared:
        source, where = attachment.source, attachment.where
        if isinstance(source, os.PathLike):
            source = arguments.path(where, source)
            source = source if attachment.is_clip else read_file(source, where)
        key = _file_digest(source, attachment, salt)
        if key is not None and (seen := self._find(key)) is not None:
            return seen
        if attachment.is_clip:
            made = clip_frames(source, self._parameters, where)
        else:
            made = ClipFrames((image_frame(source, self._parameters, where),), ())
        key = key or _frames_digest(made, attachment.is_clip, salt)
        seconds = made.seconds if attachment.is_clip else None
        return self._find(key) or _Prepared(key, made.frames, seconds)

    def _blank(self, frame: Frame) -> Rows:
        return np.zeros((frame.tokens(MERGE), self.config.out_hidden_size), np.float32)

    def _see(self, prepared: _Prepared, tower: Tower) -> Seen:
        pictures = tuple(
            Picture(tower(frame), frame.rows // MERGE, frame.columns // MERGE)
            for frame in prepared.frames
        )
        seen = Seen(pictures, prepared.seconds)
        if tower is self._tower:
            self._keep(prepared.key, seen)
        return seen

    def _find(self, key: bytes) -> Seen | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: bytes, seen: Seen) -> None:
        size = sum(picture.rows.nbytes for picture in seen.pictures)
        with self._lock:
            if key in self._kept or size > self._most_bytes:
                return
            self._kept[key] = seen
            self.kept_bytes += size
            while self.kept_bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.kept_bytes -= sum(picture.rows.nbytes for picture in oldest.pictures)


def _file_digest(source: Any, attachment: Attachment, salt: str) -> bytes | None:
    """Return what a file is known by; None for what is none, or cannot be read as the decoder will say."""
    digest = hashlib.sha256(f"file {attachment.is_clip} {salt!r}".encode())
    if isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(cast(bytes, source))
        return digest.digest()
    if isinstance(source, Path) and source.is_file():
        with open(source, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.digest()
    return None


def _frames_digest(made: ClipFrames, is_clip: bool, salt: str) -> bytes:
    """Return what pictures that are no files are known by."""
    digest = hashlib.sha256(f"frames {is_clip} {salt!r} {made.seconds}".encode())
    for frame in made.frames:
        digest.update(f"{frame.rows} {frame.columns}".encode())
        digest.update(frame.patches.data)
    return digest.digest()


def assemble(
    ids: Sequence[int],
    attachments: Sequence[Attachment],
    seen: Sequence[Seen],
    tokens: VisionConfig,
    encode: Callable[[str], Sequence[int]],
) -> MultimodalPrompt:
    """Return a prompt in which pictures stand in place of their pads, as transformers 5.23 writes them.

    A picture takes its pad's place; a clip, for each of its frames, the time as text and the frame between a start and
    an end. `encode` turns the text of a time into ids. Raises PromptError where there are not as many pads as pictures or
    clips.
    """
    shown = list(zip(attachments, seen, strict=True))
    left = {
        tokens.image_token_id: [one for attachment, one in shown if not attachment.is_clip],
        tokens.video_token_id: [one for attachment, one in shown if attachment.is_clip],
    }
    for pad, name in ((tokens.image_token_id, "pictures"), (tokens.video_token_id, "clips")):
        if (places := sum(token == pad for token in ids)) != len(left[pad]):
            raise PromptError(
                f"the prompt has not as many places as there are {name}",
                expected=len(left[pad]),
                got=places,
                hint="write one pad for each, or none at all",
            )
    parts: list[list[int] | Picture] = [[]]
    for token in ids:
        if token not in left:
            _said(parts, [token])
            continue
        one = left[token].pop(0)
        for picture, seconds in _frames_of(one):
            if seconds is None:
                parts.append(picture)
                continue
            _said(parts, [*encode(f"<{seconds:.1f} seconds>"), tokens.vision_start_token_id])
            parts.append(picture)
            _said(parts, [tokens.vision_end_token_id])
    return MultimodalPrompt.join([part for part in parts if isinstance(part, Picture) or part])


def _frames_of(seen: Seen) -> Iterator[tuple[Picture, float | None]]:
    if seen.seconds is None:
        yield seen.pictures[0], None
    else:
        yield from zip(seen.pictures, seen.seconds, strict=True)


def _said(parts: list[list[int] | Picture], ids: list[int]) -> None:
    """Add text to the last part, or behind a picture."""
    if isinstance(parts[-1], list):
        parts[-1] += ids
    else:
        parts.append(ids)


def refuse_attachments(attachments: Sequence[Attachment]) -> None:
    """Raise MediaError, naming the first, where there are pictures and the model reads text alone."""
    if attachments:
        raise MediaError(
            "the model takes in text alone",
            where=attachments[0].where,
            expected="text",
            hint="describe it in words, leave it out, or compile the checkpoint with its vision tower",
        )
