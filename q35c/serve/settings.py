"""How a server is set up, and the limits that nobody sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from q35c import arguments
from q35c.errors import OptionError

MAX_BODY_BYTES, MAX_BODY_VALUES, MAX_BODY_DEPTH = 32 << 20, 1 << 20, 64
MAX_BODIES_BYTES = 256 << 20  # of all that are being read
MAX_PREPARING = 64  # requests being turned into ids
BODY_SECONDS, HEAD_SECONDS, WRITE_SECONDS, PING_SECONDS = 60.0, 10.0, 30.0, 10.0
UNREAD_SECONDS = 10.0
MAX_HEAD_BYTES, MAX_HEAD_LINES = 16 << 10, 100
MAX_CONNECTIONS = 2048
KEEP_ALIVE_SECONDS = 30
MAX_DRAIN_SECONDS = 86400.0
MAX_WAITING_EVENTS = 256  # of one row, whose client has not read for `unread_seconds`
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
REASONING_FIELDS = ("reasoning_content", "reasoning")
ANY = "*"  # any model name, host or origin


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of a server.

    keys            API keys; none: nobody is asked for one
    names           names that the model is served under, the first is its own; "*" among them accepts any
    reasoning_field what the model's thinking is called in chat answers
    allowed_hosts   names in the Host header that are accepted beside the local ones; "*" accepts any
    cors_origins    web pages that may read answers; none by default
    queue_seconds   how long a request may wait for a row
    log_prompts     write what users say to the log
    warm_up         compute in idle times what the next turn of a conversation will begin with
    allow_videos    decode clips that requests hold: with libav, in this process
    ping_seconds    how often a client that waits hears of it
    unread_seconds  how long a client may leave more unread than a few hundred tokens
    """

    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ("model",)
    reasoning_field: str = REASONING_FIELDS[0]
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    queue_seconds: float = 300.0
    log_prompts: bool = False
    warm_up: bool = False
    allow_videos: bool = False
    ping_seconds: float = PING_SECONDS
    unread_seconds: float = UNREAD_SECONDS

    def __post_init__(self) -> None:
        arguments.choice("reasoning_field", self.reasoning_field, REASONING_FIELDS, "field")
        arguments.real("queue_seconds", self.queue_seconds, 0.0, 86400.0)
        arguments.real("ping_seconds", self.ping_seconds, 0.01, 3600.0)
        arguments.real("unread_seconds", self.unread_seconds, 0.0, 3600.0)
        for name in self.names:
            if not 1 <= len(arguments.text("names", name)) <= 256 or not name.isprintable():
                raise OptionError(
                    "not a model's name", where="names", expected="1 to 256 printable characters"
                )
        if all(name == ANY for name in self.names):
            raise OptionError("no name for the model", where="names", expected="one beside *")

    def replace(self, **changes: Any) -> Settings:
        """Return settings that differ in some fields."""
        return replace(self, **changes)
