"""Answers taken apart in a test: the parts put together again, and checked on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from q35c.runtime.chat.answer import (
    AnswerParser,
    CallArguments,
    CallEnd,
    CallStart,
    ContentDelta,
    Part,
    ReasoningDelta,
)

FOLDER = Path(__file__).parent
CASES: list[dict[str, Any]] = [
    json.loads(line) for line in (FOLDER / "cases.jsonl").read_text().splitlines()
]
TOOLS: list[dict[str, Any]] = json.loads((FOLDER / "tools.json").read_text())


@dataclass
class Read:
    """What the parts of an answer add up to; `calls` are all that began, as (name, text of the arguments)."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    complete: list[int] = field(default_factory=list)
    ids: set[str] = field(default_factory=set, compare=False)

    def add(self, part: Part) -> None:
        """Add a part, which must fit what came before."""
        if isinstance(part, ReasoningDelta):
            assert part.text and not self.content and not self.calls
            self.reasoning += part.text
        elif isinstance(part, ContentDelta):
            assert part.text and len(self.complete) == len(self.calls)
            self.content += part.text
        elif isinstance(part, CallStart):
            assert part.index == len(self.calls) == len(self.complete)
            assert part.id not in self.ids
            self.ids.add(part.id)
            self.calls.append((part.name, ""))
        elif isinstance(part, CallArguments):
            assert part.text and part.index == len(self.calls) - 1 == len(self.complete)
            name, text = self.calls[-1]
            self.calls[-1] = name, text + part.text
        elif isinstance(part, CallEnd):
            assert part.index == len(self.calls) - 1 == len(self.complete)
            self.complete.append(part.index)

    @property
    def arguments(self) -> list[tuple[str, Any]]:
        """Return the complete calls with their arguments as JSON values."""
        done = [self.calls[index] for index in self.complete]
        return [(name, json.loads(text)) for name, text in done]


def read(
    pieces: Iterable[str], tools: Sequence[Any], is_thinking: bool, is_cut: bool = False
) -> Read:
    """Return what an answer adds up to that arrives in these pieces."""
    parser, made = AnswerParser(tools, is_thinking), Read()
    for piece in pieces:
        for part in parser.feed(piece):
            made.add(part)
    for part in parser.finish(is_cut):
        made.add(part)
    return made


def read_case(case: dict[str, Any], pieces: Iterable[str]) -> Read:
    """Return what a recorded answer adds up to."""
    tools = TOOLS if case["has_tools"] else []
    return read(pieces, tools, case["is_thinking"], case["finish_reason"] == "length")
