"""Find pictures and clips in messages, and leave places for them that a template can see.

What a message says in text is data of whoever wrote it: a text is a picture only as a data URL, never a file's name or
an address, unless the caller allows files. What the caller made (a `Path`, bytes, a Pillow image, an array) is his own.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from q35c import arguments
from q35c.errors import MediaError, OptionError
from q35c.vision.clips import Clip

MOST_ATTACHMENTS = 1024
# Kinds of parts that are no text, and the fields that hold what they show.
IMAGES = ("image", "image_url", "input_image")
CLIPS = ("video", "video_url", "input_video")
HEARD = ("audio", "input_audio", "audio_url")
_FIELDS = ("image", "image_url", "video", "video_url", "url")
_DATA = re.compile(
    r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE
)
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*://|data:)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A picture or a clip, and which part of which message it is, for errors."""

    source: Any
    is_clip: bool
    where: str


def take_attachments(
    messages: Any, allow_files: bool = False
) -> tuple[list[Any], list[Attachment]]:
    """Return messages whose pictures and clips are places for them, and these in order.

    `messages` is a list; what is no message is left for others to refuse. Raises OptionError for a part that shows nothing,
    or sounds, MediaError for a text that is no data URL; both say which part it is.
    """
    found: list[Attachment] = []
    made: list[Any] = []
    for index, message in enumerate(cast(Sequence[Any], messages)):
        content = _field(message, "content")
        if isinstance(content, (list, tuple)):
            where = f"messages[{index}].content"
            parts = [
                _place(part, f"{where}[{place}]", allow_files, found)
                for place, part in enumerate(cast(Sequence[Any], content))
            ]
            message = {**cast(Mapping[str, Any], message), "content": parts}
        made.append(message)
    if len(found) > MOST_ATTACHMENTS:
        raise OptionError("too many pictures", where="messages", expected=MOST_ATTACHMENTS)
    return made, found


def attach(sources: Any, name: str, is_clip: bool) -> list[Attachment]:
    """Return what a caller attaches to a prompt: a list of sources, in which texts are paths or data URLs.

    Raises OptionError, MediaError.
    """
    listed = arguments.sequence(name, sources, f"a list of {name}", most=MOST_ATTACHMENTS)
    return [
        resolve(source, is_clip, f"{name}[{index}]", allow_files=True)
        for index, source in enumerate(listed)
    ]


def show(messages: Sequence[Any], attachments: Sequence[Attachment]) -> list[Any]:
    """Return a conversation whose last message of a user shows these as well, before what it says. Raises OptionError."""
    made = list(messages)
    users = (i for i in reversed(range(len(made))) if _field(made[i], "role") == "user")
    index = next(users, None)
    if index is None:
        raise OptionError("no message of a user could show the pictures", where="messages")
    message = made[index]
    content = message.get("content")
    said = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    shown = [{"type": "video" if item.is_clip else "image", "image": item} for item in attachments]
    made[index] = {**message, "content": [*shown, *said]}
    return made


def put_back(messages: Sequence[Any], originals: Sequence[Any]) -> list[Any]:
    """Return messages in which the parts that places were left for stand again, taken from `originals` in order."""
    parts = (
        part
        for message in originals
        for part in _parts(_field(message, "content"))
        if media_kind(part) is not None
    )
    return [
        {**message, "content": [next(parts) if is_place(part) else part for part in said]}
        if (said := _parts(_field(message, "content")))
        else message
        for message in messages
    ]


def _parts(content: Any) -> Sequence[Any]:
    return cast(Sequence[Any], content) if isinstance(content, (list, tuple)) else ()


def resolve(source: Any, is_clip: bool, where: str, allow_files: bool = False) -> Attachment:
    """Return what is shown, data URLs decoded. Raises MediaError for other texts, unless they may name files."""
    if isinstance(source, Attachment):
        source, where = source.source, source.where
    if isinstance(source, Clip):
        source = replace(source, frames=_frames(source.frames, where, allow_files))
    elif isinstance(source, str):
        source = _from_text(source, where, allow_files)
    elif is_clip:
        source = _frames(source, where, allow_files)
    return Attachment(source, is_clip, where)


def _frames(frames: Any, where: str, allow_files: bool) -> Any:
    """Return a clip's frames, where they are pictures one by one, as other pictures."""
    if not isinstance(frames, (list, tuple)):
        return frames
    return [
        _from_text(frame, f"{where}[{index}]", allow_files) if isinstance(frame, str) else frame
        for index, frame in enumerate(cast(Sequence[Any], frames))
    ]


def _from_text(text: str, where: str, allow_files: bool) -> bytes | Path:
    if head := _DATA.match(text):
        try:
            return b64decode(text[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise MediaError("the data URL holds no base64", where=where) from None
    if not allow_files:
        raise MediaError(
            "only data URLs are read",
            where=where,
            expected="data:image/...;base64,...",
            got=text[:80],
            hint="give what the file or address holds",
        )
    if _ADDRESS.match(text):
        raise MediaError(
            "addresses are not fetched",
            where=where,
            expected="a path or a data URL",
            got=text[:80],
            hint="fetch it yourself, and give what it holds",
        )
    return arguments.path(where, text)


def _place(part: Any, where: str, allow_files: bool, found: list[Attachment]) -> Any:
    """Return a part as it is, or the place of what it shows."""
    kind = media_kind(part)
    if kind is None:
        return part
    if kind in HEARD:
        raise OptionError(
            f"a part of a message is {kind}: the model does not hear",
            where=where,
            expected="text, image or video",
            hint="describe it in words, or leave it out",
        )
    fields = cast(Mapping[str, Any], part)
    source = next((fields[name] for name in (kind, *_FIELDS) if fields.get(name) is not None), None)
    if isinstance(source, Mapping):
        source = cast(Mapping[str, Any], source).get("url")
    if source is None:
        raise OptionError(f"a part of a message is {kind}, but shows nothing", where=where)
    is_clip = kind in CLIPS
    found.append(resolve(source, is_clip, where, allow_files))
    return {"type": "video" if is_clip else "image"}


def media_kind(part: Any) -> str | None:
    """Return which kind of a part this is, None if it is a text."""
    if not isinstance(part, Mapping):
        return None
    fields, known = cast(Mapping[str, Any], part), (*IMAGES, *CLIPS, *HEARD)
    if fields.get("type") in known:
        return str(fields["type"])
    return next((name for name in known if name in fields), None)


def is_place(part: Any) -> bool:
    """Say whether a part is the place of a picture or clip that was taken out of it."""
    return part in ({"type": "image"}, {"type": "video"})


def _field(message: Any, name: str) -> Any:
    return cast(Mapping[str, Any], message).get(name) if isinstance(message, Mapping) else None
