"""How the command line ends: every error becomes one message and an exit code.

0 done, 1 the user's input, 2 a bug of ours, 130 interrupted, 141 nobody reads our output any more.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from q35c.cli.streams import flush_output, note, output_error, prepare_streams
from q35c.errors import InputError, Q35CError, Q35CWarning, ToolchainError, printable

EXIT_INPUT, EXIT_BUG, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
DEBUG_VARIABLE = "Q35C_DEBUG"
_KEYWORD = re.compile(r'\b(?P<name>[a-z_]+)=(?P<value>True|\d+|"[^"]*"|\["[^"]*"\])')  # in hints
_QUOTES = '[]"'
_EXTRAS = (
    ({"torch", "transformers", "tvm", "tvm_ffi", "safetensors", "huggingface_hub"}, "compile"),
    ({"onnx"}, "onnx"),
    ({"starlette", "uvicorn", "h11", "prometheus_client", "llguidance"}, "serve"),
)


class ReportingGroup(click.Group):
    """A click group whose commands never end in a traceback, unless `--debug` asks for one."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        prepare_streams()
        with warnings.catch_warnings():
            warnings.simplefilter("always", Q35CWarning)
            warnings.showwarning = _show_warning
            code = _run(lambda: super(ReportingGroup, self).main(*args, **extra))
            if (error := flush_output()) and code == 0:
                code = report(output_error(error))
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        # Click's own handlers would turn these into its exit codes, so they are met inside of it.
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            _interrupted()
        except BrokenPipeError:
            flush_output()
            sys.exit(EXIT_BROKEN_PIPE)
        except Q35CError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            typed = {p.name: _as_typed(p) for p in (command.params if command else []) if p.name}
            error.where = typed.get(error.where or "", error.where)
            error.hint = error.hint and _KEYWORD.sub(lambda m: _with_value(typed, m), error.hint)
            raise


def _as_typed(parameter: click.Parameter) -> str:
    """Return the option or argument that gives an argument of the library, whose errors speak Python."""
    is_option = isinstance(parameter, click.Option)
    return max(parameter.opts, key=len) if is_option else parameter.human_readable_name


def _with_value(typed: dict[str, str], keyword: re.Match[str]) -> str:
    name, value = keyword.group("name", "value")
    if name not in typed:
        return keyword.group()
    return typed[name] if value == "True" else f"{typed[name]} {value.strip(_QUOTES)}"


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
        note("".join(traceback.format_exception(error)).rstrip())
    error = _explain(error)
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    if isinstance(error, InputError):
        note(f"error: {error}")
        return EXIT_INPUT
    is_ours = isinstance(error, Q35CError)
    note(f"error: {error if is_ours else printable(f'{type(error).__name__}: {error}')}")
    note("this is a bug in q35c; `q35c --debug ...` shows where it happened")
    return EXIT_BUG


def _explain(error: Exception) -> Exception:
    """Turn what Python says about the user's machine into an InputError."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        for packages, extra in _EXTRAS:
            if package in packages:
                return ToolchainError(
                    f"this command needs the package {package!r}, which is not installed",
                    hint=f"pip install 'q35c[{extra}]'",
                )
    if isinstance(error, OSError):
        return _explain_system(error)
    if isinstance(error, MemoryError):
        return InputError("this machine ran out of memory", hint="ask for less --context")
    return error


def _explain_system(error: OSError) -> Exception:
    """Say what of the user's surroundings failed: a named file, or the directory we are in."""
    if isinstance(error, BrokenPipeError):
        return error
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        name = error.filename
        is_name = isinstance(name, (str, bytes))
        return InputError(reason, where=os.fsdecode(name) if is_name else str(name))
    try:
        os.getcwd()
    except OSError:
        return InputError("the current directory is gone", hint="change to one that exists")
    return InputError(f"the system refuses: {reason}")


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *args: Any, **options: Any
) -> None:
    if issubclass(category, Q35CWarning):
        note(f"warning: {printable(str(message))}")
    else:
        note(warnings.formatwarning(message, category, filename, args[0] if args else 0).rstrip())


def _interrupted() -> NoReturn:
    note("interrupted")
    sys.exit(EXIT_INTERRUPTED)
