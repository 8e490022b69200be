"""What comes of answering a conversation, as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

ChatFinishReason = Literal["stop", "tool_calls", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model asks to be called. `arguments_text` is the JSON text of `arguments`."""

    id: str
    name: str
    arguments_text: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return json.loads(self.arguments_text)


@dataclass(frozen=True, slots=True)
class ChatUsage:
    """Tokens and seconds of an answer.

    cached_tokens       of the prompt: they were not computed again
    reasoning_tokens    of the new ones
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    reasoning_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Return the rate of the tokens after the first, which the prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What the model answered.

    tool_calls      complete ones only
    finish_reason   "stop", "tool_calls" (it ended by itself, with calls), "length", "context" (no room left) or
                    "cancelled"
    stop            the stop id or stop string that ended it, else None
    seed            the seed, also where none was given
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: ChatFinishReason
    stop: int | str | None
    seed: int
    usage: ChatUsage

    @property
    def message(self) -> dict[str, Any]:
        """Return the answer as a message, for the history."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        if self.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return made
