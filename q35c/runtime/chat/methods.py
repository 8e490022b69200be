"""Methods and operators that a template may use on values, and what each of them costs.

Costs are paid before the work is done. Where a result may be larger than what it is made of, its size is
computed first.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any, cast

from markupsafe import Markup, escape

from q35c.runtime.chat.budget import MAX_BITS, STEP, Budget, Items, TooMuch, search_bytes

MAX_WIDTH = 1000  # of a formatted field
MAX_DIGITS = 4300  # of a text that becomes a number
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
MAX_RARE = 16 << 10  # bytes of a value for what takes more than linear time
ESCAPED = 6  # a character grows by so much at most
_PART = 128  # a short text and its place in a list
_CODECS = ("utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32")


def lines_in(text: str | bytes) -> int:
    """Return at least the number of lines of a text."""
    if isinstance(text, bytes):
        return text.count(b"\n") + text.count(b"\r") + 1
    return sum(map(text.count, _LINE_ENDS)) + 1


def pay_replace(budget: Budget, text: str, old: str, new: str, count: Any = -1) -> None:
    """Pay for replacing a part of a text."""
    budget.pay(search_bytes(text, old))
    places = text.count(old)
    if isinstance(count, int) and count >= 0:
        places = min(places, count)
    width = min(4, text.__sizeof__() // max(1, len(text))) if new.isascii() else 4
    budget.pay(width * (len(text) + places * len(new)))


def pay_join(budget: Budget, separator: str, values: Iterable[Any]) -> Items:
    """Pay for joining the texts of values; return them as a list."""
    items = budget.items(budget.read(values))
    growth = ESCAPED if isinstance(separator, Markup) else 1
    size = sum(map(budget.text_bytes, items)) + len(items) * separator.__sizeof__()
    budget.pay(growth * size)
    return items


def percent_format(budget: Budget, form: str, values: Any) -> str:
    """Return `form % values`. Raises TooMuch for fields that are very wide."""
    if any(int(digits) > MAX_WIDTH for digits in re.findall(r"\d{1,10}", form)):
        raise TooMuch(f"a formatted field is wider than {MAX_WIDTH}")
    arguments = cast(tuple[Any, ...], values) if isinstance(values, tuple) else (values,)
    if "*" in form:
        for value in arguments:
            if isinstance(value, int) and abs(value) > MAX_WIDTH:
                raise TooMuch(f"a formatted field is wider than {MAX_WIDTH}")
    each = sum(map(budget.text_bytes, arguments)) * ESCAPED + 4 * MAX_WIDTH
    budget.pay(form.__sizeof__() + form.count("%") * each)
    return form % values


class _PaidFormatter(Formatter):
    """Format like `str.format`, through the environment's attributes and within the budget."""

    def __init__(self, environment: Any, budget: Budget, escapes: bool) -> None:
        self._environment, self._budget, self._escapes = environment, budget, escapes

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        from _string import formatter_field_name_split  # type: ignore

        first, rest = cast(Any, formatter_field_name_split)(field_name)
        value = self.get_value(first, args, kwargs)
        for is_attribute, name in rest:
            self._budget.pay(STEP)
            getter = self._environment.getattr if is_attribute else self._environment.getitem
            value = getter(value, name)
        return value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        if any(int(digits) > MAX_WIDTH for digits in re.findall(r"\d{1,10}", format_spec)):
            raise TooMuch(f"a formatted field is wider than {MAX_WIDTH}")
        self._budget.pay(4 * MAX_WIDTH if format_spec else STEP)
        self._budget.pay(ESCAPED * self._budget.text_bytes(value))
        text = super().format_field(value, format_spec)
        return escape(text) if self._escapes else text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion:
            self._budget.pay(16 * self._budget.weigh(value))
        return super().convert_field(value, conversion)


def _format(environment: Any, budget: Budget, form: str, args: Any, options: Any) -> str:
    budget.pay(8 * form.__sizeof__())
    is_markup = isinstance(form, Markup)
    text = _PaidFormatter(environment, budget, is_markup).vformat(str(form), args, options)
    budget.pay(text.__sizeof__())
    return Markup(text) if is_markup else text


