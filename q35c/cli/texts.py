"""Texts that commands are given: as an argument, in a file, or on standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from q35c import strictjson
from q35c.cli.streams import note
from q35c.errors import OptionError, PromptError

MAX_TEXT_BYTES = 64 << 20
MAX_JSON_VALUES = 1 << 20
STANDARD_INPUT = "-"


def argument_or_file(text: str, path: Path | None) -> str:
    """Return a text given as an argument, in a file, or, where the argument is `-`, on standard input.

    Raises OptionError for both an argument and a file, PromptError for what is no text.
    """
    if path is None:
        return read_standard_input() if text == STANDARD_INPUT else text
    if text != STANDARD_INPUT:
        raise OptionError("a text and a file are given", where=str(path), expected="one of them")
    try:
        with path.open("rb") as stream:
            return _decoded(stream.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        raise OptionError(f"cannot be read: {error.strerror}", where=str(path)) from None


def read_standard_input() -> str:
    """Return standard input as text, without its last newline. Raises PromptError."""
    stdin: Any = sys.stdin
    if stdin is None:
        raise PromptError("standard input is closed", hint="give the text as an argument")
    if stdin.isatty():
        note("reading the text from the terminal: end it with Ctrl-D on a line of its own")
    try:
        return _decoded(stdin.buffer.read(MAX_TEXT_BYTES + 1)).removesuffix("\n")
    except OSError as error:
        raise PromptError(f"cannot read standard input: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises OptionError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise OptionError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return strictjson.loads(
        data,
        where=str(path),
        limit=MAX_TEXT_BYTES,
        error=OptionError,
        max_values=MAX_JSON_VALUES,
    )


def _decoded(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise PromptError("the text is too large", expected=f"at most {MAX_TEXT_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError("the text is not UTF-8", got=f"byte {error.start}") from None
