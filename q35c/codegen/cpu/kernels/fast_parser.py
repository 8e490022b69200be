"""Make TVMScript parse fast; what it makes of a kernel stays the same.

TVM 0.27 finds a macro's parser, and the scopes around a kernel, by walks over the stack that locate the source of every frame,
through every loaded module; bare frames tell the same. And it parses the source of a generator anew for each kernel that this
makes, twice. That was two thirds of the time that all kernels take.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FrameType, ModuleType
from typing import Any

from tvm.script.parser.core import doc
from tvm.script.parser.core.parser import ScriptMacro
from tvm.tirx.script.parser import entry

_KEPT_SOURCES = 64


def _find_parser(self: ScriptMacro) -> Any:
    for frame in _frames():
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
    raise RuntimeError("a TVMScript macro was called outside a kernel")


def _frames() -> list[FrameType]:
    """Return the frames around the caller, the nearest first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


class _Inspect(ModuleType):
    """The module `inspect`, but for stacks, which know no sources."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    @staticmethod
    def stack() -> list[inspect.FrameInfo]:
        return [
            inspect.FrameInfo(f, f.f_code.co_filename, f.f_lineno, f.f_code.co_name, None, None)
            for f in _frames()
        ]


@functools.cache
def install() -> None:
    """Replace what is slow; calling it again changes nothing."""
    ScriptMacro._find_parser_def = _find_parser
    entry.inspect = _Inspect("inspect")
    doc.parse = functools.lru_cache(_KEPT_SOURCES)(doc.parse)
