"""The clients that most programs use read every answer and every stream with their own types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.serve.harness import Running
from tests.serve.test_anthropic import TOOL as ANTHROPIC_TOOL
from tests.serve.test_chat import CALL, THOUGHT, WEATHER
from tests.serve.test_responses import TOOL as RESPONSES_TOOL

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def gpt(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as made:
        yield made


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as made:
        yield made


def valid(made: Any) -> Any:
    """Return a document after it was checked: the clients build their types without looking."""
    type(made).model_validate(made.model_dump(mode="json", warnings=False))
    return made


def test_chat(server: Running, gpt: openai.OpenAI) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = valid(
        gpt.chat.completions.create(
            model="m", messages=HI, tools=[WEATHER], logprobs=True, top_logprobs=2
        )
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert answer.choices[0].message.reasoning_content == "Let me see."
    assert answer._request_id


def test_chat_stream(server: Running, gpt: openai.OpenAI) -> None:
    server.engine.say = lambda request: THOUGHT
    with gpt.chat.completions.stream(
        model="m", messages=HI, tools=[WEATHER], stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds and "content.delta" in kinds
    assert final.choices[0].message.content == "It is fine."
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"city": "Bonn"}'
    assert final.usage.completion_tokens == len(THOUGHT) + 1
    for chunk in gpt.chat.completions.create(model="m", messages=HI, stream=True):
        valid(chunk)


def test_completions_and_models(gpt: openai.OpenAI) -> None:
    scored = gpt.completions.create(model="m", prompt="a", echo=True, logprobs=2, max_tokens=0)
    assert scored.choices[0].logprobs.token_logprobs == [None]  # the original does so, too
    assert [valid(model).id for model in gpt.models.list()] == ["m"]
    assert valid(gpt.models.retrieve("m")).id == "m"
    chunks = list(gpt.completions.create(model="m", prompt="a", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"


def test_responses(server: Running, gpt: openai.OpenAI) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = valid(gpt.responses.create(model="m", input="hi", tools=[RESPONSES_TOOL]))
    assert answer.output_text == "It is fine."
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    again = [*[item.model_dump() for item in answer.output]]
    again += [{"type": "function_call_output", "call_id": again[2]["call_id"], "output": "rain"}]
    assert valid(gpt.responses.create(model="m", input=[*HI, *again])).status == "completed"


def test_responses_stream(server: Running, gpt: openai.OpenAI) -> None:
    server.engine.say = lambda request: THOUGHT
    with gpt.responses.stream(model="m", input="hi", tools=[RESPONSES_TOOL]) as stream:
        events = [valid(event) for event in stream]
        final = stream.get_final_response()
    assert events[-1].type == "response.completed" and final.output_text == "It is fine."


def test_messages(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.say = lambda request: THOUGHT
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    answer = valid(
        claude.messages.create(
            model="m", max_tokens=2000, messages=HI, tools=[ANTHROPIC_TOOL], thinking=thinking
        )
    )
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    history: list[Any] = [*HI, {"role": "assistant", "content": answer.content}]
    result = {"type": "tool_result", "tool_use_id": answer.content[2].id, "content": "rain"}
    history.append({"role": "user", "content": [result]})
    again = valid(claude.messages.create(model="m", max_tokens=2000, messages=history))
    assert again.stop_reason == "end_turn"
    assert valid(claude.messages.count_tokens(model="m", messages=HI)).input_tokens > 10


def test_messages_stream(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.say = lambda request: CALL.format("Bonn")
    with claude.messages.stream(
        model="m", max_tokens=2000, messages=HI, tools=[ANTHROPIC_TOOL]
    ) as stream:
        for event in stream:
            valid(event)
        final = valid(stream.get_final_message())
    assert final.content[0].input == {"city": "Bonn"} and final.stop_reason == "tool_use"


def test_errors_are_of_the_clients_kinds(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        gpt.chat.completions.create(model="m", messages=HI, n=99)
    assert wrong.value.param == "n"
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model="m", max_tokens=-1, messages=HI)
    with pytest.raises(openai.NotFoundError):
        gpt.models.retrieve("other")
