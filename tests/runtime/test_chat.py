"""Chat templates: rendered like transformers does, and harmless when hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import q35c
from q35c.errors import OptionError, TokenizerError
from q35c.runtime import chat
from q35c.runtime.chat import render_chat
from tests.fake_artifact import write_fake

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


def load(folder: Path, **segments: bytes) -> q35c.Model:
    write_fake(folder / "m", segments=segments)
    return q35c.load(folder / "m", threads=1)


def test_template_of_the_artifact(folder: Path) -> None:
    write_fake(folder / "m")
    with q35c.load(folder / "m", threads=1) as model:
        text = model.apply_chat_template(MESSAGES)
        assert text == "user: Hi <b><|im_end|>\nassistant: Yo<|im_end|>\nassistant: "
        assert not model.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith(": ")
        with pytest.raises(OptionError, match="no robots"):
            model.apply_chat_template([{"role": "robot", "content": ""}])


def test_template_inside_the_tokenizer_config(folder: Path) -> None:
    config = (
        b'{"chat_template": "{{ eos_token }}|{{ bos_token }}|{{ messages[0].content }}",'
        b' "eos_token": {"content": "<end>", "lstrip": false}, "bos_token": null}'
    )
    with load(folder, tokenizer_config=config) as model:
        assert model.apply_chat_template(MESSAGES) == "<end>||Hi <b>"
    with load(folder, tokenizer_config=config, chat_template=b"own") as model:
        assert model.apply_chat_template(MESSAGES) == "own"


@pytest.mark.parametrize(
    "config", [b"", b"{", b'{"a": 1, "a": 2}', b"{}", b"[]", b'{"chat_template": []}']
)
def test_no_template(folder: Path, config: bytes) -> None:
    segments = {"tokenizer_config": config} if config else {}
    with load(folder, **segments) as model, pytest.raises(TokenizerError):
        model.apply_chat_template(MESSAGES)


MANY_FEATURES = (
    "{%- if tools %}\n    {{- tools | tojson }}\n{% endif %}"
    "{% for m in messages %}\n  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "  {{ m | tojson(indent=2) }}\n{{- m.content | trim | upper }}\n{% endfor %}"
    "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}"
    "{{ ns.n }}{{ messages[::-1] | length }}{{ thinking }}{{ strftime_now('%Y') }}"
)
# Written in the manner of the family's templates: macros, reversed search for the last question,
# thinking cut out of earlier turns, content as text or as parts, tool calls and their results.
FAMILY = """
{%- macro render(content) %}{% if content is string %}{{- content }}
{%- elif content is iterable and content is not mapping %}{% for part in content %}
{%- if 'text' in part %}{{ part.text }}{% else %}<|{{ part['type'] }}|>{% endif %}{% endfor %}
{%- elif content is none or content is undefined %}{{- '' }}
{%- else %}{{ raise_exception('Unexpected content') }}{% endif %}{% endmacro %}
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + render(messages[0].content) + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(open=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}
{%- if ns.open and message.role == 'user' and not(render(message.content) | trim).startswith('<tool>') %}
{%- set ns.open = false %}{% set ns.last = index %}{% endif %}{% endfor %}
{%- for message in messages %}{% set content = render(message.content) | trim %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}
{%- elif message.role == 'assistant' %}{% set reasoning = '' %}
{%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if loop.index0 > ns.last %}{{- '<think>' + reasoning.strip('\\n') + '</think>' }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + content }}
{%- for call in message.tool_calls or [] %}{% if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\\n<call ' ~ call.name ~ '>' }}{% for name, value in call.arguments | items %}
{{- name ~ '=' ~ (value | tojson | safe if value is mapping or value is sequence and value is not string else value | string) ~ ';' }}
{%- endfor %}{% endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{% if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool>' + content + '</tool>' }}{% if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% if thinking is defined and thinking is false %}<think></think>{% endif %}{% endif %}
"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " é<&'\" "}, {"role": "skip"}, *MESSAGES],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne moment"},
        {"role": "user", "content": "And now?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "call it",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": [1, "ü"]}}}],
        },
        {"role": "tool", "content": "42"},
        {"role": "tool", "content": "43"},
    ],
]


