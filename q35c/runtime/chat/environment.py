"""The environment in which chat templates are compiled and run.

jinja compiles a template to Python. Before that its syntax tree is rewritten (`rewrite`), so that whatever
takes more than constant time goes through a filter that pays for it from the budget in the context.
Operators, calls and attributes come to the methods of `Environment`.
"""

from __future__ import annotations

import functools
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import _GroupTuple  # pyright: ignore[reportPrivateUsage]
from jinja2.runtime import (
    BlockReference,
    Context,
    LoopContext,
    Macro,
    TemplateReference,
    Undefined,
    markup_join,
    str_join,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner
from markupsafe import Markup, escape

from q35c.runtime.chat.budget import STEP, Budget, Group, Items, Series, Table
from q35c.runtime.chat.filters import add, paid_filters, paid_tests
from q35c.runtime.chat.globals import DictMaker, Namespace, paid_globals
from q35c.runtime.chat.methods import (
    ESCAPED,
    call_method,
    compare,
    pay_operator,
    percent_format,
)
from q35c.runtime.chat.rewrite import PREFIX, Payer, check_tree


class PaidContext(Context):
    """The variables of one rendering, and its budget."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        """Return a context with more variables and the same budget."""
        context = super().derived(locals)
        cast(PaidContext, context).budget = self.budget
        return context


class Generation(Extension):
    """The tag `{% generation %}` of transformers marks what the model says: it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """Return the body as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Environment(ImmutableSandboxedEnvironment):
    """Pay for what jinja does without filters; let through only the attributes that are known."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    context_class = PaidContext

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        check_tree(tree)
        return cast(nodes.Template, Payer().visit(tree))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return a known method or attribute of a value, else an item, else undefined."""
        names = _ATTRIBUTES.get(cast(Any, type(obj)))
        if names is None:
            return self._other_attribute(obj, attribute)
        if attribute in names:
            return getattr(obj, attribute)
        try:
            return obj[attribute]
        except (TypeError, LookupError):
            return self._missing(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, else a known attribute of that name, else undefined."""
        try:
            return obj[argument]
        except (TypeError, LookupError):
            if not isinstance(argument, str):
                return self.undefined(obj=obj, name=argument)
        names = _ATTRIBUTES.get(cast(Any, type(obj)))
        if names is None:
            return self._other_attribute(obj, argument)
        return getattr(obj, argument) if argument in names else self._missing(obj, argument)

    def _other_attribute(self, obj: Any, attribute: str) -> Any:
        for kind, names in _ATTRIBUTES_OF_OBJECTS:
            if isinstance(obj, kind):
                if names is None or attribute in names:
                    return super().getattr(obj, attribute)
                break
        return self.undefined(obj=obj, name=attribute)

    def _missing(self, obj: Any, attribute: str) -> Any:
        # What only changes a container says so when it is used, as in jinja's sandbox.
        if hasattr(cast(Any, type(obj)), attribute):
            return self.unsafe_undefined(obj, attribute)
        return self.undefined(obj=obj, name=attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the result of a binary operator."""
        budget = context.budget
        if operator == "+":
            return add(budget, left, right)
        if operator == "%" and isinstance(left, (str, bytes)):
            if isinstance(left, bytes):
                raise TypeError("bytes cannot be formatted")
            return percent_format(budget, left, right)
        pay_operator(budget, operator, left, right)
        return budget.keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        """Return the result of a call of a method, macro or global."""
        budget = __context.budget
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            owner: Any = __obj.__self__
            if isinstance(owner, (*_DATA, _KEYS, _PAIRS)) or owner in _DATA_TYPES:
                options.pop("_loop_vars", None)
                options.pop("_block_vars", None)
                return call_method(__self, budget, __obj, args, options)
        budget.pay(4 * STEP)
        for value in (*args, *options.values()):
            budget.pay(budget.weigh(value) // 16)
        return budget.keep(__context.call(__obj, *args, **options))


_TEXT_NAMES = frozenset(name for name in dir(str) if not name.startswith("_"))
_LIST_NAMES = frozenset(("copy", "count", "index"))
_TABLE_NAMES = frozenset(("copy", "fromkeys", "get", "items", "keys", "values"))
_SET_NAMES = frozenset(
    [
        "copy",
        "difference",
        "intersection",
        "isdisjoint",
        "issubset",
        "issuperset",
        "symmetric_difference",
        "union",
    ]
)
_VIEW_NAMES = frozenset(("isdisjoint",))


def _public(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if not name.startswith("_"))


_NUMBERS = (int, bool, float)
_TABLE: dict[Any, Any] = {}
_KEYS, _PAIRS = type(_TABLE.keys()), type(_TABLE.items())
_DATA: tuple[type[Any], ...] = (str, bytes, list, tuple, dict, set, frozenset, *_NUMBERS, range)
_DATA_TYPES: tuple[Any, ...] = (str, bytes, dict, Table, Markup, *_NUMBERS)
# What templates may reach, by exact type.
_ATTRIBUTES: dict[type[Any], frozenset[str]] = {
    dict: _TABLE_NAMES,
    Table: _TABLE_NAMES,
    str: _TEXT_NAMES,
    list: _LIST_NAMES,
    Items: _LIST_NAMES,
    tuple: frozenset(("count", "index")),
    Group: frozenset(("count", "index")),
    Markup: _TEXT_NAMES | {"striptags", "unescape"},
    bytes: _public(bytes),
    set: _SET_NAMES,
    frozenset: _SET_NAMES,
    range: _public(range),
    Series: frozenset(),
    _KEYS: _VIEW_NAMES,
    _PAIRS: _VIEW_NAMES,
    **{kind: _public(kind) for kind in _NUMBERS},
}


# ... and of objects of jinja; None stands for every public name.
_ATTRIBUTES_OF_OBJECTS: tuple[tuple[type, frozenset[str] | None], ...] = (
    (Namespace, None),
    (Undefined, None),
    (LoopContext, _public(LoopContext)),
    (Macro, frozenset(("arguments", "caller", "catch_kwargs", "catch_varargs", "name"))),
    (TemplateReference, None),
    (BlockReference, frozenset(("super",))),
    (Cycler, frozenset(("current", "items", "next", "pos", "reset"))),
    (Joiner, frozenset(("sep", "used"))),
    (DictMaker, frozenset(("fromkeys",))),
    (_GroupTuple, frozenset(("count", "grouper", "index", "list"))),
)


def _pay_nodes(context: Any, cost: int) -> bool:
    context.budget.pay(cost)
    return True


def _loop(context: Any, value: Any) -> Any:
    budget = context.budget
    if hasattr(value, "__len__"):
        budget.pay(STEP * len(value))
        return value
    return budget.items(budget.read(value))


def _spread(context: Any, value: Any) -> Any:
    context.budget.pay(8 * STEP * len(value) if hasattr(value, "__len__") else STEP)
    return value if hasattr(value, "__len__") else context.budget.read(value)


def _compare(context: Any, value: Any, *pairs: Any) -> Any:
    return compare(context.budget, value, pairs)


def _concatenate(context: Any, values: list[Any]) -> str:
    budget = context.budget
    growth = ESCAPED if context.eval_ctx.autoescape else 1
    budget.pay(2 * growth * sum(map(budget.text_bytes, values)) + STEP)
    return markup_join(values) if context.eval_ctx.autoescape else str_join(values)


def _slice(context: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
    budget, part = context.budget, cast(Any, slice(start, stop, step))
    if hasattr(value, "__len__"):
        length = len(range(*part.indices(len(value))))
        is_narrow = isinstance(value, str) and value.isascii()
        budget.pay((1 if is_narrow else 4 if isinstance(value, str) else 8) * length + 4 * STEP)
    return budget.keep(value[part])


def _item(context: Any, value: Any, key: Any) -> Any:
    budget = context.budget
    if type(key) is not int:
        is_odd = isinstance(value, dict) and not isinstance(key, str)
        budget.pay((1 + (len(cast(Any, value)) if is_odd else 0)) * budget.weigh(key))
    return context.environment.getitem(value, key)


def _made(context: Any, value: Any) -> Any:
    if isinstance(value, dict):
        context.budget.pay_keys(list(cast(dict[Any, Any], value)))
    return context.budget.keep(value)


@pass_context
def _written(context: Any, value: Any) -> Any:
    """Return the text that is put out for a value; once by itself and once in the whole text."""
    budget = context.budget
    if context.eval_ctx.autoescape:
        budget.pay(2 * ESCAPED * budget.text_bytes(value))
        return escape(value)
    if type(value) is str:
        budget.pay(2 * value.__sizeof__())
        return value
    budget.pay(2 * budget.text_bytes(value))
    return str(value)


_INNER_FILTERS = {
    PREFIX + name: pass_context(function)
    for name, function in {
        "nodes": _pay_nodes,
        "loop": _loop,
        "spread": _spread,
        "compare": _compare,
        "concatenate": _concatenate,
        "slice": _slice,
        "item": _item,
        "made": _made,
    }.items()
}


@functools.cache
def environment() -> Environment:
    """Return the environment; it holds no state of a rendering, so all threads share it."""
    made = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        finalize=_written,
        optimized=False,  # the optimizer would compute constants without paying for them
        cache_size=0,
    )
    made.filters = paid_filters() | _INNER_FILTERS
    made.tests = paid_tests()
    made.globals = paid_globals()
    return made
