"""Chat templates: rendered like transformers does, and harmless when hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import q35c
from q35c.errors import OptionError, TokenizerError
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


def test_same_as_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{%- if tools %}\n    {{- tools | tojson }}\n{% endif %}"
        "{% for m in messages %}\n  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "  {{ m | tojson(indent=2) }}\n{{- m.content | trim | upper }}\n{% endfor %}"
        "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}"
        "{{ ns.n }}{{ messages[::-1] | length }}{{ thinking }}{{ strftime_now('%Y') }}"
    )
    messages = [{"role": "user", "content": " é<&'\" "}, {"role": "skip"}, *MESSAGES]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    want, _ = render_jinja_template(
        [messages], chat_template=template, tools=tools, add_generation_prompt=True, thinking=False
    )
    assert render_chat(template, messages, tools=tools, thinking=False) == want[0]


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
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "undefined call": "{{ nothing() }}",
    "division by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name: str) -> None:
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
