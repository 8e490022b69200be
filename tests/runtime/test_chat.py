"""Chat templates: rendered like transformers does, from plain data, and compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import q35c
from q35c.errors import OptionError, TokenizerError
from q35c.runtime.chat import compile_template, render_chat
from q35c.runtime.chat.environment import environment
from tests.chat_templates import (
    CONVERSATIONS,
    EXPRESSIONS,
    FAMILY,
    MANY_FEATURES,
    STATEMENTS,
    TOOLS,
)
from tests.fake_artifact import write_fake

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[q35c.Model]:
    write_fake(folder / "m")
    with q35c.load(folder / "m", threads=1) as loaded:
        yield loaded


def load(folder: Path, **segments: bytes) -> q35c.Model:
    write_fake(folder / "own", segments=segments)
    return q35c.load(folder / "own", threads=1)


def reference(template: str, messages: Any, **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"add_generation_prompt": True, **options}
    return render_jinja_template([messages], chat_template=template, **options)[0][0]


def test_template_of_the_artifact(model: q35c.Model) -> None:
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


# The same as transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"thinking": False}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [MANY_FEATURES, FAMILY], ids=["features", "family"])
def test_same_as_transformers(template: str, conversation: str, options: Any) -> None:
    messages = CONVERSATIONS[conversation]
    for tools in (None, TOOLS):
        want = reference(template, messages, tools=tools, **options)
        assert render_chat(template, messages, tools=tools, **options) == want
        assert len(want) > 20


def test_names_are_those_of_transformers() -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    want, got = _compile_jinja_template("").environment, environment()
    assert set(want.filters) - set(got.filters) == set()
    assert {name for name in want.tests if name.isidentifier()} - set(got.tests) == set()
    assert set(want.globals) - set(got.globals) == set()
    assert set(want.extensions) - set(got.extensions) <= {
        f"{_compile_jinja_template.__module__}.AssistantTracker"
    }
    for name in ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape"):
        assert getattr(want, name) == getattr(got, name)


@pytest.mark.parametrize("value", ["a", 1, 1.5, True, (1,), b"a", range(3)], ids=repr)
def test_methods_are_those_of_transformers(value: Any) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    want, got = _compile_jinja_template("").environment, environment()
    for name in dir(type(value)):
        if want.getattr(value, name) == getattr(value, name):
            assert got.getattr(value, name) == getattr(value, name), name


ALL = [f"{{{{ {one} }}}}" for one in EXPRESSIONS.strip().replace("\n", ";;").split(";;")]


@pytest.mark.parametrize("template", [*ALL, *STATEMENTS])
def test_expression_gives_what_transformers_gives(template: str) -> None:
    assert render_chat(template, MESSAGES) == reference(template, MESSAGES)


def test_every_filter_test_and_global_is_tried() -> None:
    for name in {*environment().filters, *environment().tests, *environment().globals}:
        if name.isidentifier() and name not in ("raise_exception", "strftime_now"):
            assert any(name in one for one in ALL), name
    year = render_chat("{{ strftime_now('%Y') }}", MESSAGES)
    assert year == reference("{{ strftime_now('%Y') }}", MESSAGES)


@pytest.mark.parametrize("last", ["Once upon ", "Once upon", [{"type": "text", "text": "On "}]])
@pytest.mark.parametrize("tail", ["", " | trim"])
def test_continue_the_final_message(last: Any, tail: str) -> None:
    content = (
        "m.content"
        if isinstance(last, str)
        else "(m.content if m.content is string else m.content[0].text)"
    )
    template = "{% for m in messages %}<{{ m.role }}>{{ " + content + tail + " }}</s>{% endfor %}"
    messages = [MESSAGES[0], {"role": "assistant", "content": last}]
    got = render_chat(template, messages, continue_final_message=True)
    want = reference(template, messages, continue_final_message=True, add_generation_prompt=False)
    assert got == want and got.rstrip().endswith(("upon", "On"))
    with pytest.raises(OptionError, match=r"messages\[1\]\.reasoning_content"):
        render_chat(template, messages, continue_final_message="reasoning_content")
    with pytest.raises(OptionError, match="leaves out"):
        render_chat("nothing", messages, continue_final_message=True)


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


def typical(
    city: str, days: int = 1, unit: Unit = Unit.C, near: list[str] | None = None
) -> dict[str, float]:
    """
    Say what the weather is.

    More about it.

    Args:
        city: where it is,
            in full
        days: how many (choices: [1, 2])
        unit: of temperature
        near: other places

    Returns:
        temperatures
    """
    return {}


def other(
    a: int | str, b: Literal["x", 1], c: tuple[int, str], d: Any, e: dict[str, list[int]]
) -> None:
    """Do it.

    Args:
        a: first
        b: second
        c: third
        d: fourth
        e: fifth
    """


def test_functions_as_tools() -> None:
    template = "{{ tools | tojson }}"
    want = reference(template, MESSAGES, tools=[typical, other])
    assert render_chat(template, MESSAGES, tools=[typical, other]) == want
    assert '"description": "where it is, in full"' in want


def no_docstring(a: int) -> None: ...


def no_hint(a) -> None:  # type: ignore[no-untyped-def]
    """Do.

    Args:
        a: b
    """


def not_described(a: int) -> None:
    """Do."""


def odd_hint(a: Path) -> None:
    """Do.

    Args:
        a: b
    """


@pytest.mark.parametrize(
    "tools", [[no_docstring], [no_hint], [not_described], [odd_hint], ["f"], "f", {"a": 1}, [5], 5]
)
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(OptionError, match="tools"):
        render_chat("{{ tools }}", MESSAGES, tools=tools)


# Conversations --------------------------------------------------------------------------------------


class Photo:
    def save(self, path: str) -> None:
        raise AssertionError("a template called a method of an object")


@dataclass
class Said:
    role: str
    content: Any


class Modelled:
    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": "pydantic"}


def test_templates_see_plain_data() -> None:
    messages = [
        Said("user", np.float32(1.5)),
        Modelled(),
        {"role": Unit.C, "content": np.array([1, 2]), "n": np.int64(3), "b": np.bool_(False)},
    ]
    template = "{% for m in messages %}{{ m }}{{ m.content.tolist is defined }};{% endfor %}"
    want = (
        "{'role': 'user', 'content': 1.5}False;{'role': 'user', 'content': 'pydantic'}False;"
        "{'role': 'celsius', 'content': [1, 2], 'n': 3, 'b': False}False;"
    )
    assert render_chat(template, messages) == want  # type: ignore[arg-type]


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (None, "messages"),
        (5, "messages"),
        ("text", "messages"),
        ({"role": "user"}, "messages"),
        ([], "messages"),
        (["text"], "messages[0]"),
        ([{"role": "user", "content": [{"image": Photo()}]}], "messages[0].content[0].image"),
        ([MESSAGES[0], {"role": "user", "content": {1, 2}}], "messages[1].content"),
        ([{"role": "user", "content": b"x"}], "messages[0].content"),
        ([{"role": "user", "content": {(1, 2): 3}}], "messages[0].content"),
        ([{"role": "user", "content": 1 << 2000}], "messages[0].content"),
        ([{"role": "user", "content": nested(100)}], "messages[0].content[0]"),
    ],
)
def test_conversations_that_are_none(messages: Any, where: str) -> None:
    with pytest.raises(OptionError) as caught:
        render_chat("{{ messages[0].content[0].image.save('x') }}", messages)
    assert str(caught.value.where).startswith(where)


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "input_audio"])
def test_media_are_refused(model: q35c.Model, kind: str) -> None:
    for part in ({"type": kind}, {kind: "a.png"}):
        messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, part]}]
        with pytest.raises(OptionError, match=kind) as caught:
            model.apply_chat_template(messages)
        assert caught.value.where == "messages[0].content[1]"


@pytest.mark.parametrize("nests", [True, False])
def test_arguments_as_json_text(folder: Path, nests: bool) -> None:
    def messages(arguments: Any) -> list[dict[str, Any]]:
        call: dict[str, Any] = {"name": "f", "arguments": arguments}
        calls = [{"type": "function", "function": call} if nests else call]
        return [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": calls}]

    template = (
        "{% set c = messages[1].tool_calls[0] %}{{ (c.function or c).arguments | items | list }}"
    )
    with load(folder, chat_template=template.encode()) as model:
        for arguments in ({"a": [1]}, '{"a": [1]}', ' {"a" : [1]}\n'):
            assert model.apply_chat_template(messages(arguments)) == "[('a', [1])]"
        assert model.apply_chat_template(messages("")) == "[]"
        for arguments in ("[1]", "{", "1", "null", "text"):
            with pytest.raises(OptionError, match="arguments") as caught:
                model.apply_chat_template(messages(arguments))
            assert str(caught.value.where).startswith("messages[1].tool_calls[0].")


# Errors, and what is kept -------------------------------------------------------------------------


def test_an_error_inside_the_template_is_the_templates() -> None:
    with pytest.raises(TokenizerError, match="ZeroDivisionError") as caught:
        render_chat("a\n{% for m in messages %}\n{{ 1 // 0 }}\n{% endfor %}", MESSAGES)
    assert caught.value.where == "chat template, line 3"
    with pytest.raises(TokenizerError, match="'dict object' has no attribute 'nothing'"):
        render_chat("{{ messages[0].nothing + 'a' }}", MESSAGES)
    with pytest.raises(OptionError, match="not you"):
        render_chat("{{ raise_exception('not you') }}", MESSAGES)


@pytest.mark.parametrize(
    "template", ["{{", "\n\n{% for %}", "{{ a | nofilter }}", "{{ " + "9" * 5000 + " }}"]
)
def test_malformed_template(template: str) -> None:
    with pytest.raises(TokenizerError, match="malformed"):
        render_chat(template, MESSAGES)


def test_a_template_is_compiled_once() -> None:
    compiled = compile_template(FAMILY)
    render_chat(FAMILY, MESSAGES)
    assert compile_template(FAMILY) is compiled


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": "wörd 🙂" * 1500}, MESSAGES[1]] * 400  # 4 MB
    assert render_chat(FAMILY, messages) == reference(FAMILY, messages)
    many = [{"role": "user", "content": "q"}, MESSAGES[1]] * 2000
    assert render_chat(FAMILY, many) == reference(FAMILY, many)
    template = "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}{{ ns.l | length }}"
    assert render_chat(template, many) == "4000"
