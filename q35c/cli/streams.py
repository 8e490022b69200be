"""Standard input, output and error: they may be closed, full, or of an encoding that cannot say everything."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

import click

from q35c.errors import InputError


def prepare_streams() -> None:
    """Make output that cannot be encoded readable, and keep the numbers of closed streams from other files.

    What is written to a closed standard output fails when it is written; standard error may be closed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would become the stream
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = _writer(1)
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = _writer(2)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def say(text: str = "", *, end: str = "\n") -> None:
    """Write to standard output. Raises InputError where that cannot be done, BrokenPipeError where nobody reads."""
    try:
        click.echo(text + end, nl=False)
    except OSError as error:
        _silence(sys.stdout)
        raise output_error(error) from None


def output_error(error: OSError) -> Exception:
    """Return what to raise when standard output fails; that nobody reads it any more is no fault."""
    if isinstance(error, BrokenPipeError):
        return error
    return InputError(f"cannot write to standard output: {error.strerror}")


def note(text: str) -> None:
    """Write a line to standard error; a result does not fail because nobody can be told about it."""
    try:
        click.echo(text, err=True)
    except OSError:
        _silence(sys.stderr)


def flush_output() -> OSError | None:
    """Write what standard output still holds; return why it could not be written.

    Then the rest goes nowhere: Python would try again at exit, and complain.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        _silence(sys.stdout)
        return error
    return None


def _writer(number: int) -> TextIO:
    return io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", line_buffering=True)


def _silence(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
