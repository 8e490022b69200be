"""From a row's tokens to what its client sees: reasoning, content and tool calls, whatever the dialect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from q35c.runtime.chat.answer import (
    AnswerParser,
    CallArguments,
    CallStart,
    ContentDelta,
    Part,
    ReasoningDelta,
)
from q35c.runtime.tokenizer import StopScanner
from q35c.serve.request import Finished, Scored, Started, Token, Usage

Reason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(slots=True)
class Call:
    """A tool call as far as it has come."""

    id: str
    name: str
    arguments: str = ""
    is_complete: bool = False


class Choice:
    """One row's answer. `reasoning`, `content` and `calls` hold all that came so far."""

    def __init__(
        self,
        parser: AnswerParser | None = None,
        stops: tuple[str, ...] = (),
        *,
        is_thinking: bool = False,
        is_parallel: bool = True,
    ) -> None:
        """Without a parser all text is content; unless `is_parallel`, the answer ends behind its first call."""
        self.reasoning = self.content = ""
        self.calls: list[Call] = []
        self.reason: Reason | None = None
        self.stop: str | None = None
        self.usage = Usage(0)
        self.reasoning_tokens = 0
        self._parser = parser
        self._scanner = StopScanner(stops)
        self._is_parallel = is_parallel
        self._tokens: list[Token] = []
        self._unreported = 0
        self._prompt: tuple[Token, ...] = ()
        self._is_reasoning = is_thinking

    @property
    def new_tokens(self) -> int:
        """Return how many tokens have come, also where the engine's count never will."""
        return max(self.usage.new_tokens, len(self._tokens))

    def start(self, event: Started, prompt_tokens: int) -> None:
        """Note what of the prompt was cached."""
        self.usage = Usage(prompt_tokens, event.cached_tokens)

    def score(self, event: Scored) -> None:
        """Note the prompt's logprobs."""
        self._prompt = event.tokens

    def push(self, token: Token) -> list[Part]:
        """Add a token; return what is certain now. Sets `reason` where the answer ends by what it says."""
        self._tokens.append(token)
        self.reasoning_tokens += self._is_reasoning
        parts = list(self._feed(token.text))
        if self.reason is not None:  # the engine has not counted yet
            self.usage = Usage(
                self.usage.prompt_tokens, self.usage.cached_tokens, len(self._tokens)
            )
        return parts

    def finish(self, event: Finished) -> list[Part]:
        """End the answer; return what was held back."""
        self.usage = event.usage
        is_cut = event.reason != "stop"
        parts = list(self._feed(event.text))
        if self.reason is None and self._parser is not None:
            parts += self._keep_all(self._parser.finish(is_cut))
        if self.reason is None:
            parts += self._keep_content(self._scanner.finish())
            self.reason = self._reason_of(event)
            if isinstance(event.stop, str):
                self.stop = event.stop
        return parts

    def take_prompt(self) -> tuple[Token, ...]:
        """Return the prompt's tokens with their logprobs, once."""
        taken, self._prompt = self._prompt, ()
        return taken

    def take_tokens(self) -> list[Token]:
        """Return the tokens since the last call, for their logprobs."""
        taken = self._tokens[self._unreported :]
        self._unreported = len(self._tokens)
        return taken

    def _reason_of(self, event: Finished) -> Reason:
        if event.reason == "cancelled":
            return "cancelled"
        if event.reason in ("length", "context"):
            return "length"
        return "tool_calls" if any(call.is_complete for call in self.calls) else "stop"

    def _feed(self, text: str) -> Iterator[Part]:
        if not text:
            return
        if self._parser is None:
            yield from self._scan(text)
        else:
            yield from self._keep_all(self._parser.feed(text))

    def _keep_all(self, parts: list[Part]) -> Iterator[Part]:
        for part in parts:
            if self.reason is None:
                yield from self._keep(part)

    def _keep(self, part: Part) -> Iterator[Part]:
        if isinstance(part, ReasoningDelta):
            self.reasoning += part.text
            yield part
            return
        self._is_reasoning = False
        if isinstance(part, ContentDelta):
            yield from self._scan(part.text)
            return
        if isinstance(part, CallStart):
            yield from self._keep_content(self._scanner.finish())
            self.calls.append(Call(part.id, part.name))
        elif isinstance(part, CallArguments):
            self.calls[part.index].arguments += part.text
        else:
            self.calls[part.index].is_complete = True
            if not self._is_parallel:
                self.reason = "tool_calls"
        yield part

    def _scan(self, text: str) -> Iterator[Part]:
        yield from self._keep_content(self._scanner.push(text))
        if self._scanner.found is not None:
            self.reason, self.stop = "stop", self._scanner.found

    def _keep_content(self, text: str) -> list[Part]:
        if not text:
            return []
        self.content += text
        return [ContentDelta(text)]
