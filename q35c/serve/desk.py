"""What all endpoints share: the model, the engine, the threads that prepare requests, the numbers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from q35c.errors import InputError, InternalError, Overloaded
from q35c.runtime.chat.answer import AnswerParser
from q35c.runtime.multimodal import MultimodalPrompt, token_ids
from q35c.serve.answer import Choice
from q35c.serve.conversation import Ask, Prepared, TextModel, encode, prepare
from q35c.serve.fields import Fields
from q35c.serve.incoming import Bodies, Incoming
from q35c.serve.log import log
from q35c.serve.metrics import Metrics
from q35c.serve.options import check_model
from q35c.serve.reply import Reply, Writer
from q35c.serve.request import Request, Serving
from q35c.serve.rows import Inbox, Rows
from q35c.serve.settings import ANY, MAX_PREPARING, Settings
from q35c.serve.warm import next_request

T = TypeVar("T")
_THREADS = 2  # rendering and encoding hold Python's lock, so more would not be quicker


class Desk:
    """Shared by all requests of a server. Lives in the event loop but for what `run` is given."""

    def __init__(
        self, model: TextModel, engine: Serving, settings: Settings, routes: Sequence[str]
    ) -> None:
        self.model, self.engine, self.settings = model, engine, settings
        self.metrics = Metrics(engine, routes)
        self.bodies = Bodies()
        self.is_draining = False
        self.started_at = int(time.time())
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="q35c-prepare")
        self._preparing = 0
        self._inbox: Inbox | None = None
        self._tasks: set[asyncio.Future[None]] = set()  # which nobody else refers to

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_model(self, fields: Fields) -> str:
        """Return the name of the model that a request wants. Raises OptionError, RequestError."""
        return check_model(fields.value("model"), self.settings.names, ANY)

    async def run(self, call: Callable[[], T]) -> T:
        """Run something slow in a thread. Raises Overloaded where too much waits for one."""
        if self._preparing >= MAX_PREPARING:
            raise Overloaded("too many requests are being prepared", retry_after_seconds=1.0)
        self._preparing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: _contained(call))
        finally:
            self._preparing -= 1

    async def prepare(self, ask: Ask) -> Prepared:
        """Return the rows of a conversation's answer."""
        seconds, videos = self.settings.queue_seconds, self.settings.allow_videos
        return await self.run(lambda: prepare(self.model, self.engine, ask, seconds, videos))

    async def encode(self, ask: Ask) -> list[int]:
        """Return the ids of a conversation, pads where pictures are, which nobody looks at."""
        videos = self.settings.allow_videos
        prompt = await self.run(lambda: encode(self.model, ask, videos, is_blank=True))
        eyes = self.model.prompting.eyes
        if eyes is None or not isinstance(prompt, MultimodalPrompt):
            return token_ids(prompt)
        return np.where(prompt.ids < 0, eyes.config.image_token_id, prompt.ids).tolist()

    def reply_to(
        self, incoming: Incoming, ask: Ask, prepared: Prepared, writer: Writer, is_stream: bool
    ) -> Reply:
        """Return the response that answers a conversation."""
        choices = [
            Choice(
                AnswerParser(list(ask.tools), prepared.is_thinking),
                prepared.stops,
                is_thinking=prepared.is_thinking,
                is_parallel=ask.is_parallel,
            )
            for _ in prepared.requests
        ]
        reply = self.reply(incoming, prepared.requests, choices, writer, is_stream)
        if self.settings.warm_up and len(choices) == 1:
            reply.on_end = lambda: self._warm_up(ask, choices[0])
        return reply

    def _warm_up(self, ask: Ask, choice: Choice) -> None:
        """Begin to compute what the turn behind an answer will begin with; nobody waits for it."""
        task = asyncio.ensure_future(self._compute_next(ask, choice))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compute_next(self, ask: Ask, choice: Choice) -> None:
        try:
            request = await self.run(lambda: next_request(self.model, ask, choice))
            if request is not None:
                self.engine.submit(request, lambda request, events: None)
        except (
            InputError
        ) as error:  # such as a full queue, or a conversation that no template writes
            log.info("no warm-up: %s", error)

    def reply(
        self,
        incoming: Incoming,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        writer: Writer,
        is_stream: bool,
    ) -> Reply:
        """Return the response that runs rows and writes what comes of them."""
        if self._inbox is None:
            self._inbox = Inbox(asyncio.get_running_loop())
        rows = Rows(self.engine, self._inbox, requests, self.settings.unread_seconds)
        return Reply(
            rows,
            choices,
            writer,
            self.metrics,
            identity=incoming.id,
            is_stream=is_stream,
            ping_seconds=self.settings.ping_seconds,
        )


def _contained(call: Callable[[], T]) -> T:
    """Call; panics of libraries, which are no Exceptions, become one."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        raise InternalError("a library failed", got=type(error).__name__) from None


def new_id(prefix: str) -> str:
    """Return an id that no other object has."""
    return f"{prefix}{secrets.token_hex(12)}"
