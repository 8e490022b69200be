"""Render chat templates, which come from checkpoints and may be hostile.

A template sees plain data only, reaches known attributes only, and pays for all it does (`budget`).
The names it may use are those of transformers. Importing this package imports jinja2.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from q35c.errors import OptionError, TokenizerError
from q35c.limits import MAX_TEMPLATE_BYTES
from q35c.runtime.chat.budget import Budget, TooMuch
from q35c.runtime.chat.control import Guard
from q35c.runtime.chat.environment import environment
from q35c.runtime.chat.globals import Refusal
from q35c.runtime.chat.messages import (
    Message,
    PlainData,
    copy_messages,
    copy_tools,
    cut_open_end,
    leave_open,
)

__all__ = ["Message", "render_chat", "render_guarded"]


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Return the prompt text of a conversation.

    template                a jinja2 template, compiled once and kept
    messages                mappings with `role` and `content`
    special_tokens          variables like `eos_token`
    add_generation_prompt   end with the beginning of an answer, by default True
    continue_final_message  end inside the last message (or that field of it) for the model to go on
    tools                   JSON schemas, or functions with hints and a docstring
    documents               what some templates quote from

    Further options are variables of the template, as `enable_thinking`. Raises OptionError for a
    conversation that is malformed or that the template refuses, TokenizerError if the template itself
    is broken or does too much work.
    """
    return _render_copied(PlainData(), template, messages, special_tokens, options)


def render_guarded(
    template: str,
    messages: Sequence[Message],
    tokens: Iterable[str],
    *,
    special_tokens: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[str, Callable[[str], str]]:
    """Return the prompt text with all control `tokens` in the conversation broken, and what mends it.

    A control token in the text is the template's own. Raises as `render_chat`.
    """
    guard = Guard(tokens, _literals(template))
    _copy(PlainData(guard.note), messages, options)
    guard.choose()
    data = PlainData(guard.hide)
    return _render_copied(data, template, messages, special_tokens, options), guard.reveal


@functools.lru_cache(maxsize=16)
def _literals(template: str) -> str:
    """Return the texts that a template holds. Raises TokenizerError if it is malformed."""
    compile_template(template)
    lexemes = environment().lex(template)
    return "\n".join(text for _, kind, text in lexemes if kind in ("data", "string"))


def _render_copied(
    data: PlainData,
    template: str,
    messages: Any,
    special_tokens: Mapping[str, str] | None,
    options: dict[str, Any],
) -> str:
    compiled = compile_template(template)
    known = {**(special_tokens or {}), **_copy(data, messages, options)}
    text = _render(compiled, known, Budget(data.weight))
    return cut_open_end(text) if options.get("continue_final_message") else text


def _copy(data: PlainData, messages: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of a template as plain data."""
    variables = {**options}
    field = variables.pop("continue_final_message", False)
    prompt = variables.pop("add_generation_prompt", True)
    plain = copy_messages(data, messages)
    if field:
        plain = leave_open(data, plain, "content" if field is True else field)
    tools = copy_tools(data, variables.pop("tools", None))
    return {
        "documents": None,
        **{name: data.copy(value, name) for name, value in variables.items()},
        "messages": plain,
        "tools": tools,
        "add_generation_prompt": bool(prompt) and not field,
    }


@functools.lru_cache(maxsize=16)
def compile_template(template: str) -> Any:
    """Return a template ready to render. Raises TokenizerError if it is malformed or too large."""
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise TokenizerError(
            "chat template is too large",
            expected=f"at most {MAX_TEMPLATE_BYTES} bytes",
            got=size,
        )
    try:
        made: Any = environment().from_string(template)
        made.globals = dict(made.environment.globals)
        return made
    except TooMuch as error:
        raise TokenizerError(f"chat template is too complex: {error}") from None
    except Exception as error:  # the compilers of jinja2 and Python raise many kinds
        line = getattr(error, "lineno", None)
        raise TokenizerError(
            f"chat template is malformed: {_said(error)}",
            where=None if line is None else f"chat template, line {line}",
        ) from None


def _render(compiled: Any, variables: dict[str, Any], budget: Budget) -> str:
    context = compiled.new_context(variables)
    context.budget = budget
    try:
        return "".join(compiled.root_render_func(context))
    except Refusal as error:
        raise OptionError(
            f"the chat template refuses the conversation: {error.what}",
            where="messages",
            hint="check the roles and the content of the messages",
        ) from None
    except Exception as error:  # a template can raise anything, in expressions it evaluates
        what = (
            "uses too much memory" if isinstance(error, MemoryError) else f"fails: {_said(error)}"
        )
        raise TokenizerError(
            f"the chat template {what}",
            where=f"chat template, line {_line_of(error, compiled)}",
            hint="check that the messages have the fields which the template reads there",
        ) from None


def _said(error: BaseException) -> str:
    kind = "" if isinstance(error, TooMuch) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:400]


def _line_of(error: BaseException, compiled: Any) -> int:
    """Return the template's line in which an error came up, 1 if it is unknown."""
    lines = [
        compiled.get_corresponding_lineno(line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__jinja_template__") is compiled
    ]
    return lines[-1] if lines else 1
