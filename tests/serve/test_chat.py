"""Chat completions: what an answer and its stream hold, in which order."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.fakes import internal_error
from tests.serve.harness import Running, chat, events

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
)
THOUGHT = "Let me see.\n</think>\n\nIt is fine.\n\n" + CALL.format("Bonn")


def post(client: httpx.Client, body: Any, path: str = "/v1/chat/completions") -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx.Client, body: Any, path: str = "/v1/chat/completions") -> list[Any]:
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(answer.text)


def test_an_answer_has_reasoning_content_calls_and_usage(
    server: Running, client: httpx.Client
) -> None:
    server.engine.say = lambda request: THOUGHT
    answer = post(client, chat("what is it like in Bonn?", tools=[WEATHER]))
    (choice,) = answer["choices"]
    message = choice["message"]
    assert message["reasoning_content"] == "Let me see."
    assert message["content"] == "It is fine."
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert call["id"].startswith("call_")
    assert choice["finish_reason"] == "tool_calls"
    usage, prompt = answer["usage"], len(server.engine.requests[-1].ids)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, len(THOUGHT) + 1)
    assert usage["total_tokens"] == prompt + len(THOUGHT) + 1
    assert usage["prompt_tokens_details"]["cached_tokens"] == prompt // 2
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < 30


def test_a_stream_says_the_same_in_order(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: THOUGHT
    body = chat(tools=[WEATHER], stream_options={"include_usage": True})
    *chunks, usage, done = stream(client, body)
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(THOUGHT) + 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    kinds = [next(iter(delta), "end") for delta in deltas[1:]]
    assert [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k] == [
        "reasoning_content",
        "content",
        "tool_calls",
        "end",
    ]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""} and calls[0]["id"]
    assert all("id" not in call and call["index"] == 0 for call in calls[1:])
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"city": "Bonn"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_no_usage_chunk_unless_asked_for(client: httpx.Client) -> None:
    chunks = stream(client, chat())
    assert all(chunk == "[DONE]" or chunk["choices"] for chunk in chunks)


def test_many_answers_share_a_prompt(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: f"</think>seed {request.options.seed}"
    answer = post(client, chat(n=3, seed=7))
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["seed 7", "seed 8", "seed 9"]
    requests = server.engine.requests[-3:]
    assert len({request.group for request in requests}) == 1 and requests[0].group
    assert answer["usage"]["prompt_tokens"] == len(requests[0].ids)


def test_a_stop_string_ends_content_but_neither_reasoning_nor_calls(
    server: Running, client: httpx.Client
) -> None:
    server.engine.say = lambda request: "a STOP b</think>" + "one STOP two"
    (choice,) = post(client, chat(stop="STOP"))["choices"]
    assert choice["message"]["content"] == "one " and choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"] == "a STOP b"
    server.engine.say = lambda request: "x</think>" + CALL.format("STOP")
    (choice,) = post(client, chat(stop="STOP", tools=[WEATHER]))["choices"]
    assert choice["finish_reason"] == "tool_calls"


def test_one_call_at_a_time_where_no_more_are_wanted(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: "x</think>" + CALL.format("A") + "\n" + CALL.format("B")
    body = chat(tools=[WEATHER], parallel_tool_calls=False)
    (choice,) = post(client, body)["choices"]
    assert [json.loads(c["function"]["arguments"]) for c in choice["message"]["tool_calls"]] == [
        {"city": "A"}
    ]
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_cut_off_by_length_is_not_reported(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: "x</think>" + CALL.format("Bonn am Rhein")
    (choice,) = post(client, chat(tools=[WEATHER], max_tokens=60))["choices"]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "length"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_are_cut_to_the_context(
    server: Running, client: httpx.Client, field: str
) -> None:
    post(client, chat(**{field: 1 << 31}))
    request = server.engine.requests[-1]
    assert request.options.max_new_tokens == (1 << 18) - len(request.ids)


def test_logprobs_cover_every_token(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: "r</think>ok"
    answer = post(client, chat(logprobs=True, top_logprobs=3))
    listed = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in listed) == "r</think>ok<|im_end|>"
    assert all(len(entry["top_logprobs"]) == 3 for entry in listed)
    assert listed[0]["logprob"] == -0.5 and listed[0]["top_logprobs"][1]["logprob"] == -9999.0
    chunks = stream(client, chat(logprobs=True, top_logprobs=3))[:-1]
    streamed = [e for c in chunks for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == listed


def test_thinking_is_off_where_the_client_says_so(server: Running, client: httpx.Client) -> None:
    for off in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        message = post(client, chat(**off))["choices"][0]["message"]
        assert message["content"] == "Hello" and "reasoning_content" not in message


def test_an_error_in_a_stream_is_an_event_without_our_secrets(
    server: Running, client: httpx.Client
) -> None:
    server.engine.say = lambda request: internal_error()
    *_, error, done = stream(client, chat())
    assert done == "[DONE]" and error["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(error) and "home" not in json.dumps(error)
    answer = client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 500 and "secret" not in answer.text


def test_every_field_reaches_the_engine(server: Running, client: httpx.Client) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"50": -100},
        "seed": -1,
        "cache_salt": "s",
        "priority": 3,
        "user": "someone@example.com",
    }
    post(client, chat(**fields))
    request = server.engine.requests[-1]
    sampling = request.options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.presence_penalty) == (0.1, 0.25)
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, 1.5)
    assert sampling.logit_bias == {50: -100.0}
    assert request.options.seed == 2**64 - 1
    assert (request.salt, request.priority) == ("0:s", 3)
    assert "someone" not in request.client


def test_structures_are_compiled(server: Running, client: httpx.Client) -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    post(client, chat(response_format=wanted))
    post(client, chat(tools=[WEATHER], tool_choice="required"))
    named = {"type": "function", "function": {"name": "weather"}}
    post(client, chat(tools=[WEATHER], tool_choice=named, parallel_tool_calls=False))
    post(client, chat(structured_outputs={"choice": ["yes", "no"]}, thinking_budget=9))
    first, second, third, fourth = server.engine.structures[-4:]
    assert (first.kind, first.value, first.where) == ("schema", schema, "response_format")
    assert first.is_thinking and server.engine.requests[-4].constraint == first
    assert (second.kind, second.is_parallel) == ("calls", True)
    assert second.value == (("weather", WEATHER["function"]["parameters"]),)
    assert (third.kind, third.is_parallel) == ("calls", False)
    assert (fourth.kind, fourth.value) == ("choice", ("yes", "no"))
    assert (first.thinking_tokens, fourth.thinking_tokens) == (None, 9)


def test_an_answer_can_be_continued(server: Running, client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hell"}]
    post(client, chat(messages=messages, continue_final_message=True))
    assert bytes(i for i in server.engine.requests[-1].ids if i < 256).endswith(b"Hell")


def test_a_request_need_not_name_the_model(client: httpx.Client) -> None:
    answer = post(client, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
    assert answer["model"] == "m"
