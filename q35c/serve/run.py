"""Serve an artifact: load it, start the engine, listen, and end in order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q35c import arguments
from q35c.errors import OptionError
from q35c.runtime.load import load_model
from q35c.runtime.memory import available_memory
from q35c.serve.app import App
from q35c.serve.engine import Engine
from q35c.serve.opening import Opening
from q35c.serve.server import Server, is_local, listen, raise_file_limit, url_of
from q35c.serve.settings import ANY, MAX_CONNECTIONS, Settings
from q35c.vision.packages import has_pillow

KEY_VARIABLE = "Q35C_API_KEY"
DEFAULT_PREFIX_CACHE = "25%"
MAX_KEYS, MAX_KEY_CHARACTERS = 1024, 1024
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,15})\s*(KiB|MiB|GiB|TiB|%)?")
Tell = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a server takes on.

    context, batch  as in `q35c.load`
    threads, device as in `q35c.load`
    max_queue       requests that may wait for a row
    max_stall       seconds that a step and the slices of prompts behind it should take together
    prefix_cache    memory for the beginnings of prompts: bytes, with a unit, or a share of what is free
    cache_dir       where that is written at the end and read from at the beginning; None: nowhere
    """

    context: int | None = None
    batch: int | None = None
    threads: int | None = None
    device: str | None = None
    max_queue: int = 64
    max_stall: float = 0.2
    prefix_cache: str = DEFAULT_PREFIX_CACHE
    cache_dir: str | os.PathLike[str] | None = None


def serve(
    path: str | os.PathLike[str],
    settings: Settings,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    drain_seconds: float = 30.0,
    is_insecure: bool = False,
    on_ready: Tell = print,
    on_warning: Tell = print,
) -> None:
    """Serve an artifact until a signal ends it.

    `on_ready` gets the URL once requests are answered, `on_warning` what the user should know. Unless
    `is_insecure`, a server that other machines can reach needs a key. Raises OptionError, and what
    `q35c.load` raises.
    """
    settings = _checked(settings, host, is_insecure)
    raise_file_limit(2 * MAX_CONNECTIONS)
    if settings.log_prompts:
        on_warning("what users write goes to the log")
    with listen(host, port) as listener:
        url = url_of(listener)
        opening = Opening(
            lambda stack: _open(path, settings, limits, stack, on_warning),
            on_open=lambda: on_ready(url),
            on_failure=lambda: server.stop(),
        )
        server = Server(
            opening, opening, drain_seconds=drain_seconds, on_ready=lambda _: opening.start()
        )
        try:
            server.run_on(listener)
        finally:
            opening.close()


def _open(
    path: str | os.PathLike[str],
    settings: Settings,
    limits: Limits,
    stack: ExitStack,
    on_warning: Tell,
) -> tuple[App, Engine]:
    """Load a model and start its engine, to be ended by the stack."""
    model = stack.enter_context(
        load_model(
            path, limits.threads, context=limits.context, batch=limits.batch, device=limits.device
        )
    )
    model.tokenizer  # noqa: B018  an artifact without one cannot be served
    if model.prompting.eyes is not None and not has_pillow():
        on_warning("pictures are refused: they need the package Pillow; pip install 'q35c[vision]'")
    if model.batch == 1:
        on_warning("the artifact was compiled with batch 1: one request is answered at a time")
    engine = Engine(
        model,
        max_queue=limits.max_queue,
        max_stall=limits.max_stall,
        cache_bytes=cache_size(limits.prefix_cache),
        cache_dir=limits.cache_dir,
    )
    stack.callback(engine.close)
    return App(model, engine, settings), engine


def _checked(settings: Settings, host: str, is_insecure: bool) -> Settings:
    """Return settings that fit the address. Raises OptionError for one that is open to everybody."""
    if is_local(host):
        return settings
    if not settings.keys and not is_insecure:
        raise OptionError(
            "other machines could use this server without a key",
            where="host",
            got=host,
            hint=f"give --api-key-file or {KEY_VARIABLE}; --insecure serves everybody",
        )
    if settings.keys and not settings.allowed_hosts:
        # Nobody without a key gets an answer, so a page that rebinds its name to us does not either.
        return settings.replace(allowed_hosts=(ANY,))
    return settings


def read_keys(place: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """Return the API keys of a file, one a line, else that of the environment. Raises OptionError."""
    if place is None:
        listed = [os.environ.get(KEY_VARIABLE, "")]
        where = KEY_VARIABLE
    else:
        where = str(place)
        try:
            listed = arguments.path("api_key_file", place).read_text("ascii").splitlines()
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise OptionError(f"cannot read the API keys: {reason}", where=where) from None
    keys = tuple(key for line in listed if (key := line.strip()))
    if place is not None and not keys:
        raise OptionError("the file holds no API key", where=where, expected="a key a line")
    if len(keys) > MAX_KEYS or not all(map(_is_key, keys)):
        raise OptionError(
            "not API keys",  # which are named nowhere
            where=where,
            expected=f"at most {MAX_KEYS} keys of 1 to {MAX_KEY_CHARACTERS} visible characters",
        )
    return keys


def _is_key(key: str) -> bool:
    return len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable() and " " not in key


def cache_size(text: str) -> int:
    """Return the bytes that `2GiB`, `500000` or `25%` (of what is free) stand for. Raises OptionError."""
    found = _SIZE.fullmatch(arguments.text("prefix_cache", text).strip())
    if found is None or (found[2] == "%" and int(found[1]) > 90):
        raise OptionError(
            "not a size",
            where="prefix_cache",
            expected="bytes, such as 2GiB, or up to 90%; 0 keeps nothing",
            got=text,
        )
    if found[2] == "%":
        return available_memory().bytes * int(found[1]) // 100
    return int(found[1]) * _UNITS[found[2] or ""]


def default_names(path: str | os.PathLike[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that a model is served under, by default its file's."""
    return tuple(names) or (Path(path).stem or "model",)
