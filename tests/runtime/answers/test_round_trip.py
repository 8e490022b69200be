"""Calls that a template writes into the history are read back as they were, and written again alike."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from q35c.runtime.chat import render_chat
from tests.runtime.answers.reading import read

TEMPLATE = """{%- for message in messages %}{% if message.role == 'assistant' %}{{- message.content }}
{%- for call in message.tool_calls %}{{- '\\n' if loop.index0 }}{{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
{%- for key, value in call.function.arguments | items %}{{- '<parameter=' ~ key ~ '>\\n' }}
{{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
{{- '\\n</parameter>\\n' }}{% endfor %}{{- '</function>\\n</tool_call>' }}{% endfor %}{% endif %}{% endfor %}"""
PARAMETERS = {
    "text": {"type": "string"},
    "choice": {"enum": ["on", "off"]},
    "maybe": {"type": "string", "nullable": True},
    "count": {"type": "integer"},
    "share": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    "flag": {"type": "boolean"},
    "table": {"$ref": "#/$defs/table"},
    "list": {"type": ["array", "null"]},
}
TOOL = {
    "name": "act",
    "parameters": {
        "properties": PARAMETERS,
        "$defs": {"table": {"oneOf": [{"type": "object"}, {"type": "array"}]}},
    },
}
TOOLS = [TOOL, {"name": "act.more", "parameters": {"properties": PARAMETERS}}]
FRAGMENTS = [
    "word", " ", "    ", "\n", "\n\n", "\r\n", "\t", "<", ">", "</parameter>", "<parameter=text>", "</function>", "<tool_call>",
    "</tool_call>", "</think>", "<think>", "&lt;", '"', "\\", "'", "null", "True", "12", "0123", "{", "}", "é", "😀", "\u2028",
]  # fmt: skip
# What the format cannot hold, as it has no escapes: text that closes the value as the call would go on.
AMBIGUOUS = re.compile(
    r"</parameter>\s*(?:$|</parameter>|</function>|</tool_call>|<parameter=)"
    r"|(?:^|\n)<parameter=|(?:^|\n)</function>\s*(?:$|</tool_call>)"
)


def random_text(chance: random.Random) -> str:
    while True:
        text = "".join(chance.choices(FRAGMENTS, k=chance.randint(0, 12)))
        if not AMBIGUOUS.search(text) and text.strip() not in ("null", "None"):
            return text


def random_tree(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [random_tree(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    if kind == 6:
        return {random_text(chance): random_tree(chance, depth + 1) for _ in range(3)}
    return [None, chance.random() < 0.5, random_integer(chance), random_number(chance), "a\n</b>"][
        kind
    ]


def random_integer(chance: random.Random) -> int:
    return chance.choice([0, -1, 7, 2**53 + 1, -(2**63), 2**63 - 1, chance.randint(-999, 999)])


def random_number(chance: random.Random) -> float:
    return chance.choice([0.0, -2.5, 1e-7, 1e22, 5e-324, 1.7e308, chance.uniform(-1e3, 1e3)])


def random_arguments(chance: random.Random) -> dict[str, Any]:
    values = {
        "text": random_text(chance),
        "choice": chance.choice(["on", "off"]),
        "maybe": chance.choice([None, random_text(chance)]),
        "count": random_integer(chance),
        "share": chance.choice([None, random_number(chance), random_integer(chance)]),
        "flag": chance.random() < 0.5,
        "table": {random_text(chance): random_tree(chance)},
        "list": chance.choice([None, [random_tree(chance)]]),
    }
    names = chance.sample(list(values), chance.randint(0, len(values)))
    return {name: values[name] for name in names}


def written(calls: list[tuple[str, Any]]) -> str:
    """Return the text of calls as a template writes it."""
    listed = [{"function": {"name": name, "arguments": given}} for name, given in calls]
    message = {"role": "assistant", "content": "", "tool_calls": listed}
    return render_chat(TEMPLATE, [message], add_generation_prompt=False)


def check_round_trip(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 3)
    names = [chance.choice(["act", "act.more"]) for _ in range(count)]
    calls: list[tuple[str, Any]] = []
    for name in names:
        given = random_arguments(chance)
        if name == "act.more":  # its schema has no definitions to refer to
            given.pop("table", None)
        calls.append((name, given))
    text = written(calls)
    made = read([text], TOOLS, is_thinking=False)
    assert repr(made.arguments) == repr(calls), seed  # keys in order, 1 apart from True and 1.0
    assert written(made.arguments) == text, seed
    at = chance.randint(0, len(text))
    assert read([text[:at], text[at:]], TOOLS, is_thinking=False) == made, seed


def test_calls_survive_a_template() -> None:
    for seed in range(300):
        check_round_trip(seed)


@pytest.mark.nightly
def test_many_calls_survive_a_template() -> None:
    for seed in range(10_000):
        check_round_trip(seed)


def test_what_the_format_cannot_hold_is_still_a_call() -> None:
    given = {"text": "a\n</parameter>\n</function>\nb"}
    made = read([written([("act", given)])], TOOLS, is_thinking=False)
    assert made.arguments == [("act", {"text": "a"})]
