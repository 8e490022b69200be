"""How the command line ends: every error becomes one message and an exit code.

0 done, 1 the user's input, 2 a bug of ours, 130 interrupted, 141 nobody reads our output any more.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import click

from q35c.errors import InputError, Q35CError, ToolchainError

EXIT_INPUT, EXIT_BUG, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
DEBUG_VARIABLE = "Q35C_DEBUG"
_COMPILE_PACKAGES = {"torch", "transformers", "tvm", "tvm_ffi", "safetensors", "huggingface_hub"}


class ReportingGroup(click.Group):
    """A click group whose commands never end in a traceback, unless `--debug` asks for one."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        sys.exit(_run(lambda: super(ReportingGroup, self).main(*args, **extra)))

    def invoke(self, ctx: click.Context) -> Any:
        # Click's own handlers would turn these into its exit codes, so they are met inside of it.
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            _interrupted()
        except BrokenPipeError:
            _broken_pipe()


def _run(call: Callable[[], Any]) -> int:
    """Return the exit code of a click call in which only expected errors are silent."""
    try:
        call()
    except SystemExit as stop:
        # Click ends with 2 where the command line is malformed, which is the user's to mend.
        return EXIT_INPUT if stop.code == click.UsageError.exit_code else int(stop.code or 0)
    except Exception as error:
        return report(error)
    return 0


def report(error: Exception) -> int:
    """Print what went wrong on stderr, with the traceback where debugging; return the exit code."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    error = _explain(error)
    if isinstance(error, InputError):
        click.echo(f"error: {error}", err=True)
        return EXIT_INPUT
    text = str(error) if isinstance(error, Q35CError) else f"{type(error).__name__}: {error}"
    click.echo(f"error: {text}", err=True)
    click.echo("this is a bug in q35c; `q35c --debug ...` shows where it happened", err=True)
    return EXIT_BUG


def _explain(error: Exception) -> Exception:
    """Turn what Python says about the user's machine into an InputError."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        for packages, extra in ((_COMPILE_PACKAGES, "compile"), ({"onnx"}, "onnx")):
            if package in packages:
                return ToolchainError(
                    f"this command needs the package {package!r}, which is not installed",
                    hint=f"pip install 'q35c[{extra}]'",
                )
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(error.strerror or str(error), where=os.fsdecode(error.filename))
    if isinstance(error, MemoryError):
        return InputError("this machine ran out of memory", hint="ask for less --context")
    return error


def _interrupted() -> NoReturn:
    click.echo("interrupted", err=True)
    sys.exit(EXIT_INTERRUPTED)


def _broken_pipe() -> NoReturn:
    # Python flushes stdout once more at exit; let that go nowhere.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_BROKEN_PIPE)
