"""Hostile chat templates end in a typed error, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from q35c.errors import OptionError, Q35CError, TokenizerError
from q35c.limits import MAX_TEMPLATE_BYTES
from q35c.runtime.chat import compile_template, render_chat
from q35c.runtime.chat.budget import Budget, TooMuch
from tests.runtime.hostile_templates import REFUSED

MESSAGES = [{"role": "user", "content": "Hi"}]
MEMORY, CPU_SECONDS = 1 << 30, 20
MAX_GROWN = 300 << 20


def in_child(work: Callable[[str], Any], names: list[str]) -> dict[str, list[Any]]:
    """Do work for each name in one child with limits; return what came out, and bytes grown."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        for name in names:
            seconds = int(time.process_time()) + CPU_SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                work(name)
                how = "text"
            except (OptionError, TokenizerError) as error:
                how = str(error)
            except BaseException as error:  # it has to be told, not to end the child
                how = f"UNTYPED {error!r}"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, json.dumps([name, how, grown << 10]).encode() + b"\n")
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        results = {name: rest for name, *rest in map(json.loads, lines)}
    os.waitpid(child, 0)
    return results


@pytest.mark.parametrize("part", range(8))
def test_hostile_template_is_refused(part: int) -> None:
    names = list(REFUSED)[part::8]

    def render(name: str) -> None:
        messages = [dict(message) for message in MESSAGES]
        try:
            render_chat(REFUSED[name], messages)
        finally:
            assert messages == MESSAGES

    results = in_child(render, names)
    assert list(results) == names, "the child ended"
    for name, (how, grown) in results.items():
        assert how != "text" and not how.startswith("UNTYPED"), f"{name}: {how}"
        assert grown < MAX_GROWN, f"{name}: {grown >> 20} MiB grown"


# What jinja's lexer, parser and code generator or Python's compiler take long for, up to the largest size.
SOURCES = {
    "outputs": "{{a}}",
    "branches": "{%if a%}{%set x=1%}{%endif%}",
    "loops": "{%for a in b%}{%endfor%}",
    "macros": "{%macro m()%}{%endmacro%}",
    "spaces": " ",
    "spaces around tags": " " * 999 + "{%- if a -%}" + " " * 999 + "{% endif %}",
    "open braces": "{",
    "open comments": "{#",
    "open strings": "{{'a'",
    "raw": "{%raw%}",
    "texts": "{{''''''}}",
    "set blocks": "{%set a%}{%endset%}",
    "nested macros": "{%macro a()%}" * 30 + "{{b}}" * 30 + "{%endmacro%}" * 30,
    "nested with": "{%with a=1%}" * 60 + "{{b}}" * 30 + "{%endwith%}" * 60,
    "nested loops": "{%for a in b%}" * 18 + "{{a}}" * 40 + "{%endfor%}" * 18,
}
ONCE = {
    "variables": "".join(f"{{{{a{i}}}}}" for i in range(7000)),
    "sets": "".join(f"{{%if a%}}{{%set x{i}=1%}}{{%endif%}}" for i in range(1900)),
    "items": "{{[" + "a," * 32000 + "]}}",
    "arguments": "{{f(" + ",".join(f"a{i}=1" for i in range(7000)) + ")}}",
    "else ifs": "{%if a%}" + "{%elif a%}" * 6000 + "{%endif%}",
}
ALL_SOURCES = {k: v * (MAX_TEMPLATE_BYTES // len(v)) for k, v in SOURCES.items()} | ONCE


@pytest.mark.parametrize("part", range(5))
def test_large_template_compiles_within_bounds(part: int) -> None:
    names = list(ALL_SOURCES)[part::5]
    results = in_child(lambda name: compile_template(ALL_SOURCES[name]), names)
    assert list(results) == names, "the child ended"
    for name, (how, grown) in results.items():
        assert not how.startswith("UNTYPED") and grown < MAX_GROWN, (
            f"{name}: {how}, {grown >> 20} MiB"
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ messages.__class__ }}",
        "{{ ''.__doc__ }}",
        "{{ self.__dict__ }}",
        "{{ namespace.mro }}",
        "{{ dict.mro }}",
        "{{ ''.join.__self__ }}",
        "{{ cycler(1).__init__ }}",
        "{{ messages | attr('__len__') }}",
        "{% macro f() %}{% endmacro %}{{ f._func }}{{ f.explicit_caller }}",
    ],
)
def test_denied_attributes_are_nothing(template: str) -> None:
    assert render_chat(template, MESSAGES) == ""


def test_a_budget_never_grows() -> None:
    budget = Budget()
    with pytest.raises(TooMuch):
        budget.pay(-1)
    assert issubclass(TooMuch, Exception) and not issubclass(TooMuch, Q35CError)


def test_a_doubled_list_weighs_double() -> None:
    budget, value = Budget(), []
    weights = []
    for _ in range(12):
        value = budget.items([value, value])
        weights.append(value.weight)
    assert all(2 * a <= b < 2 * a + 100 for a, b in pairwise(weights))
