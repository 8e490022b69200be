"""Lines from the user and answers to the user: at a terminal, or over pipes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from q35c.cli.streams import note, say
from q35c.errors import PromptError
from q35c.user_cache import cache_directory

MAX_LINE_BYTES = 64 << 20
MAX_HISTORY = 1000
BLOCK = '"""'
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# What a terminal would obey: control characters but tab and newline.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Terminal:
    """Read lines and write answers; dimmed reasoning and a history only where somebody sits at a terminal."""

    def __init__(self) -> None:
        stdin: Any = sys.stdin
        self.is_interactive = stdin is not None and stdin.isatty() and sys.stdout.isatty()
        is_dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("NO_COLOR", "") != ""
        self._has_colour = self.is_interactive and not is_dumb
        self._is_dim = False
        self._last: type | None = None  # what was written last of this answer

    def read(self, prompt: str) -> str | None:
        """Return what the user says next, None at the end. Raises PromptError for what is no text."""
        line = self._read_line(prompt)
        if line is None or not line.startswith(BLOCK):
            return line
        lines = [line.removeprefix(BLOCK)]
        while not lines[-1].endswith(BLOCK):
            line = self._read_line("... ")
            if line is None:
                raise PromptError(f"a block that begins with {BLOCK} has no end")
            lines.append(line)
        lines[-1] = lines[-1].removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            return _read_piped()
        try:
            return input(prompt)
        except EOFError:
            say()
            return None
        except KeyboardInterrupt:
            say()
            return ""

    def write(self, part: Any) -> None:
        """Write a part of an answer. Over pipes nobody asked for the reasoning."""
        from q35c.runtime.chat.answer import CallArguments, CallEnd, CallStart, ReasoningDelta

        if isinstance(part, ReasoningDelta):
            if self.is_interactive:
                self._dim(True)
                self._say(part.text)
            return
        if self._is_dim:
            self._dim(False)
            say("\n")
        is_within = isinstance(part, (CallArguments, CallEnd))
        if not is_within and self._last not in (None, type(part)):
            say()
        self._last = type(part)
        if isinstance(part, CallStart):
            self._say(f"{part.name}(")
        else:
            self._say(")" if isinstance(part, CallEnd) else part.text)

    def end(self) -> None:
        """End an answer, wherever it was broken off."""
        self._dim(False)
        self._last = None
        say()

    def tell(self, text: str) -> None:
        """Say something about the conversation, beside it."""
        if text:
            note(text)

    def _say(self, text: str) -> None:
        say(text.translate(_CONTROL), end="")

    def _dim(self, is_dim: bool) -> None:
        """Begin or end dimmed text."""
        if self._has_colour and is_dim != self._is_dim:
            say(_DIM if is_dim else _PLAIN, end="")
        self._is_dim = is_dim


def _read_piped() -> str | None:
    stdin: Any = sys.stdin
    if stdin is None:
        raise PromptError("standard input is closed")
    data = stdin.buffer.readline(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        raise PromptError("a line is too long", expected=f"at most {MAX_LINE_BYTES} bytes")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r") if data else None
    except UnicodeDecodeError as error:
        raise PromptError("the line is not UTF-8", got=f"byte {error.start}") from None


@contextlib.contextmanager
def line_history(is_wanted: bool) -> Iterator[None]:
    """Let lines be edited and earlier ones be recalled, also those of earlier runs; the file is this user's alone."""
    if not is_wanted:
        yield
        return
    try:
        import readline
    except ImportError:  # Python was built without
        yield
        return
    path = cache_directory() / "chat-history"
    with contextlib.suppress(OSError):  # none yet, or not readable: no history is no fault
        readline.read_history_file(path)
    readline.set_history_length(MAX_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the same at the end
            _make_private(path)
            readline.write_history_file(path)


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(file, 0o600)
    finally:
        os.close(file)