def call_method(environment: Any, budget: Budget, method: Any, args: Any, options: Any) -> Any:
    """Call a method of a text, number or container, paid for."""
    owner, name = method.__self__, method.__name__
    budget.pay(2 * STEP)
    if name in ("format", "format_map") and isinstance(owner, str):
        if name == "format_map":
            (options,) = args
            args = ()
        return _format(environment, budget, owner, args, options)
    if isinstance(owner, Markup):
        args = tuple(_escaped(budget, value) for value in args)
    if name == "join" and isinstance(owner, (str, bytes)):
        (parts,) = args
        args = (pay_join(budget, cast(str, owner), parts),)
    elif name == "fromkeys":
        args = (budget.read(args[0]), *args[1:])
        budget.pay_keys(args[0])
        return budget.keep(dict.fromkeys(*args))
    else:
        _pay_method(budget, owner, name, (*args, *options.values()))
    return budget.keep(method(*args, **options))


def _pay_method(budget: Budget, owner: Any, name: str, values: tuple[Any, ...]) -> None:
    if isinstance(owner, (str, bytes)):
        _pay_text_method(budget, owner, name, values)
    elif isinstance(owner, dict):
        budget.pay(4 * STEP)
        if name == "get" and not isinstance(values[0], str):
            budget.pay(len(cast(Any, owner)) * (STEP + budget.weigh(values[0])))
    elif name == "isdisjoint" or isinstance(owner, (set, frozenset)):
        budget.pay_keys(
            [
                item
                for value in cast(tuple[Any, ...], (owner, *values))
                for item in budget.read(value)
            ]
        )
    elif name in ("index", "count") and values:
        budget.pay_membership(values[0], owner)
    else:  # of numbers
        budget.pay(sum(abs(value) for value in values if isinstance(value, int)))
        budget.pay(sum(map(budget.weigh, values)) * (512 if name == "maketrans" else 1))


def _escaped(budget: Budget, value: Any) -> Any:
    """Return a text as markup would take it in, so that the costs of methods hold for it."""
    if type(value) is not str:
        return value
    budget.pay(ESCAPED * value.__sizeof__())
    return escape(value)


