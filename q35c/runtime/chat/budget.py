"""What one rendering may cost, and what every value weighs.

Everything is counted in bytes: those a value occupies, those an operation moves, and `STEP` for each
node of the template that is executed. A rendering has one budget, so it bounds time and memory alike.

A value's weight is that of its whole tree, as printing, comparing or hashing it walks the whole tree: a
list that holds another one twice weighs twice as much. Containers carry their weight, so that it is
known without a walk; no container can change after it was made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from types import GeneratorType
from typing import Any, cast

STEP = 32
MAX_BYTES = 128 << 20  # beside 32 times the conversation: a template copies a message about 8 times
MAX_DEPTH = 100
MAX_BITS = 1024  # of an integer; the largest float has as many
_OBJECT = 64  # more than a number, an empty container or a place in one


class Items(list[Any]):
    """A list that knows its weight."""

    __slots__ = ("depth", "weight")
    weight: int
    depth: int


class Table(dict[Any, Any]):
    """A mapping that knows its weight."""

    __slots__ = ("depth", "weight")
    weight: int
    depth: int


class Group(tuple[Any, ...]):
    """A tuple that knows its weight."""

    weight: int
    depth: int


class Series(Iterator[Any]):
    """What a filter yields one by one, as jinja's generators: true, without a length, used up once."""

    __slots__ = ("_values", "depth", "weight")

    def __init__(self, values: Items) -> None:
        self._values: Any = iter(values)
        self.weight, self.depth = values.weight, values.depth

    def __next__(self) -> Any:
        return next(self._values)

    def __length_hint__(self) -> int:
        return self._values.__length_hint__()


# Messages about values speak of the types that templates know.
for _kind, _base in ((Items, list), (Table, dict), (Group, tuple)):
    _kind.__name__, _kind.__module__ = _base.__name__, _base.__module__
_WEIGHED = (Items, Table, Group, Series)
_TABLE: dict[Any, Any] = {}
_VIEWS: tuple[type[Any], ...] = (type(_TABLE.keys()), type(_TABLE.values()), type(_TABLE.items()))
_SAMPLES: list[Any] = [
    *cast(tuple[Any, ...], ("", (), [], set(), range(0), _TABLE, _TABLE.items(), _TABLE.values()))
]
_ITERATORS: tuple[type[Any], ...] = (
    GeneratorType,
    *map(type, map(iter, _SAMPLES)),
    *map(type, map(reversed, _SAMPLES[1:3])),
    type(reversed(range(0))),
    type(reversed(_TABLE)),
)


class TooMuch(Exception):
    """A template asks for more than it may have."""


