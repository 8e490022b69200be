"""Talk to an engine as the HTTP side does: requests in, events back from another thread."""

from __future__ import annotations

import threading
from typing import Any

from q35c.runtime.generate import GenerationOptions
from q35c.runtime.multimodal import MultimodalPrompt
from q35c.runtime.sampling import SamplingOptions
from q35c.serve.engine import Engine
from q35c.serve.request import Event, Failed, Finished, Request, Token

SECONDS = 60.0  # after which a test gives up; nothing is measured by it


def request(ids: Any, new_tokens: int = 8, **fields: Any) -> Request:
    """Return a request; sampling options and those of generation may be among the fields."""
    sampling = {name: fields.pop(name) for name in SamplingOptions.__slots__ if name in fields}
    options = GenerationOptions(
        SamplingOptions(**{"temperature": 0.0, **sampling}),
        new_tokens,
        tuple(fields.pop("stop", ())),
        frozenset(fields.pop("stop_ids", ())),
        fields.pop("seed", 0),
    )
    is_mixed = isinstance(ids, MultimodalPrompt)
    return Request(ids if is_mixed else tuple(ids), options, **fields)


class Answer:
    """The events of one request, from whatever thread."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.posts = 0
        self._changed = threading.Condition()

    def post(self, request: Request, events: list[Event]) -> None:
        with self._changed:
            self.posts += 1
            self.events += events
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], (Finished, Failed))

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        end = self.last.text if isinstance(self.last, Finished) else ""
        return "".join(token.text for token in self.tokens) + end

    def wait(self, count: int | None = None) -> Answer:
        """Wait until it is over, or until so many events have come."""
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self.is_over or (count is not None and len(self.events) >= count), SECONDS
            )
        assert is_there, f"after {SECONDS} s: {self.events[-3:]}"
        return self


def ask(engine: Engine, *requests: Request) -> list[Answer]:
    """Submit requests and wait for all answers."""
    answers = [Answer() for _ in requests]
    for item, answer in zip(requests, answers, strict=True):
        engine.submit(item, answer.post)
    return [answer.wait() for answer in answers]