def _pay_text_method(budget: Budget, owner: str | bytes, name: str, values: Any) -> None:
    size = owner.__sizeof__()
    pay = _TEXT_COSTS.get(name)
    if name in _LOOKS:
        budget.pay(size // 16 + STEP)
    elif pay is not None:
        pay(budget, owner, *values)
    elif any(name.endswith(kind) for kind in ("find", "index", "partition", "count")):
        (part, *_) = values
        budget.pay(2 * size if name.endswith("partition") else STEP)
        budget.pay(search_bytes(cast(str, owner), part, backwards=name.startswith("r")))
    else:
        budget.pay(3 * size + 3 * sum(map(budget.weigh, values)))


def _pay_strip(budget: Budget, owner: str, chars: Any = None) -> None:
    budget.pay(owner.__sizeof__() + STEP)
    if chars is not None:
        budget.pay(len(owner) * len(chars) // 16)


def _pay_split(budget: Budget, owner: str, separator: Any = None, maxsplit: int = -1) -> None:
    if separator is None:
        parts = len(owner) // 2 + 1
    else:
        budget.pay(search_bytes(owner, separator))
        parts = owner.count(separator) + 1
    if maxsplit >= 0:
        parts = min(parts, maxsplit + 1)
    budget.pay(owner.__sizeof__() + _PART * parts)


def _pay_rsplit(budget: Budget, owner: str, separator: Any = None, maxsplit: int = -1) -> None:
    if separator is not None:
        budget.pay(search_bytes(owner, separator, backwards=True))
    _pay_split(budget, owner, separator, maxsplit)


def _pay_splitlines(budget: Budget, owner: str, keepends: Any = False) -> None:
    budget.pay(owner.__sizeof__() + _PART * lines_in(owner))


def _pay_width(budget: Budget, owner: str, width: int, fill: Any = None) -> None:
    budget.pay(4 * len(owner) + 4 * max(0, width) + STEP)


def _pay_expandtabs(budget: Budget, owner: str, tabsize: int = 8) -> None:
    budget.pay(4 * len(owner) * max(1, tabsize))


def _pay_encode(
    budget: Budget, owner: str, encoding: str = "utf-8", errors: str = "strict"
) -> None:
    if encoding.lower() not in _CODECS or errors not in ("strict", "ignore", "replace"):
        raise TooMuch("the template uses a text encoding that is not allowed")
    budget.pay(4 * owner.__sizeof__())


def _pay_translate(budget: Budget, owner: str, table: Any) -> None:
    values: list[Any] = list(cast(Any, table).values()) if isinstance(table, dict) else []
    largest = max((len(value) for value in values if isinstance(value, str)), default=1)
    budget.pay(len(owner) * (STEP + 4 * largest) + budget.weigh(table))


def _pay_maketrans(budget: Budget, owner: str, *values: Any) -> None:
    budget.pay(4 * _PART * sum(len(value) for value in values))


def _pay_starts(budget: Budget, owner: str, part: Any, *limits: Any) -> None:
    budget.pay(budget.weigh(part))


def pay_rare(budget: Budget, *values: Any) -> None:
    """Pay for work that is not linear in the size of its values, which are small therefore."""
    size = sum(map(budget.weigh, values))
    if size > MAX_RARE:
        raise TooMuch(f"the template processes more than {MAX_RARE} bytes in a slow operation")
    budget.pay(64 * size)


def _pay_replace(budget: Budget, owner: Any, old: Any, new: Any, count: Any = -1) -> None:
    pay_replace(budget, owner, old, new, count)


# Methods that look at a text once.
_LOOKS = frozenset(name for name in dir(str) if name.startswith("is"))
_TEXT_COSTS: dict[str, Callable[..., None]] = {
    "strip": _pay_strip,
    "lstrip": _pay_strip,
    "rstrip": _pay_strip,
    "split": _pay_split,
    "rsplit": _pay_rsplit,
    "splitlines": _pay_splitlines,
    "center": _pay_width,
    "ljust": _pay_width,
    "rjust": _pay_width,
    "zfill": _pay_width,
    "expandtabs": _pay_expandtabs,
    "encode": _pay_encode,
    "decode": _pay_encode,
    "translate": _pay_translate,
    "maketrans": _pay_maketrans,
    "startswith": _pay_starts,
    "endswith": _pay_starts,
    "replace": _pay_replace,
    "unescape": pay_rare,
    "striptags": pay_rare,
}

_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}


def compare(budget: Budget, value: Any, pairs: Iterable[Any]) -> Any:
    """Return whether a chain of comparisons holds: names of operators and operands in turn."""
    result = True
    steps = iter(pairs)
    for name, other in zip(steps, steps, strict=True):
        if name in ("in", "notin"):
            budget.pay_membership(value, other)
            result = (value in other) is (name == "in")
        else:
            budget.pay_comparison(value, other)
            result = _COMPARISONS[name](value, other)
        if not result:
            break
        value = other
    return result


def pay_operator(budget: Budget, name: str, left: Any, right: Any) -> None:
    """Pay for a binary operator on two values. Raises TooMuch for powers that are too large."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if name == "**":
            _check_power(left, right)
    elif name == "*":
        sequence, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int):
            each = 8 if isinstance(sequence, (list, tuple)) else 4
            budget.pay(max(0, times) * (each * len(cast(Any, sequence)) + STEP))
    elif name == "+":
        _pay_sum(budget, left, right)
    elif name == "-":
        for value in (left, right):
            if hasattr(value, "__len__"):
                budget.pay_keys(budget.read(cast(Any, value)))


def _pay_sum(budget: Budget, left: Any, right: Any) -> None:
    for value in (left, right):
        if isinstance(value, (str, bytes)):
            budget.pay(value.__sizeof__() * (1 if type(value) is str else ESCAPED))
        elif isinstance(value, (list, tuple)):
            budget.pay(8 * len(cast(Any, value)))
    if type(left) is str and type(right) is str:  # one of them may have to be widened
        narrow, wide = sorted((left, right), key=str.isascii, reverse=True)
        budget.pay(3 * len(narrow) if not wide.isascii() else 0)


def _check_power(base: float, exponent: float) -> None:
    if not isinstance(base, int) or not isinstance(exponent, int) or abs(base) < 2:
        return
    if exponent * math.log2(abs(base)) > MAX_BITS + 1:
        raise TooMuch(f"the template makes an integer of more than {MAX_BITS} bits")


def add_lists(budget: Budget, left: Items, right: Items) -> Items:
    """Return two lists as one, whose weight is known without a walk."""
    measured = left.weight + right.weight, max(left.depth, right.depth)
    budget.pay(8 * (len(left) + len(right)))
    return budget.items(left + right, measured)
