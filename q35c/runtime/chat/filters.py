"""Filters and tests of chat templates: those of jinja and transformers, each at a price.

A filter of jinja that has neither a row in `_COSTS` nor a function here does not exist for templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from jinja2 import filters as jinja_filters
from jinja2 import pass_context
from jinja2 import tests as jinja_tests
from jinja2.utils import _PassArg  # pyright: ignore[reportPrivateUsage]
from markupsafe import Markup, escape

from q35c.runtime.chat.budget import STEP, Budget, Items, TooMuch
from q35c.runtime.chat.methods import (
    ESCAPED,
    MAX_DIGITS,
    add_lists,
    lines_in,
    pay_join,
    pay_operator,
    pay_rare,
    pay_replace,
    percent_format,
)

MAX_PRECISION = 100
Cost = Callable[..., Any]
_FILTERS: dict[str, Any] = {**cast(Any, jinja_filters).FILTERS}
_TESTS: dict[str, Any] = {**cast(Any, jinja_tests).TESTS}


def paid_filters() -> dict[str, Any]:
    """Return every filter, paid for before it runs."""
    own = {"join": _join, "sum": _sum, "tojson": to_json, "attr": _attr, "format": _format}
    own |= {"sort": _ordered("sort", 2), "groupby": _ordered("groupby", 0)}
    own |= {"min": _ordered("min", 1), "max": _ordered("max", 1)}
    own |= {"unique": _ordered("unique", 1, hashes=True)}
    priced = {
        name: _paid(_FILTERS[name], cost)
        for names, cost in _COSTS.items()
        for name in names.split()
    }
    return priced | {name: pass_context(function) for name, function in own.items()}


def paid_tests() -> dict[str, Any]:
    """Return every test; those that do more than look at a type are paid for."""
    free = {name: test for name, test in _TESTS.items() if name.isidentifier()}
    comparing = {name: _paid(_TESTS[name], _pay_both) for name in _COMPARING.split()}
    numeric = {name: _paid(free[name], _only_numbers) for name in ("odd", "even", "divisibleby")}
    texts = {name: _paid(free[name], _text()) for name in ("lower", "upper")}
    return free | comparing | numeric | texts | {"in": _paid(free["in"], _member)}


def _paid(function: Any, cost: Cost) -> Any:
    """Return a filter or test that pays before it runs, and whose result is kept."""
    kind = _PassArg.from_obj(function)

    @pass_context
    def paying(context: Any, value: Any, *args: Any, **options: Any) -> Any:
        budget = context.budget
        budget.pay(STEP)
        changed = cost(budget, value, *args, **options)
        if changed is not None:  # an iterator that had to be read
            value = changed
        if kind is None:
            return budget.keep(function(value, *args, **options))
        first = {"context": context, "eval_context": context.eval_ctx}.get(
            kind.name, context.environment
        )
        return budget.keep(function(first, value, *args, **options))

    return paying


def _text(factor: int = 1) -> Cost:
    """Return the cost of a filter whose text is at most `factor` times as large as the value's."""

    def cost(budget: Budget, value: Any, *args: Any, **options: Any) -> None:
        others = sum(map(budget.text_bytes, (*args, *options.values())))
        budget.pay(factor * (budget.text_bytes(value) + others))

    return cost


