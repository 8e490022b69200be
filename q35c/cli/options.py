"""Options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how tokens are chosen, and where the text ends; `stop` is a list of texts."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a model is loaded."""
    context = click.option(
        "--context",
        type=int,
        help="Most tokens of the sequence, up to the model's own limit [as compiled].",
    )
    return machine_options(context(command))


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what a model runs on."""
    threads = click.option("--threads", type=int, help="Worker threads [physical cores].")
    device = click.option(
        "--device",
        help="cpu, or cuda:N for the Nth NVIDIA device [what the model was compiled for].",
    )
    return threads(device(command))


def describe_machine(model: Any) -> str:
    """Return what a loaded model runs on."""
    return f"{model.threads} threads" if model.device == "cpu" else model.device


def unescaped(text: str) -> str:
    """Return what someone means who types `\\n` in a shell; other backslashes stay."""
    return re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def _unescape_all(_context: click.Context, _option: Any, texts: tuple[str, ...]) -> list[str]:
    return [unescaped(text) for text in texts]


_SAMPLING = (
    click.option("--temperature", type=float, help="0 takes the likeliest token every time."),
    click.option("--top-k", type=int, help="Sample among the k likeliest tokens; 0: off."),
    click.option("--top-p", type=float, help="Sample among the likeliest that reach this share."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: avoid tokens already there."),
    click.option("--presence-penalty", type=float, help="Above 0: avoid tokens already generated."),
    click.option(
        "--frequency-penalty", type=float, help="Above 0: the more often, the more it is avoided."
    ),
    click.option("--seed", type=int, help="Equal seeds give equal texts [random]."),
    click.option(
        "--stop",
        multiple=True,
        callback=_unescape_all,
        help=r"End before this text; \n, \t, \r and \\ stand for newline, tab, return and backslash. May be given several times.",
    ),
)