class Budget:
    """Count what one rendering does; refuse when it is too much."""

    __slots__ = ("_left",)

    def __init__(self, input_bytes: int = 0) -> None:
        """Prepare a budget for a conversation of that weight."""
        self._left = MAX_BYTES + 32 * input_bytes

    def pay(self, amount: int) -> None:
        """Take bytes from the budget. Raises TooMuch if it does not suffice."""
        left = self._left - amount
        if left < 0 or amount < 0:
            raise TooMuch("the template does too much work")
        self._left = left

    def weigh(self, value: Any) -> int:
        """Return the weight of a value's whole tree, in bytes."""
        if isinstance(value, str):
            return value.__sizeof__()
        return self.measure(value)[0]

    def measure(self, value: Any) -> tuple[int, int]:
        """Return the weight of a value and how deep it is nested. Pays for the walk."""
        if isinstance(value, (str, bytes)):
            return value.__sizeof__(), 0
        if isinstance(value, _WEIGHED):
            return value.weight, value.depth
        if isinstance(value, range):
            return _OBJECT * (len(value) + 1), 1
        if isinstance(value, dict):
            pairs = cast(dict[Any, Any], value)
            return self._sum((*pairs.keys(), *pairs.values()))
        if isinstance(value, (list, tuple, set, frozenset, *_VIEWS)):
            return self._sum(cast(Collection[Any], value))
        if isinstance(value, int) and value.bit_length() > 64:
            return 8 * _OBJECT, 0
        return _OBJECT, 0

    def _sum(self, values: Collection[Any]) -> tuple[int, int]:
        self.pay(2 * STEP * len(values))
        weight, depth = _OBJECT, 0
        for value in values:
            of_value, below = (value.__sizeof__(), 0) if type(value) is str else self.measure(value)
            weight += of_value + 8
            depth = below if below > depth else depth
            if depth >= MAX_DEPTH:
                raise TooMuch(f"the template nests values more than {MAX_DEPTH} deep")
            if weight > self._left:
                raise TooMuch("the template makes a value that is too large")
        return weight, depth + 1

    def text_bytes(self, value: Any) -> int:
        """Return the bytes that a value's text has at most; quoted texts may grow by escapes."""
        return value.__sizeof__() if isinstance(value, str) else 16 * self.weigh(value)

    def keep(self, value: Any) -> Any:
        """Return what an operation made in the form that templates may hold, paid for.

        Containers become weighed ones, iterators are read to their end.
        """
        if type(value) is str or value is None or isinstance(value, _WEIGHED):
            return value
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise TooMuch(f"the template makes an integer of more than {MAX_BITS} bits")
        elif isinstance(value, list):
            return self.items(cast(list[Any], value))
        elif isinstance(value, dict):
            return self.table(cast(dict[Any, Any], value))
        elif isinstance(value, tuple):
            return self.group(cast(tuple[Any, ...], value))
        elif isinstance(value, _ITERATORS):
            return Series(self.items(self.read(cast(Iterator[Any], value))))
        return value

    def items(self, values: list[Any], measured: tuple[int, int] | None = None) -> Items:
        """Return a list as a weighed one; `measured` are its weight and depth where known."""
        self.pay(_OBJECT + 8 * len(values))
        made = Items(values)
        made.weight, made.depth = self._sum(values) if measured is None else measured
        return made

    def table(self, values: dict[Any, Any]) -> Table:
        """Return a mapping as a weighed one."""
        self.pay(_OBJECT + 4 * _OBJECT * len(values))
        made = Table(values)
        made.weight, made.depth = self.measure(values)
        return made

    def group(self, values: tuple[Any, ...]) -> Group:
        """Return a tuple as a weighed one."""
        self.pay(_OBJECT + 8 * len(values))
        made = Group(values)
        made.weight, made.depth = self._sum(values)
        return made

    def read(self, values: Iterable[Any]) -> list[Any]:
        """Return the values of anything that can be iterated, paid for while reading."""
        if isinstance(values, str):
            self.pay(2 * _OBJECT * len(values))
            return list(values)
        if isinstance(values, (list, tuple, dict, set, range)):
            self.pay(8 * len(cast(list[Any], values)))
            return list(cast(Iterable[Any], values))
        made: list[Any] = []
        iterator = iter(values)
        while piece := list(islice(iterator, 64)):
            self.pay(2 * _OBJECT * len(piece))
            made += piece
        return made

    def pay_keys(self, keys: Collection[Any]) -> None:
        """Pay for hashing: equal hashes can be made on purpose, but not those of texts."""
        others = [key for key in keys if not isinstance(key, str)]
        self.pay(_OBJECT * len(keys) + len(others) * self._sum(others)[0] // 4)

    def pay_comparison(self, left: Any, right: Any) -> None:
        """Pay for comparing two values, which walks both trees in step."""
        if type(left) is str and type(right) is str:
            self.pay(min(len(left), len(right)) if len(left) == len(right) else STEP)
        else:
            self.pay(min(self.weigh(left), self.weigh(right)))

    def pay_membership(self, value: Any, container: Any) -> None:
        """Pay for `value in container`."""
        if isinstance(container, str):
            self.pay(search_bytes(container, value) if isinstance(value, str) else STEP)
        elif isinstance(value, str) and isinstance(container, (dict, set, frozenset)):
            self.pay(_OBJECT + len(value) // 16)
        elif hasattr(container, "__len__"):
            each = _OBJECT + self.weigh(value)
            self.pay(min(self.weigh(container), len(container) * each) + each)
        else:
            self.pay(self.weigh(container) + self.weigh(value))


def search_bytes(text: str, part: str, backwards: bool = False) -> int:
    """Return the cost of searching a text; CPython's search from the right is quadratic."""
    passes = len(part) if backwards else min(len(part), 100)
    return text.__sizeof__() // 8 + len(text) * passes // 64 + STEP
