"""Spare TVM's parser what takes most of its time in tests; what it makes of a kernel stays the same.

For each kernel it asks twice for the whole stack, for which Python looks up the module and the line of each frame: under pytest
there are many of both. And it parses the source of a generator anew for each shape.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

from tvm.script.parser.core import doc
from tvm.tirx.script.parser import entry


class _Inspect(ModuleType):
    """The module `inspect`, whose stacks hold frames alone: the parser looks up names in them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    @staticmethod
    def stack() -> list[inspect.FrameInfo]:
        frame, found = sys._getframe(1), []
        while frame is not None:
            code = frame.f_code
            place = (code.co_filename, frame.f_lineno, code.co_name)
            found.append(inspect.FrameInfo(frame, *place, None, None))
            frame = frame.f_back
        return found


@functools.cache
def install() -> None:
    """Do so from now on in this process."""
    entry.inspect = _Inspect("inspect")
    doc.parse = functools.lru_cache(maxsize=64)(doc.parse)
