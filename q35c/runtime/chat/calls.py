"""Tool calls in the text of an answer, read while they arrive.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

The format has no escapes, so a value may hold any of these tags. It ends at the first `</parameter>` behind which the
call goes on as it must, and where that is missing before a parameter not yet given, or before the end of the call.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from typing import Any, cast

from q35c.runtime.chat.reading import Input, Verdict
from q35c.runtime.chat.values import Ignored, Value, value_of

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
OPEN_FUNCTION, CLOSE_FUNCTION = "<function=", "</function>"
OPEN_PARAMETER, CLOSE_PARAMETER = "<parameter=", "</parameter>"
MAX_NAME = 256
_TAGS = (CLOSE_PARAMETER, OPEN_PARAMETER, CLOSE_FUNCTION, CLOSE_CALL, OPEN_CALL)
_BEHIND_VALUE = (CLOSE_FUNCTION, CLOSE_PARAMETER, CLOSE_CALL, OPEN_PARAMETER)


def find_head(
    source: Input, at: int, names: Mapping[str, Any], is_line_start: bool
) -> tuple[Verdict, int, str]:
    """Say whether a call of one of the functions begins at a place; return where its body begins, and the name.

    The outer tag may be missing at the start of a line.
    """
    verdict = source.starts(OPEN_CALL, at)
    if verdict == "wait":
        return "wait", at, ""
    if verdict == "yes":
        at = source.skip_spaces(at + len(OPEN_CALL))
    elif not is_line_start:
        return "no", at, ""
    verdict = source.starts(OPEN_FUNCTION, at)
    if verdict != "yes":
        return verdict, at, ""
    verdict, end, name = source.read_name(at + len(OPEN_FUNCTION), MAX_NAME)
    if verdict == "yes":
        return ("yes" if name in names else "no"), end, name
    is_possible = any(known.startswith(name) for known in names)
    return (verdict if is_possible else "no"), at, ""


class CallReader:
    """Read the body of one call: the text behind the function's opening tag."""

    def __init__(self, parameters: Any) -> None:
        """`parameters` is the JSON schema of the function's arguments."""
        self.is_complete = False
        self._root = parameters
        known = cast(Any, parameters).get("properties") if isinstance(parameters, Mapping) else None
        self._known = cast(Mapping[str, Any], known if isinstance(known, Mapping) else {})
        self._given: set[str] = set()
        self._value: Value | None = None
        self._is_fresh = False  # nothing of the value has been read
        self._is_line_start = False

    def read(self, source: Input) -> Iterator[str]:
        """Use up what is certain; yield pieces of the arguments' JSON. `is_complete` is set at the end."""
        is_moving = True
        while is_moving and not self.is_complete:
            if self._value is None:
                is_moving = yield from self._read_tag(source)
            elif self._is_fresh:
                is_moving = self._open_value(source)
            else:
                is_moving = yield from self._read_value(source, self._value)

    def _read_tag(self, source: Input) -> Generator[str, None, bool]:
        """Read a tag between values; text there is of no use. Returns whether there is more to read."""
        at = source.text.find("<", source.at)
        source.at = len(source.text) if at < 0 else at
        if at < 0:
            return False
        verdict, tag = source.starts_any(_TAGS, at)
        if verdict == "yes" and tag == OPEN_PARAMETER:
            verdict, end, key = source.read_name(at + len(tag), MAX_NAME)
            if verdict == "yes":
                source.at = end
                yield self._begin(key)
                return True
            tag = ""
        if verdict == "wait":
            return False
        source.at += len(tag) or 1
        if tag == OPEN_CALL:  # the next one begins: this one was not closed
            source.at = at
        if tag in (CLOSE_FUNCTION, CLOSE_CALL, OPEN_CALL):
            self.is_complete = True
            yield "}" if self._given else "{}"
        return True

    def _begin(self, key: str) -> str:
        """Begin a value; of two for one key the first counts."""
        self._is_fresh = True
        if key in self._given:
            self._value = Ignored()
            return ""
        self._value = value_of(self._known.get(key), self._root)
        opening = ", " if self._given else "{"
        self._given.add(key)
        return f"{opening}{json.dumps(key, ensure_ascii=False)}: "

    def _open_value(self, source: Input) -> bool:
        """Use up the newline behind the opening tag."""
        verdict = source.starts("\n", source.at)
        if verdict == "wait":
            return False
        self._is_fresh, self._is_line_start = False, verdict == "yes"
        source.at += verdict == "yes"
        return True

    def _read_value(self, source: Input, value: Value) -> Generator[str, None, bool]:
        """Read a value as far as it is certain. Returns whether it has ended."""
        text, at, verdict, behind = source.text, source.at - 1, "no", 0
        while verdict == "no" and at < len(text):
            at = text.find("<", at + 1)
            at = len(text) if at < 0 else at
            if at < len(text):
                verdict, behind = self._ends_at(source, at)
        end = at - 1 if at > source.at and text[at - 1] == "\n" else at
        if source.at < end:
            self._is_line_start = False
            yield value.push(source.take(end))
        if verdict != "yes":
            return False
        yield value.finish()
        source.at, self._value = behind, None
        return True

    def _ends_at(self, source: Input, at: int) -> tuple[Verdict, int]:
        """Say whether the value ends before a place, and where the text behind the value begins."""
        verdict = source.starts(CLOSE_PARAMETER, at)
        if verdict == "yes":
            behind = at + len(CLOSE_PARAMETER)
            return source.starts_any(_BEHIND_VALUE, source.skip_spaces(behind))[0], behind
        is_line_start = source.text[at - 1] == "\n" if at > source.at else self._is_line_start
        if verdict == "wait" or not is_line_start:
            return verdict, at
        verdict, tag = source.starts_any((OPEN_PARAMETER, CLOSE_FUNCTION), at)
        if verdict != "yes":
            return verdict, at
        if tag == CLOSE_FUNCTION:
            behind = source.skip_spaces(at + len(tag))
            is_last = source.is_end and behind == len(source.text)
            return ("yes" if is_last else source.starts(CLOSE_CALL, behind)), at
        return self._is_next(source, at), at

    def _is_next(self, source: Input, at: int) -> Verdict:
        """Say whether the tag of a parameter that is known and not given yet stands at a place."""
        verdict, _, key = source.read_name(at + len(OPEN_PARAMETER), MAX_NAME)
        awaited = self._known.keys() - self._given
        if verdict == "yes":
            return "yes" if key in awaited else "no"
        return verdict if any(known.startswith(key) for known in awaited) else "no"
