"""Render a chat template in a sandbox. Imports jinja2 on first use.

Templates come from the checkpoint and may be hostile: the sandbox denies attributes and calls that lead
out of it, bounds ranges, repetition and powers, and only ever sees plain data.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from q35c.errors import OptionError, TokenizerError

MAX_TEMPLATE_BYTES = 1 << 20
_MAX_REPEAT = 1 << 20

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
    import jinja2

    if len(template) > MAX_TEMPLATE_BYTES:
        raise TokenizerError("chat template is too large", expected=f"{MAX_TEMPLATE_BYTES} bytes")
    try:
        compiled = _environment().from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TokenizerError(f"chat template is malformed: {error}"[:500]) from None
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


def _environment() -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Bound what one expression may make; `%` formats with widths the template chooses."""
            sides = (left, right)
            sizes = [len(cast(str, x)) for x in sides if isinstance(x, (str, list, tuple))]
            numbers = [abs(x) for x in sides if isinstance(x, (int, float))]
            if operator == "*" and sizes and numbers and sizes[0] * numbers[0] > _MAX_REPEAT:
                raise jinja2.TemplateError("repetition is too large")
            if operator == "**" and any(number > 64 for number in numbers):
                raise jinja2.TemplateError("power is too large")
            if operator == "%" and isinstance(left, str):
                raise jinja2.TemplateError("formatting with % is not allowed")
            return super().call_binop(context, operator, left, right)

    environment: Any = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = _to_json
    for name in ("center", "format", "indent", "xmlattr", "random", "wordwrap"):
        environment.filters.pop(name, None)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    # Unlike jinja's own filter this one must not escape HTML: the model saw plain JSON in training.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
