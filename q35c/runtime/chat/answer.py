"""From the text of an answer, as it arrives, to its parts: reasoning, content and tool calls.

Whatever the pieces, the parts add up to the same: text is held back only where its meaning depends on what follows,
and nothing that was said is taken back. Blank lines around reasoning and content are left out.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from q35c import arguments
from q35c.errors import OptionError
from q35c.runtime.chat.calls import (
    CLOSE_CALL,
    OPEN_CALL,
    OPEN_FUNCTION,
    CallReader,
    find_head,
)
from q35c.runtime.chat.messages import PlainData, copy_tools
from q35c.runtime.chat.reading import Input, Verdict

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; calls are numbered from 0, and each has an id of its own."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which together are the text of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A tool call is complete; one without this was cut off, and is not to be carried out."""

    index: int


Part = ReasoningDelta | ContentDelta | CallStart | CallArguments | CallEnd


class AnswerParser:
    """Take an answer apart.

    tools           those the model may call, in the form of `apply_chat_template`; a call of any other function, and
                    every call where there are none, is content
    is_thinking     the answer begins inside reasoning, as the prompt's end says

    Raises OptionError for tools without a name.
    """

    def __init__(self, tools: Sequence[Any] | None = None, is_thinking: bool = False) -> None:
        self._source = Input()
        self._schemas = tool_schemas(tools)
        self._is_thinking = arguments.flag("is_thinking", is_thinking)
        self._is_opening = self._is_thinking
        self._reasoning, self._content = _Trimmer(), _Trimmer()
        self._call: CallReader | None = None
        self._is_behind_call = False
        self._is_line_start = True
        self._calls = 0

    @property
    def is_thinking(self) -> bool:
        """Say whether the text so far ends inside reasoning."""
        return self._is_thinking

    def feed(self, text: str) -> list[Part]:
        """Add text; return the parts that are certain now."""
        self._source.add(text)
        return _merged(self._run())

    def finish(self, is_cut: bool = False) -> list[Part]:
        """End the answer; return what was held back. `is_cut`: it did not end by itself."""
        self._source.is_end = not is_cut
        parts = list(self._run())
        self._source.is_end = True
        if is_cut and self._source.text.startswith((OPEN_CALL, OPEN_FUNCTION), self._source.at):
            self._source.at = len(self._source.text)  # the beginning of a call, as good as none
        if self._call is None:
            parts += self._run()
        if not self._calls and not self._is_thinking and (rest := self._content.finish()):
            parts.append(ContentDelta(rest))
        return _merged(parts)

    def _run(self) -> Iterator[Part]:
        is_moving = True
        while is_moving:
            if self._is_opening:
                is_moving = self._open()
            elif self._call is not None:
                is_moving = yield from self._read_call(self._call)
            elif self._is_behind_call:
                is_moving = self._close_call()
            else:
                is_moving = yield from self._read_text()

    def _open(self) -> bool:
        """Use up an opening tag that the model repeats."""
        source = self._source
        while source.starts("\n", source.at) == "yes":
            source.at += 1
        verdict = source.starts(OPEN_THINK, source.at)
        if verdict == "wait":
            return False
        source.at += len(OPEN_THINK) if verdict == "yes" else 0
        self._is_opening = False
        return True

    def _read_text(self) -> Generator[Part, None, bool]:
        """Read reasoning or content up to a tag. Returns whether there is more to read."""
        source, at, verdict = self._source, self._source.at - 1, "no"
        behind, name = 0, ""
        while verdict == "no" and at < len(source.text):
            at = source.text.find("<", at + 1)
            at = len(source.text) if at < 0 else at
            if at < len(source.text):
                verdict, behind, name = self._tag_at(at)
        yield from self._say(source.take(at))
        if verdict != "yes":
            return False
        source.at = behind
        self._is_line_start = True
        self._is_thinking = False
        if name:
            yield self._begin_call(name)
        return True

    def _tag_at(self, at: int) -> tuple[Verdict, int, str]:
        """Say whether a tag stands at a place; return the place behind it, and the function that it calls."""
        source = self._source
        # Behind a call a model may close the reasoning that the call has ended.
        if self._is_thinking or self._calls:
            verdict = source.starts(CLOSE_THINK, at)
            if verdict != "no":
                return verdict, at + len(CLOSE_THINK), ""
        if not self._schemas:
            return "no", at, ""
        is_line_start = source.text[at - 1] == "\n" if at > source.at else self._is_line_start
        return find_head(source, at, self._schemas, is_line_start)

    def _say(self, text: str) -> Iterator[Part]:
        if not text:
            return
        self._is_line_start = text.endswith("\n")
        trimmer = self._reasoning if self._is_thinking else self._content
        if said := trimmer.push(text):
            yield ReasoningDelta(said) if self._is_thinking else ContentDelta(said)

    def _begin_call(self, name: str) -> Part:
        self._call = CallReader(self._schemas[name])
        self._calls += 1
        return CallStart(self._calls - 1, f"call_{secrets.token_hex(12)}", name)

    def _read_call(self, call: CallReader) -> Generator[Part, None, bool]:
        """Read a call. Returns whether it has ended."""
        for piece in call.read(self._source):
            if piece:
                yield CallArguments(self._calls - 1, piece)
        if call.is_complete:
            yield CallEnd(self._calls - 1)
            self._call, self._is_behind_call = None, True
        return call.is_complete

    def _close_call(self) -> bool:
        """Use up the closing tag behind a call, if there is one."""
        source = self._source
        behind = source.skip_spaces(source.at)
        verdict = source.starts(CLOSE_CALL, behind)
        if verdict == "wait":
            return False
        if verdict == "yes":
            source.at = behind + len(CLOSE_CALL)
        self._is_behind_call, self._is_line_start = False, True
        return True


class _Trimmer:
    """Leave out the newlines at both ends of a text that arrives in pieces."""

    def __init__(self) -> None:
        self._held: str = ""
        self._has_begun: bool = False

    def push(self, text: str) -> str:
        """Add text; return it without newlines that may be the last ones."""
        text = self._held + text if self._has_begun else text.lstrip("\n")
        said = text.rstrip("\n")
        self._held = text[len(said) :]
        self._has_begun = self._has_begun or said != ""
        return said

    def finish(self) -> str:
        """Return the last newlines."""
        return self._held


def tool_schemas(tools: Sequence[Any] | None) -> dict[str, Any]:
    """Return the schemas of the functions' arguments by name. Raises OptionError."""
    made: dict[str, Any] = {}
    for index, tool in enumerate(copy_tools(PlainData(), tools) or []):
        function = _field(tool, "function") or tool
        name = _field(function, "name")
        if not isinstance(name, str) or not name:
            raise OptionError("a tool has no name", where=f"tools[{index}]", got=tool)
        made[name] = _field(function, "parameters")
    return made


def _field(value: Any, name: str) -> Any:
    return cast(Mapping[str, Any], value).get(name) if isinstance(value, Mapping) else None


def _merged(parts: Iterable[Part]) -> list[Part]:
    """Return parts with neighbours of a kind put together."""
    made: list[Part] = []
    for part in parts:
        last = made[-1] if made else None
        if isinstance(part, ReasoningDelta) and isinstance(last, ReasoningDelta):
            made[-1] = ReasoningDelta(last.text + part.text)
        elif isinstance(part, ContentDelta) and isinstance(last, ContentDelta):
            made[-1] = ContentDelta(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            made[-1] = CallArguments(part.index, last.text + part.text)
        else:
            made.append(part)
    return made
