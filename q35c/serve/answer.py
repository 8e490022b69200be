"""From a row's tokens to what its client sees: reasoning, content and tool calls, whatever the dialect."""

from __future__ import annotations

from typing import Literal

from q35c.runtime.chat.answer import AnswerParser, Part
from q35c.runtime.gathered import Gathered
from q35c.serve.request import Finished, Scored, Started, Token, Usage

Reason = Literal["stop", "length", "tool_calls", "cancelled"]


class Choice:
    """One row's answer, and what its client is told of its tokens."""

    def __init__(
        self,
        parser: AnswerParser | None = None,
        stops: tuple[str, ...] = (),
        *,
        is_thinking: bool = False,
        is_parallel: bool = True,
    ) -> None:
        """Without a parser all text is content; unless `is_parallel`, the answer ends behind its first call."""
        self.made = Gathered(parser, stops, is_parallel=is_parallel)
        self.reason: Reason | None = None
        self.stop: str | None = None
        self.usage = Usage(0)
        self.reasoning_tokens = 0
        self._tokens: list[Token] = []
        self._unreported = 0
        self._prompt: tuple[Token, ...] = ()
        self._is_thinking = is_thinking

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
        self.reasoning_tokens += self._is_thinking and not self.made.is_past_reasoning
        parts = self._feed(token.text)
        if self.reason is not None:  # the engine has not counted yet
            self.usage = Usage(
                self.usage.prompt_tokens, self.usage.cached_tokens, len(self._tokens)
            )
        return parts

    def finish(self, event: Finished) -> list[Part]:
        """End the answer; return what was held back."""
        self.usage = event.usage
        parts = self._feed(event.text)
        if self.reason is None:
            parts += self._told(self.made.finish(event.reason != "stop"))
        if self.reason is None:
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
        return "tool_calls" if self.made.complete else "stop"

    def _feed(self, text: str) -> list[Part]:
        return self._told(self.made.feed(text)) if text and self.reason is None else []

    def _told(self, parts: list[Part]) -> list[Part]:
        """Note what parts say of the answer."""
        if self.made.has_enough:
            self.stop = self.made.stop
            self.reason = "tool_calls" if self.stop is None else "stop"
        return parts
