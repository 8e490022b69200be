"""What the HTTP side and the engine say to each other: plain frozen data, no sockets, no sessions.

The HTTP side makes a `Request` and submits it; the engine thread answers with events by a callback:
`Started` once at admission, `Scored` if it was asked for, a `Token` for each generated token, and as the last one
`Finished` or `Failed`. After a `Ticket` was cancelled there is still one `Finished("cancelled")`, so that whoever
counts what is open counts right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from q35c.errors import Q35CError
from q35c.runtime.generate import FinishReason, GenerationOptions
from q35c.runtime.multimodal import MultimodalPrompt, Prompt

StructureKind = Literal["object", "schema", "regex", "choice", "grammar", "calls"]


@dataclass(frozen=True, slots=True)
class Structure:
    """What an answer must look like, as plain data; the grammar compiler makes a constraint of it.

    kind            "object" (any JSON object), "schema", "regex", "choice", "grammar" (Lark), "calls" (forced tool calls)
    value           None, a JSON schema, a pattern, a tuple of texts, a Lark text, or a tuple of (name, parameters' schema)
    where           the request's field that errors name, such as "response_format"
    is_thinking     the answer begins inside reasoning: the constraint begins behind `</think>`
    is_parallel     more than one call is allowed ("calls" alone)
    thinking_tokens tokens after which reasoning is closed; None: whenever the model does
    """

    kind: StructureKind
    value: Any
    where: str
    is_thinking: bool = False
    is_parallel: bool = True
    thinking_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One row: a prompt's ids, or one with pictures, and everything that decides what comes after them.

    options         `max_new_tokens` is already cut to what the context leaves; 0 only scores the prompt.
                    Stop strings in it end the row wherever they occur
    client          who asks, for fairness between clients: of a fixed alphabet
    priority        0 is ordinary; lower numbers go first
    salt            prefixes are shared only between requests of the same salt
    logprobs        None: none; n >= 0: the token's own, and the n likeliest
    is_scoring      also send one `Scored` for the prompt before the first token (needs `logprobs`)
    constraint      what the grammar compiler made of a `Structure`; a matcher of its own belongs to each request
    deadline        `time.monotonic()` by which it must have been admitted, else it ends "cancelled"
    is_idle         computed only while there is nothing else to do, and given up as soon as there is
    group           requests with the same text here have the same prompt and differ in the seed: prefill once, fork
    """

    ids: tuple[int, ...] | MultimodalPrompt
    options: GenerationOptions
    client: str = ""
    priority: int = 0
    salt: str = ""
    logprobs: int | None = None
    is_scoring: bool = False
    is_idle: bool = False
    constraint: Any = None
    deadline: float | None = None
    group: str = ""

    @property
    def prompt(self) -> Prompt:
        """Return the prompt as rows take it."""
        return self.ids if isinstance(self.ids, MultimodalPrompt) else list(self.ids)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and seconds of one row. `new_tokens` counts a stop id that ended it."""

    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """The row was admitted; its prefill begins behind the cached tokens."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, and the text that is certain by now: of this token, of earlier ones, or none.

    `logprob` is the natural logarithm of its share, by the logits before any penalty or mask; `top` the
    likeliest (id, logprob), descending. A stop id that ends the row comes as a token without text.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """The prompt's tokens with their logprobs; the first has none. `text` is empty: nobody needs it."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The row ended. `stop` is the stop id or stop string that ended it; `text` what was still held back."""

    reason: FinishReason
    usage: Usage
    stop: int | str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The row ended by an error of its own. The texts of InputError are for the client, no others."""

    error: Q35CError


Event = Started | Scored | Token | Finished | Failed
Post = Callable[[Request, list[Event]], None]  # from the engine thread; must not block


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """What `submit` returns and `cancel` takes."""

    request: Request
    number: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """The engine's numbers at one moment; counts are since it began.

    Keys of the mappings are of fixed sets: they become labels of metrics.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    prefill_slices: int = 0
    evictions: int = 0
    grammar_seconds: float = 0.0
    step_stall_ratio: float = 0.0
    state_bytes: Mapping[str, int] = field(default_factory=dict)  # running, parked, cached
    misses: Mapping[str, int] = field(default_factory=dict)  # by reason
    rows: Mapping[int, int] = field(default_factory=dict)  # decode steps by their number of rows


class Serving(Protocol):
    """What the HTTP side needs of an engine."""

    def submit(self, request: Request, post: Post) -> Ticket:
        """Queue a request, from any thread. Raises Overloaded, Unavailable while it drains."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """End a request within a turn, from any thread; no error if it has ended."""
        ...

    def compile(self, structure: Structure) -> Any:
        """Return the constraint of a structure. Called in a worker thread. Raises OptionError that names
        what cannot be enforced."""
        ...

    def drain(self, seconds: float) -> None:
        """Refuse new and waiting requests, let running ones end; cancel what has not ended by then."""
        ...

    def close(self) -> None:
        """End the thread and give the sessions back."""
        ...

    def statistics(self) -> Statistics:
        """Return the numbers of this moment, from any thread."""
        ...