def _trim(budget: Budget, value: Any, chars: Any = None) -> None:
    size = budget.text_bytes(value)
    budget.pay(size + (size * len(chars) // 16 if chars is not None else 0))


def _center(budget: Budget, value: Any, width: int = 80) -> None:
    budget.pay(4 * budget.text_bytes(value) + 4 * max(0, width))


def _indent(
    budget: Budget, s: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> None:
    lines = lines_in(s) + 1 if isinstance(s, str) else budget.text_bytes(s)
    size = len(width) if isinstance(width, str) else max(0, width)
    budget.pay(4 * budget.text_bytes(s) + lines * (64 + 4 * ESCAPED * size))


def _replace(budget: Budget, s: Any, old: Any, new: Any, count: Any = None) -> None:
    has_markup = any(isinstance(value, Markup) for value in (s, old, new))
    budget.pay((ESCAPED if has_markup else 1) * sum(map(budget.text_bytes, (s, old, new))))
    turned = escape if has_markup else str
    pay_replace(budget, turned(s), turned(old), turned(new), count)


def _rare(budget: Budget, value: Any, *args: Any, **options: Any) -> None:
    pay_rare(budget, value, *args, *options.values())


def _number(budget: Budget, value: Any, *args: Any, **options: Any) -> None:
    if isinstance(value, (str, bytes)) and len(value) > MAX_DIGITS:
        raise TooMuch("a text that becomes a number is too long")
    budget.pay(4 * STEP)


def _round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> None:
    if abs(precision) > MAX_PRECISION:
        raise TooMuch(f"a number is rounded to more than {MAX_PRECISION} places")


def _only_numbers(budget: Budget, value: Any, *others: Any) -> None:
    if isinstance(value, (str, bytes)):  # `%` would format it
        raise TypeError("the test needs a number")


def _pay_both(budget: Budget, value: Any, other: Any) -> None:
    budget.pay_comparison(value, other)


def _member(budget: Budget, value: Any, container: Any) -> None:
    budget.pay_membership(value, container)


def _free(budget: Budget, value: Any, *args: Any, **options: Any) -> None:
    """A filter that looks at a value or hands it on."""


def _listed(budget: Budget, value: Any) -> Any:
    """Pay for reading a value's items; return them as a list if they come one by one."""
    if isinstance(value, (str, bytes)):
        budget.pay(128 * len(value))
        return None
    if hasattr(value, "__len__"):
        budget.pay(4 * STEP * len(value))
        return None
    return budget.items(budget.read(value)) if hasattr(value, "__iter__") else None


def _each(budget: Budget, value: Any, *args: Any, **options: Any) -> Any:
    """Pay for a filter that does something to every item; an attribute's path is walked for each."""
    changed = _listed(budget, value)
    paths = [x for x in (*args, *options.values()) if isinstance(x, str)]
    if paths:
        length = len(value if changed is None else changed) if _has_length(value, changed) else 0
        budget.pay(length * (STEP + sum(map(len, paths))))
    return changed


def _has_length(value: Any, changed: Any) -> bool:
    return changed is not None or hasattr(value, "__len__")


def _batch(budget: Budget, value: Any, linecount: Any, fill_with: Any = None) -> Any:
    if fill_with is not None:
        budget.pay(8 * max(0, int(linecount)))
    return _listed(budget, value)


def _slice(budget: Budget, value: Any, slices: int, fill_with: Any = None) -> Any:
    budget.pay(192 * max(0, slices))
    return _listed(budget, value)


def _dictsort(
    budget: Budget, value: Any, case_sensitive: Any = False, by: Any = "key", reverse: Any = False
) -> None:
    budget.pay(2 * STEP * len(value))
    _pay_sort(budget, value, len(value))


def _pay_sort(budget: Budget, keys: Any, length: int) -> None:
    # Every key is compared about log2(n) times, in lower case, which is another copy of it.
    budget.pay((budget.weigh(keys) + STEP * length) * (3 + 2 * length.bit_length()))


def _ordered(name: str, place: int, hashes: bool = False) -> Any:
    """Return a filter that compares the items, or an attribute of them: its argument at `place`."""
    paid = _paid(_FILTERS[name], _free)

    @pass_context
    def ordering(context: Any, value: Any, *args: Any, **options: Any) -> Any:
        budget = context.budget
        changed = _each(budget, value, *args, **options)
        items = value if changed is None else changed
        if isinstance(items, str):
            budget.pay(1024 * len(items))
        elif hasattr(items, "__len__"):
            attribute = options.get("attribute", args[place] if len(args) > place else None)
            keys = _attributes(context, list(items), attribute)
            _pay_sort(budget, keys, len(keys))
            if hashes:
                budget.pay_keys(keys)
        return paid(context, items, *args, **options)

    return ordering


def _attributes(context: Any, items: list[Any], attribute: Any) -> list[Any]:
    """Return an attribute of each item, or of several joined by commas their list; or the items."""
    if attribute is None:
        return items
    several = isinstance(attribute, str) and "," in attribute
    make = jinja_filters.make_multi_attrgetter if several else jinja_filters.make_attrgetter
    getter = cast(Callable[[Any], Any], make(context.environment, attribute))
    return [getter(item) for item in items]


def _format(context: Any, value: Any, *args: Any, **options: Any) -> str:
    if args and options:
        raise TypeError("a format takes positional or keyword arguments, not both")
    context.budget.pay(context.budget.text_bytes(value))
    return percent_format(context.budget, str(value), options or args)


def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    budget = context.budget
    changed = _each(budget, value, *(() if attribute is None else (attribute,)))
    items = budget.read(value if changed is None else changed)
    items = _attributes(context, items, attribute)
    budget.pay(ESCAPED * budget.text_bytes(d) if context.eval_ctx.autoescape else STEP)
    growth = ESCAPED if context.eval_ctx.autoescape else 1
    texts = pay_join(budget, str(d), items)
    budget.pay((growth - 1) * sum(map(budget.text_bytes, texts)))
    return jinja_filters.sync_do_join(context.eval_ctx, texts, d)


def _sum(context: Any, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    budget = context.budget
    changed = _each(budget, value, *(() if attribute is None else (attribute,)))
    items = _attributes(context, budget.read(value if changed is None else changed), attribute)
    if isinstance(start, str):
        raise TypeError("texts are joined, not summed")
    total = start
    for item in items:
        total = add(budget, total, item)
    return total


def add(budget: Budget, left: Any, right: Any) -> Any:
    """Return `left + right`, paid for."""
    if type(left) is Items and type(right) is Items:
        return add_lists(budget, left, right)
    pay_operator(budget, "+", left, right)
    return budget.keep(left + right)


def _attr(context: Any, value: Any, name: Any) -> Any:
    """Return an attribute of a value, never an item."""
    name = str(name)
    if isinstance(value, Mapping) and name not in dir(dict):
        return context.environment.undefined(obj=value, name=name)
    return context.environment.getattr(value, name)


def to_json(
    context: Any,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON, as transformers writes it: nothing is escaped for HTML."""
    budget = context.budget
    weight, depth = budget.measure(x)
    margin = len(indent) if isinstance(indent, str) else max(0, indent or 0)
    margin = depth * margin + sum(map(len, separators or ()))
    # A control character becomes six; the text has to be as wide as its widest character.
    growth = 3 if isinstance(x, str) and x.isprintable() else 24
    budget.pay(growth * weight + 4 * margin * (weight // 8))
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_COMPARING = "== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le"
_COSTS: dict[str, Cost] = {
    "lower upper": _text(3),
    "capitalize title wordcount": _text(64),
    "e escape forceescape": _text(ESCAPED),
    "string safe truncate": _text(),
    "trim": _trim,
    "center": _center,
    "indent": _indent,
    "replace": _replace,
    "striptags urlize xmlattr pprint wordwrap urlencode": _rare,
    "abs int float filesizeformat": _number,
    "round": _round,
    "d default first last length count random": _free,
    "list items reverse": _listed,
    "map select reject selectattr rejectattr": _each,
    "batch": _batch,
    "slice": _slice,
    "dictsort": _dictsort,
}
