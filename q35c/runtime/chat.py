"""Render a chat template in a sandbox. Imports jinja2 on first use.

Templates come from the checkpoint and may be hostile. The sandbox denies attributes and calls that lead out
of it; only the filters, globals and text methods that chat templates use are there; and a budget
bounds what a template may do: every loop pass, call and character made is paid for.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

from q35c.errors import OptionError, TokenizerError

MAX_TEMPLATE_BYTES = 1 << 20
_MAX_STEPS = 200_000  # loop passes, calls and filters: thousands of messages need a few each
_MAX_CHARACTERS = 128 << 20  # made by all operations together
_MAX_RANGE = 10_000
_FILTERS = """abs capitalize count d default dictsort e escape first float int items join last length
list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum
title trim unique upper"""
_TEXT_METHODS = """capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace
isupper join lower lstrip partition removeprefix removesuffix replace rfind rpartition rsplit rstrip
split splitlines startswith strip title upper"""

Message = Mapping[str, Any]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """Return the prompt text of a conversation. Raises OptionError for messages the template refuses.

    `special_tokens` are variables like `eos_token`; further keyword arguments reach the template, as
    `enable_thinking`. Raises TokenizerError if the template itself is broken.
    """
    compiled = compile_template(template)
    known: dict[str, Any] = {**(special_tokens or {}), **variables}
    known |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    try:
        return compiled.render(known)
    except MemoryError:
        raise TokenizerError("chat template uses too much memory") from None
    except Exception as error:  # a template can raise anything, in expressions it evaluates
        raise OptionError(
            f"the chat template refuses the conversation: {error}"[:500],
            where="messages",
            hint="check the roles and the content of the messages",
        ) from None


def compile_template(template: str) -> Any:
    """Return a template that is ready to render. Raises TokenizerError if it is malformed or too large."""
    import jinja2

    if len(template) > MAX_TEMPLATE_BYTES:
        raise TokenizerError("chat template is too large", expected=f"{MAX_TEMPLATE_BYTES} bytes")
    try:
        return _environment().from_string(template)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
        raise TokenizerError(f"chat template is malformed: {error}"[:500]) from None


class _Budget:
    """Count what one rendering does; refuse when it is too much."""

    def __init__(self) -> None:
        self._steps, self._characters = _MAX_STEPS, _MAX_CHARACTERS

    def pay(self, steps: int = 0, characters: int = 0) -> None:
        """Take from the budget. Raises ValueError if it does not suffice."""
        self._steps -= steps
        self._characters -= characters
        if self._steps < 0 or self._characters < 0:
            raise ValueError("the template does too much")

    def made(self, value: Any) -> Any:
        """Pay for a value that an operation made, and return it."""
        if isinstance(value, (str, list, tuple, dict)):
            self.pay(characters=len(cast(str, value)))
        return cast(Any, value)

    def filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that its result is paid for."""

        @functools.wraps(function)  # jinja keeps what to pass in an attribute
        def paying(*args: Any, **options: Any) -> Any:
            self.pay(steps=1)
            return self.made(function(*args, **options))

        return paying

    def loop(self, values: Any) -> Any:
        """Pay for a loop's passes: at once where the length is known, else one by one."""
        if not hasattr(values, "__len__"):
            return self._counted(values)
        self.pay(steps=len(values))
        return values

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.pay(steps=1)
            yield value

    def concatenate(self, parts: Iterable[Any]) -> str:
        """Join what a template puts out; also what blocks and macros capture, and `~`."""
        pieces: list[str] = []
        for part in parts:
            text = str(part)
            self.pay(characters=len(text) + 1)
            pieces.append(text)
        return "".join(pieces)

    def replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        """Replace like the filter, paid in advance."""
        text, old, new = str(text), str(old), str(new)
        self.pay(characters=len(text) + (text.count(old) + 1) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def join(self, values: Iterable[Any], separator: Any = "") -> str:
        """Join like the filter, paid in advance."""
        texts = [str(value) for value in values]
        self.pay(characters=sum(map(len, texts)) + len(texts) * len(str(separator)))
        return str(separator).join(texts)


def _environment() -> Any:
    """Return a fresh environment with a full budget."""
    from jinja2.ext import loopcontrols
    from jinja2.utils import Namespace

    budget = _Budget()
    environment: Any = _sandbox(budget)(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )
    filters = {name: environment.filters[name] for name in _FILTERS.split()}
    filters |= {"replace": budget.replace, "join": budget.join, "tojson": _to_json}
    environment.filters = {name: budget.filter(filters[name]) for name in filters}
    environment.filters |= {"__loop__": budget.loop, "__concatenate__": budget.concatenate}
    environment.globals = {
        "range": _range,
        "namespace": Namespace,
        "dict": dict,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _sandbox(budget: _Budget) -> Any:
    """Return an environment class that pays for what jinja does without filters or globals."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text_methods = frozenset(_TEXT_METHODS.split())
    payer = _payer()

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        concat = staticmethod(budget.concatenate)  # pyright: ignore

        def _generate(self, source: Any, *args: Any, **options: Any) -> Any:
            return super()._generate(payer.visit(source), *args, **options)

        def getattr(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, str) and attribute not in text_methods:
                return self.undefined(obj=obj, name=attribute)
            return super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            if isinstance(obj, str) and isinstance(argument, str):
                return self.getattr(obj, argument)
            return super().getitem(obj, argument)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.pay(characters=_size_of(operator, left, right))
            return super().call_binop(context, operator, left, right)

        def call(self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
            budget.pay(steps=1)
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            if isinstance(owner, str) and name == "replace":
                return budget.replace(owner, *args, **options)
            if isinstance(owner, str) and name == "join":
                return budget.join(*args, separator=owner)
            return budget.made(super().call(__context, __obj, *args, **options))

    return Environment


def _payer() -> Any:
    """Return a rewriter of template syntax: loops and `~` go through filters that pay."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Payer(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "__loop__", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "__concatenate__", [], [], None, None, lineno=node.lineno)

    return Payer()


def _size_of(operator: str, left: Any, right: Any) -> int:
    """Return the characters or items that an operation makes; refuse what no template needs."""
    sizes = [len(cast(str, x)) for x in (left, right) if isinstance(x, (str, list, tuple))]
    numbers = [abs(x) for x in (left, right) if isinstance(x, (int, float))]
    if operator == "+":
        return sum(sizes)
    if operator == "*":
        return int(sizes[0] * numbers[0]) if sizes and numbers else 0
    if operator == "%" and isinstance(left, str):
        raise ValueError("formatting with % is not allowed")
    if operator == "**" and any(number > 64 for number in numbers):
        raise ValueError("power is too large")
    return 0


def _range(*limits: int) -> range:
    values = range(*limits)
    if len(values) > _MAX_RANGE:
        raise ValueError(f"range is longer than {_MAX_RANGE}")
    return values


def _to_json(value: Any, indent: int | None = None) -> str:
    # Unlike jinja's own filter this one must not escape HTML: the model saw plain JSON in training.
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError("indentation is too large")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise ValueError("date format is too long")
    return datetime.datetime.now().strftime(form)
