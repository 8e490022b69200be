"""Every error that q35c raises on purpose, and how a message is written.

One tree. A message says what is wrong, where, what was expected, what was found, and what to do.
`InputError` is the user's to mend (CLI exit code 1); `InternalError` is ours (exit code 2).

Parts of a message may stem from hostile files: what a terminal would obey is escaped, long parts are cut in
the middle, and every line but the first is indented, so that none can pass for a message of its own.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from numbers import Number
from typing import Any

_MOST_CHARACTERS = 1500  # of one part: a list of known names fits, a file does not


class Q35CError(Exception):
    """Carry one complete message; the parts stay readable as attributes."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        what = printable(self.what)
        yield what if self.where is None else f"{printable(self.where)}: {what}"
        if self.expected is not None:
            yield f"  expected: {shown(self.expected)}"
        if self.got is not None:
            yield f"  got:      {shown(self.got)}"
        if self.hint is not None:
            yield f"  what to do: {printable(self.hint)}"


def printable(text: str) -> str:
    """Return text without control characters, of bounded length, further lines indented."""
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isprintable():
        return text
    escaped = (_escaped(character) for character in text)
    return "".join(escaped).replace("\n", "\n    ")


def shown(value: object) -> str:
    """Return any object as it stands in a message: texts and numbers plainly, others as a short repr."""
    if isinstance(value, (str, os.PathLike)):
        return printable(str(value)) or "''"
    if isinstance(value, Number) and not isinstance(value, int):
        return printable(str(value))
    return printable(_BRIEF.repr(value))


def _escaped(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode()


class _Brief(reprlib.Repr):
    """Write a short repr whatever the object is, without making a long one first."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20
        self.maxstring = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits.
        return str(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"

    def repr_bytes(self, x: bytes | bytearray, level: int) -> str:
        return repr(x) if len(x) <= 40 else f"{x[:40]!r}…"

    repr_bytearray = repr_bytes


_BRIEF = _Brief()


class Q35CWarning(UserWarning):
    """q35c does something in another way than it was asked to."""


class InputError(Q35CError):
    """What the user gave cannot be used."""


class OptionError(InputError):
    """A command-line option or an argument has a value that is not allowed."""


class CheckpointError(InputError):
    """A model directory is missing, incomplete, malformed or unsafe."""


class ConfigError(CheckpointError):
    """config.json is malformed or contradicts itself."""


class UnsupportedConfig(ConfigError):
    """The configuration is legal but asks for something q35c does not implement."""


class TokenizerError(InputError):
    """The tokenizer file cannot be used, or text cannot be encoded with it."""


class ArtifactError(InputError):
    """A .q35c file is damaged or is not one."""


class ArtifactVersionError(ArtifactError):
    """A .q35c file was written by another format version."""


class UnsupportedMachine(InputError):
    """This machine lacks what q35c needs, or does not tell what it has."""


class IncompatibleCPU(ArtifactError, UnsupportedMachine):
    """The artifact was compiled for instructions that this machine lacks."""


class NoDevice(UnsupportedMachine):
    """There is no driver or no device that can run an artifact, or the driver is too old."""


class IncompatibleDevice(ArtifactError, UnsupportedMachine):
    """The artifact holds no code for this device."""


class PromptError(InputError):
    """A prompt is empty, too long for the context, or holds ids outside the vocabulary."""


class MediaError(InputError):
    """A picture or a clip cannot be read, is too large, or of a kind that is not taken."""


class RequestError(InputError):
    """A request over HTTP is refused with this status; `where` names its field."""

    def __init__(self, what: str, *, status: int = 400, code: str | None = None, **parts: Any):
        super().__init__(what, **parts)
        self.status, self.code = status, code


class Unavailable(InputError):
    """The server takes no more requests: it is about to end."""


class Overloaded(InputError):
    """The server holds as many requests as it may; the client should try again later."""

    def __init__(self, what: str, *, retry_after_seconds: float, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.retry_after_seconds = retry_after_seconds


class StateError(InputError):
    """A file with the state of a sequence is damaged, or is none."""


class MemoryRefused(InputError):
    """The work would need more memory than this machine or its cgroup has."""


class OutOfDeviceMemory(MemoryRefused):
    """The device has less memory left than was asked for."""


class DiskRefused(InputError):
    """The file would need more disk space than is free."""


class ToolchainError(InputError):
    """A program or package that compiling needs is missing or failed."""


class InternalError(Q35CError):
    """An invariant of q35c itself does not hold."""


class VerifyError(InternalError):
    """An IR graph breaks a rule of the op table."""


class LoweringError(InternalError):
    """A scheduled op has no kernel for the requested shape, precision or target."""


class ExecutionError(InternalError):
    """Compiled code reported a failure."""


class DeviceError(ExecutionError):
    """A call of a device's driver failed; `code` is the driver's number."""

    def __init__(self, what: str, *, code: int, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.code = code


class DeviceFault(DeviceError):
    """Code failed on a device, or the device is gone: nothing that was there can be used any more."""
