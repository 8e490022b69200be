"""A model without weights and an engine that says what a test tells it to, from a thread of its own."""

from __future__ import annotations

import functools
import itertools
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tokenizers

from q35c.artifact.manifest import Generation
from q35c.errors import InternalError, OptionError, Overloaded, Q35CError, Unavailable
from q35c.runtime.prompting import Prompting
from q35c.runtime.seeing import Eyes
from q35c.runtime.tokenizer import StopScanner, TextStream, Tokenizer
from q35c.serve.request import (
    Failed,
    Finished,
    Post,
    Request,
    Scored,
    Started,
    Statistics,
    Structure,
    Ticket,
    Token,
    Usage,
)
from tests import fake_artifact, seeing

VOCAB, END, IM_START, IM_END = 270, 256, 257, 258
TURN_SECONDS = 1e-4
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is undefined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose ids are bytes, with three control tokens behind them."""
    made = tokenizers.Tokenizer.from_buffer(fake_artifact.tokenizer())
    document = json.loads(made.to_str())
    document["added_tokens"] = []
    made = tokenizers.Tokenizer.from_buffer(json.dumps(document).encode())
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *seeing.TOKENS])
    return Tokenizer(made.to_str().encode())


class FakePrompting(Prompting):
    """A tokenizer of bytes and a template, of no file."""

    def __init__(self, context: int, eyes: Eyes | None = None) -> None:
        sizes = SimpleNamespace(vocab_size=VOCAB, hidden_size=seeing.HIDDEN)
        manifest = SimpleNamespace(model=sizes, takes_rows=True)
        super().__init__(SimpleNamespace(manifest=manifest), context, eyes, lambda: None)  # type: ignore[arg-type]
        self._tokenizer = byte_tokenizer()
        self._template = TEMPLATE, {}


class FakeModel:
    """What of a model the HTTP side reads."""

    vocab_size = VOCAB

    def __init__(self, context: int = 1 << 18, batch: int = 4) -> None:
        self.context, self.batch = context, batch
        settings = fake_artifact.GENERATION | {"stop_ids": (END, IM_END)}
        self.manifest: Any = SimpleNamespace(generation=Generation(**settings))
        self.tokenizer = byte_tokenizer()
        self.prompting = FakePrompting(context)


Say = Callable[[Request], str | Q35CError]


class FakeEngine:
    """Say `say(request)` byte by byte, every running row one token a turn, then end the row.

    While `gate` is cleared no turn happens, so that a test may look at a moment.
    """

    def __init__(self, say: Say | None = None, *, batch: int = 4, queue: int = 64) -> None:
        self.say: Say = say or (lambda request: "Hello")
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[Request] = []
        self.structures: list[Structure] = []
        self.cancelled: list[Request] = []
        self.turns = 0
        self._batch, self._queue = batch, queue
        self._lock = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._is_draining = self._is_closed = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, post: Post) -> Ticket:
        with self._lock:
            if self._is_draining:
                raise Unavailable("the server is about to end")
            if len(self._waiting) >= self._queue:
                raise Overloaded("the queue is full", retry_after_seconds=2.5)
            ticket = Ticket(request, next(self._numbers))
            self.requests.append(request)
            self._waiting.append(_Row(ticket, post))
            self._lock.notify_all()
            return ticket

    def cancel(self, ticket: Ticket) -> None:
        with self._lock:
            for row in [*self._waiting, *self._running]:
                if row.ticket is ticket:
                    row.is_cancelled = True
                    self.cancelled.append(ticket.request)
            self._lock.notify_all()

    def compile(self, structure: Structure) -> Any:
        self.structures.append(structure)
        if structure.kind == "regex":
            try:
                re.compile(structure.value)
            except re.error:
                raise OptionError("not a pattern", where=structure.where) from None
        return structure

    def drain(self, seconds: float) -> None:
        with self._lock:
            self._is_draining = True
            while self._waiting:
                self._waiting.popleft().fail(Unavailable("the server is about to end"))
        limit = time.monotonic() + seconds
        while self._running and time.monotonic() < limit:
            time.sleep(0.005)
        with self._lock:
            for row in self._running:
                row.is_cancelled = True
            self._lock.notify_all()
        self.gate.set()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        self.gate.set()
        self._thread.join(5)

    def statistics(self) -> Statistics:
        with self._lock:
            running, waiting = len(self._running), len(self._waiting)
        return Statistics(
            running,
            waiting,
            steps=self.turns,
            state_bytes={"running": 0, "parked": 0, "cached": 0},
            misses={"no snapshot": 0},
            rows={1: self.turns},
        )

    def _run(self) -> None:
        while not self._is_closed:
            self.gate.wait()
            with self._lock:
                if not self._waiting and not self._running:
                    self._lock.wait(1)
                    continue
                self._admit()
                running = list(self._running)
            self.turns += 1
            time.sleep(TURN_SECONDS)  # a step of a real engine leaves Python to others
            for row in running:
                row.turn()
            with self._lock:
                self._running = [row for row in self._running if not row.is_done]

    def _admit(self) -> None:
        late = time.monotonic()
        for row in [*self._waiting]:
            deadline = row.ticket.request.deadline
            if row.is_cancelled or (deadline is not None and deadline < late):
                self._waiting.remove(row)
                row.end("cancelled")
        while self._waiting and len(self._running) < self._batch:
            row = self._waiting.popleft()
            row.start(self.say)
            self._running.append(row)


class _Row:
    def __init__(self, ticket: Ticket, post: Post) -> None:
        self.ticket, self._post = ticket, post
        self.is_cancelled = self.is_done = False
        self._stream = TextStream(byte_tokenizer())
        self._scanner = StopScanner(ticket.request.options.stop)
        self._left: deque[int] = deque()
        self._error: Q35CError | None = None
        self._new = 0

    def start(self, say: Say) -> None:
        request = self.ticket.request
        said = say(request)
        if isinstance(said, Exception):
            self._error = said
        else:
            self._left = deque([*said.encode(), IM_END])
        self._tell(Started(cached_tokens=len(request.ids) // 2))
        if request.is_scoring:
            scored = [self._token(id_, "") for id_ in request.ids]
            self._tell(Scored((Token(request.ids[0], ""), *scored[1:])))

    def turn(self) -> None:
        request = self.ticket.request
        if self.is_cancelled:
            self.end("cancelled")
        elif self._error is not None and self._new == 3:
            self.fail(self._error)
        elif self._new >= request.options.max_new_tokens:
            self.end("length")
        else:
            self._step(self._left.popleft() if self._error is None else ord("x"))

    def _step(self, token: int) -> None:
        self._new += 1
        if token in self.ticket.request.options.stop_ids:
            self._tell(self._token(token, ""))
            self.end("stop", token)
            return
        text = self._scanner.push(self._stream.push(token))
        self._tell(self._token(token, text))
        if self._scanner.found is not None:
            self.end("stop", self._scanner.found)

    def _token(self, token: int, text: str) -> Token:
        asked = self.ticket.request.logprobs
        if asked is None:
            return Token(token, text)
        top = [(token, -0.5), (0, -float("inf")), *((i, -2.0 - i) for i in range(1, 30))]
        return Token(token, text, -0.5, tuple(top[:asked]))

    def end(self, reason: Any, stop: int | str | None = None) -> None:
        request = self.ticket.request
        prompt = len(request.ids)
        held = self._stream.finish()
        if self._scanner.found is None:
            held = self._scanner.push(held) + self._scanner.finish()
        self._tell(Finished(reason, Usage(prompt, prompt // 2, self._new), stop, held))
        self.is_done = True

    def fail(self, error: Q35CError) -> None:
        self._tell(Failed(error))
        self.is_done = True

    def _tell(self, event: Any) -> None:
        self._post(self.ticket.request, [event])


def internal_error() -> InternalError:
    return InternalError("secret detail at 0x7f001234", where="/home/somebody/file.py")
