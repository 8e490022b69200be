"""Completions: prompts of every form, echo, scoring."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.harness import Running
from tests.serve.test_chat import post, stream

PATH = "/v1/completions"


def ask(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, **fields}


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [b"ab"]),
        ([97, 98], [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_prompts_are_texts_or_ids_or_lists(
    server: Running, client: httpx.Client, prompt: Any, ids: list[bytes]
) -> None:
    answer = post(client, ask(prompt), PATH)
    assert [choice["text"] for choice in answer["choices"]] == ["Hello"] * len(ids)
    assert [bytes(r.ids) for r in server.engine.requests[-len(ids) :]] == ids
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 6 * len(ids)


def test_sixteen_tokens_by_default(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: "x" * 100
    (choice,) = post(client, ask("a"), PATH)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("x" * 16, "length")


def test_a_prompt_is_scored(server: Running, client: httpx.Client) -> None:
    answer = post(client, ask("abc", echo=True, logprobs=2, max_tokens=0), PATH)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"] and logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"b": -0.5, "\x00": -9999.0}
    assert server.engine.requests[-1].is_scoring
    assert server.engine.requests[-1].options.max_new_tokens == 0


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_echo_comes_first(client: httpx.Client, prompt: Any) -> None:
    assert post(client, ask(prompt, echo=True), PATH)["choices"][0]["text"] == "abHello"
    *chunks, done = stream(client, ask(prompt, echo=True, logprobs=1), PATH)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "abHello"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert "".join(tokens) == "abHello<|im_end|>"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_copies_of_each_prompt(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: f"{bytes(request.ids).decode()} {request.options.seed}"
    answer = post(client, ask(["a", "b"], n=2, best_of=2, seed=1), PATH)
    assert [choice["text"] for choice in answer["choices"]] == ["a 1", "a 2", "b 1", "b 2"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2


def test_stop_strings_end_the_text(server: Running, client: httpx.Client) -> None:
    server.engine.say = lambda request: "one STOP two"
    (choice,) = post(client, ask("a", stop=["STOP"]), PATH)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