@pytest.mark.parametrize("template", [MANY_FEATURES, FAMILY], ids=["features", "family"])
@pytest.mark.parametrize("conversation", [0, 1])
def test_same_as_transformers(template: str, conversation: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = CONVERSATIONS[conversation]
    if template is MANY_FEATURES:
        messages = [m for m in messages if isinstance(m.get("content", ""), str)]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    want, _ = render_jinja_template(
        [messages], chat_template=template, tools=tools, add_generation_prompt=True, thinking=False
    )
    assert render_chat(template, messages, tools=tools, thinking=False) == want[0]
    assert len(want[0]) > 80


HOSTILE: dict[str, str] = {
    "escape by class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "call of a denied attribute": "{{ raise_exception.__globals__['json'].loads('1') }}",
    "call through the attr filter": "{{ (messages | attr('__class__'))() }}",
    "format string": "{{ '{0.__class__}'.format(messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "mutation": "{{ messages.append(1) }}",
    "dictionary mutation": "{{ messages[0].update(a=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '/etc/passwd' %}",
    "long range": "{{ range(10**9) | list }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition of a list": "{{ [0] * 10**9 }}",
    "repetition from the left": "{{ 10**8 * 2 * 'a' }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "percent formatting": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center filter": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(999999999) }}",
    "zfill method": "{{ 'a'.zfill(999999999) }}",
    "format method": "{{ '{:999999999}'.format(1) }}",
    "expandtabs": "{{ ('\\t').expandtabs(999999999) }}",
    "method by item": "{{ 'a'['center'](999999999) }}",
    "method by map": "{{ ['a'] | map('center', 999999999) | list }}",
    "indent": "{{ 'a' | indent(999999999) }}",
    "json indent": "{{ [1] | tojson(indent=999999999) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "replace method": "{% set a = 'a' * 10**6 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 10**6 %}{{ a | replace('a', a) }}",
    "join method": "{% set a = 'a' * 10**6 %}{{ a.join(range(10**4)) }}",
    "join filter": "{% set a = 'a' * 10**6 %}{{ range(10**4) | join(a) }}",
    "doubling by plus": "{% set a = 'aa' %}" + "{% set a = a + a %}" * 40,
    "doubling by tilde": "{% set a = 'aa' %}" + "{% set a = a ~ a %}" * 40,
    "doubling by output": "{% set a = 'aa' %}"
    + "{% set b %}{{ a }}{{ a }}{% endset %}{% set a = b %}" * 40,
    "doubling of a list": "{% set a = [1] %}" + "{% set a = a + a %}" * 40,
    "doubling in a loop": "{% set n = namespace(a='aa') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "keeping many": "{% set n = namespace(a=[]) %}{% set x = 'a' * 10**6 %}"
    "{% for i in range(9999) %}{% set n.a = n.a + [x | upper] %}{% endfor %}",
    "much output": "{% set x = 'a' * 10**6 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "nested empty loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loop over a generator": "{% for a in range(9999) %}{% for b in range(9999) | map('abs') %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}"
    "{% endmacro %}{{ f(40) }}",
    "undefined call": "{{ nothing() }}",
    "division by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "branching recursion":  # the slowest way to spend steps
        monkeypatch.setattr(chat, "_MAX_STEPS", 20_000)
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises((OptionError, TokenizerError)):
        render_chat(HOSTILE[name], messages)
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ messages.__class__ }}",
        "{{ ''.__doc__ }}",
        "{{ self.__dict__ }}",
    ],
)
def test_denied_attributes_are_nothing(template: str) -> None:
    assert render_chat(template, MESSAGES) == ""


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 400  # 4 MB, about a million tokens
    template = "{% for m in messages %}{{ m.role + ': ' + (m.content | trim) + '\n' }}{% endfor %}"
    assert len(render_chat(template, messages)) > 3_990_000


@pytest.mark.parametrize(
    "template",
    ["{{", "{% for %}", "{{ a | nofilter }}", "{{" + "(" * 5000, "{{ a" + ".b" * 50000 + "}}"],
)
def test_malformed_template(template: str) -> None:
    with pytest.raises(TokenizerError, match="malformed"):
        render_chat(template, MESSAGES)


def test_template_that_is_too_large() -> None:
    with pytest.raises(TokenizerError, match="too large"):
        render_chat("x" * (1 << 20) + "x", MESSAGES)


@pytest.mark.parametrize("messages", [[{}], [{"role": 5}], ["text"], None, 5])
def test_odd_messages_do_not_crash(messages: Any) -> None:
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(OptionError):
        render_chat(template, messages)
