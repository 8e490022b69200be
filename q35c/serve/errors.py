"""What a client is told when something fails: one function for all, written in three dialects.

Only texts that q35c wrote leave the server. What a library or Python said, and what our own bugs say, stays
inside: such texts have carried addresses, paths and other people's words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import ceil
from typing import Any

from q35c.errors import (
    InputError,
    MediaError,
    MemoryRefused,
    OptionError,
    Overloaded,
    PromptError,
    Q35CError,
    RequestError,
    TokenizerError,
    Unavailable,
    printable,
)

_INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
CONTEXT_EXCEEDED = "context_length_exceeded"


class Dialect(Enum):
    """Whose clients speak to a route."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed request as its client may know it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return OpenAI's type of the error."""
        return _KINDS.get(self.status, _INVALID if self.status < 500 else "server_error")


def describe(error: BaseException) -> Failure:
    """Return what a client is told about an error."""
    if isinstance(error, RequestError):
        return Failure(error.status, _message(error), _param(error.where), error.code)
    if isinstance(error, Overloaded):
        wait = {"Retry-After": str(max(1, ceil(error.retry_after_seconds)))}
        return Failure(429, _message(error), code="overloaded", headers=wait)
    if isinstance(error, (Unavailable, MemoryRefused)):
        return Failure(503, _message(error), code="unavailable")
    if isinstance(error, PromptError) and "the context" in error.what:
        return Failure(400, _message(error), _param(error.where), CONTEXT_EXCEEDED)
    if isinstance(error, (OptionError, PromptError, MediaError)):
        return Failure(400, _message(error), _param(error.where))
    if isinstance(error, TokenizerError):
        return Failure(400, "the model's template or tokenizer cannot take in this conversation")
    if isinstance(error, InputError):
        return Failure(400, "the request cannot be answered")
    return Failure(500, "the server failed; its log says more under the request's id")


def error_body(dialect: Dialect, failure: Failure) -> dict[str, Any]:
    """Return the JSON that a dialect's clients expect of a failure."""
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_KINDS.get(
            failure.status, _INVALID if failure.status < 500 else "api_error"
        )
        return {"type": "error", "error": {"type": kind, "message": failure.message}}
    return {
        "error": {
            "message": failure.message,
            "type": failure.kind,
            "param": failure.param,
            "code": failure.code,
        }
    }


def _message(error: Q35CError) -> str:
    """Return our own words; what was found is left out, as it may be anything."""
    parts = [error.what]
    if error.where is not None:
        parts[0] = f"{error.where}: {error.what}"
    if error.expected is not None:
        parts.append(f"expected {error.expected}")
    if error.hint is not None:
        parts.append(error.hint)
    return printable("; ".join(parts))


def _param(where: str | None) -> str | None:
    """Return a field's path from a place in the body, such as `body at $.messages[0]`."""
    if where is None or where == "body":
        return None
    return where.removeprefix("body at $").removeprefix(".") or None
