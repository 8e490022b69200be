"""A command at a pseudo-terminal, typed at and read by a test."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from types import TracebackType

HANGS_SECONDS = 60  # only a test that would wait for ever ends by this


class Typist:
    """Type at a command, and wait for what it shows."""

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self._master, slave = pty.openpty()
        self.resize(24, 80)
        self.shown = ""
        self._seen = 0

        def own_terminal() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "q35c", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=own_terminal,
            env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **(environment or {})},
        )
        os.close(slave)

    def __enter__(self) -> Typist:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self._master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, text: str) -> str:
        """Return what was shown since the last call, up to and with a text."""
        for piece in self._read():
            self.shown += piece
            at = self.shown.find(text, self._seen)
            if at >= 0:
                begin, self._seen = self._seen, at + len(text)
                return self.shown[begin : self._seen]
        raise AssertionError(f"ended without {text!r}: {self.shown[self._seen :]!r}")

    def interrupt_line(self, text: str) -> None:
        """Press Ctrl-C while a line is typed, until a text is shown.

        Python overlooks it just before it waits for a key.
        """
        self.type("\x03")
        while not select.select([self._master], [], [], 0.5)[0]:
            self.type("\x03")
        self.wait_for(text)

    def wait_for_end(self) -> int:
        """Return the exit code."""
        self.shown += "".join(self._read())
        return self.process.wait(HANGS_SECONDS)

    def _read(self) -> Iterator[str]:
        yield ""
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                ready, _, _ = select.select([self._master], [], [], HANGS_SECONDS)
                assert ready, f"hangs: {self.shown[self._seen :]!r}"
                data = os.read(self._master, 65536)
                if not data:
                    return
                yield data.decode(errors="replace")
