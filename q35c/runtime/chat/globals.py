"""Global functions and classes of chat templates: those of jinja and transformers."""

from __future__ import annotations

import datetime
from typing import Any, NoReturn, cast

from jinja2 import defaults, pass_context
from jinja2.utils import Namespace as JinjaNamespace

from q35c.errors import OptionError
from q35c.runtime.chat.budget import TooMuch

MAX_RANGE = 100_000
_MAX_WORDS = 10_000
_GLOBALS: dict[str, Any] = {**cast(Any, defaults).DEFAULT_NAMESPACE}


class Refusal(OptionError):
    """What `raise_exception` of a template says about the conversation."""


def paid_globals() -> dict[str, Any]:
    """Return every global function and class."""
    return _GLOBALS | {
        "range": _range,
        "dict": DictMaker(),
        "namespace": Namespace,
        "lipsum": _lipsum,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }


class DictMaker:
    """The global `dict`: makes mappings, and has no attributes of the class."""

    @pass_context
    def __call__(self, context: Any, *args: Any, **options: Any) -> Any:
        """Return a mapping of pairs or of keyword arguments."""
        budget = context.budget
        if args and not isinstance(args[0], dict):
            pairs = [tuple(budget.read(pair)) for pair in budget.read(args[0])]
            budget.pay_keys([pair[0] for pair in pairs if pair])
            args = (pairs, *args[1:])
        elif args:
            budget.pay_keys(list(cast(Any, args[0])))
        return dict(*args, **options)

    @pass_context
    def fromkeys(self, context: Any, keys: Any, value: Any = None) -> Any:
        """Return a mapping from each key to one value."""
        keys = context.budget.read(keys)
        context.budget.pay_keys(keys)
        return dict.fromkeys(keys, value)


class Namespace(JinjaNamespace):
    """Variables that a loop may set; names that begin with an underscore are refused."""

    def __init__(*args: Any, **options: Any) -> None:
        self, values = args[0], dict[Any, Any](*args[1:], **options)
        for name in values:
            _check_name(name)
        JinjaNamespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # it may hold itself


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TypeError(f"a namespace cannot hold {name!r}")


def _range(*limits: int) -> range:
    values = range(*limits)
    if len(values) > MAX_RANGE:
        raise TooMuch(f"a range is longer than {MAX_RANGE}")
    return values


@pass_context
def _lipsum(context: Any, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> Any:
    words = abs(n) * (abs(max) + abs(min) + 1)
    if words > _MAX_WORDS:
        raise TooMuch(f"a filler text is longer than {_MAX_WORDS} words")
    context.budget.pay(512 * words)
    return _GLOBALS["lipsum"](n, html, min, max)


def _raise_exception(message: Any) -> NoReturn:
    raise Refusal(str(message)[:400])


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise TooMuch("a date format is longer than 100 characters")
    return datetime.datetime.now().strftime(format)
