"""An answer as far as it has come, from its text: reasoning, content up to a stop string, and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from q35c.runtime.chat.answer import (
    AnswerParser,
    CallArguments,
    CallStart,
    ContentDelta,
    Part,
    ReasoningDelta,
)
from q35c.runtime.tokenizer import StopScanner


@dataclass(slots=True)
class Call:
    """A tool call as far as it has come."""

    id: str
    name: str
    arguments: str = ""
    is_complete: bool = False


class Gathered:
    """What the parts of an answer add up to. `reasoning`, `content` and `calls` hold all that came so far."""

    def __init__(
        self, parser: AnswerParser | None, stops: tuple[str, ...], *, is_parallel: bool
    ) -> None:
        """Without a parser all text is content; unless `is_parallel`, the answer ends behind its first call."""
        self.reasoning = self.content = ""
        self.calls: list[Call] = []
        self.is_past_reasoning = False
        self._parser = parser
        self._scanner = StopScanner(stops)
        self._is_parallel = is_parallel

    @property
    def stop(self) -> str | None:
        """Return the stop string that ended the content."""
        return self._scanner.found

    @property
    def complete(self) -> list[Call]:
        """Return the calls that are complete."""
        return [call for call in self.calls if call.is_complete]

    @property
    def has_enough(self) -> bool:
        """Say whether the answer is over before the model has ended it."""
        return self.stop is not None or (not self._is_parallel and bool(self.complete))

    def feed(self, text: str) -> list[Part]:
        """Add text; return the parts that are certain now."""
        if self._parser is None:
            return self._scan(text)
        return list(self._keep_all(self._parser.feed(text)))

    def finish(self, is_cut: bool) -> list[Part]:
        """End the answer, which was not ended by the model if it `is_cut`; return what was held back."""
        parts = [] if self._parser is None else list(self._keep_all(self._parser.finish(is_cut)))
        return parts if self.has_enough else parts + self._say(self._scanner.finish())

    def _keep_all(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            if not self.has_enough:
                yield from self._keep(part)

    def _keep(self, part: Part) -> Iterator[Part]:
        self.is_past_reasoning |= not isinstance(part, ReasoningDelta)
        if isinstance(part, ContentDelta):
            yield from self._scan(part.text)
            return
        if isinstance(part, ReasoningDelta):
            self.reasoning += part.text
        elif isinstance(part, CallStart):
            yield from self._say(self._scanner.finish())
            self.calls.append(Call(part.id, part.name))
        elif isinstance(part, CallArguments):
            self.calls[part.index].arguments += part.text
        else:
            self.calls[part.index].is_complete = True
        yield part

    def _scan(self, text: str) -> list[Part]:
        return self._say(self._scanner.push(text))

    def _say(self, text: str) -> list[Part]:
        self.content += text
        return [ContentDelta(text)] if text else []
