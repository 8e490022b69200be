"""Listen, answer, and end in order: uvicorn with our guard, and with our way to stop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import Receive, Scope, Send

from q35c import arguments
from q35c.errors import OptionError
from q35c.serve.guard import GuardedProtocol
from q35c.serve.log import log
from q35c.serve.settings import KEEP_ALIVE_SECONDS, MAX_DRAIN_SECONDS, WRITE_SECONDS

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Application(Protocol):
    """What answers, and hears that the server is about to end."""

    def start_draining(self) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Drained(Protocol):
    """What lets running answers end, for some seconds."""

    def drain(self, seconds: float) -> None: ...


class Server(uvicorn.Server):
    """A server for one application and its engine; the first signal drains it, a second one ends it at once."""

    def __init__(
        self,
        app: Application,
        engine: Drained,
        *,
        drain_seconds: float = 30.0,
        on_ready: Callable[[str], None] = log.info,
        protocol: type[GuardedProtocol] = GuardedProtocol,
    ) -> None:
        self._drain_seconds = arguments.real("drain_seconds", drain_seconds, 0.0, MAX_DRAIN_SECONDS)
        self._app, self._engine = app, engine
        self._on_ready = arguments.callback("on_ready", on_ready)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                loop="asyncio",  # with uvloop streams were cut when the server ended
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(self._drain_seconds + WRITE_SECONDS),
            )
        )

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal or `stop`; the socket is closed at the end. For the main thread, or any other."""
        with listener, asyncio.Runner() as runner:
            runner.run(self.serve([listener]))

    def stop(self) -> None:
        """Drain and end, from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        self._on_ready(url_of(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.start_draining()
        drain = asyncio.create_task(asyncio.to_thread(self._engine.drain, self._drain_seconds))
        await super().shutdown(sockets)
        if not self.force_exit:
            await drain

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals as uvicorn does, but let the process end with 0 after one: it did what it was told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def raise_file_limit(wanted: int) -> None:
    """Let this process open more files, as far as it may: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that waits for connections; port 0 takes any that is free. Raises OptionError."""
    arguments.integer("port", port, 0, 65535)
    try:
        found = socket.getaddrinfo(
            arguments.text("host", host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise OptionError(
            "no address of that name", where="host", expected="a name or an address", got=host
        ) from None
    family, _, _, _, address = found[0]
    try:
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise OptionError(
            f"cannot listen there: {error.strerror}",
            where="port",
            got=f"{host} port {port}",
            hint="choose another --port; 0 takes any that is free",
        ) from None
    # Connections inherit it. Without it an event waits for the client's word about the one before, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(host: str) -> bool:
    """Say whether no other machine can reach an address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True  # no address at all, which `listen` will say
    names = [str(address[0]) for *_, address in found]
    return all(name == "::1" or name.startswith("127.") for name in names)
