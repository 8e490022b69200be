"""Answers to conversations: their parts, how they end, and sessions that are kept between them."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import q35c
from q35c.errors import OptionError, PromptError
from q35c.runtime.answering import Conversation, begins_thinking
from q35c.runtime.answers import ChatAnswer
from q35c.runtime.chat.answer import CallArguments, CallEnd, CallStart, ContentDelta, ReasoningDelta
from q35c.runtime.sampling import Sampler
from tests.chatting import BLANK, CALLED, CLOSE, CUT, NOW, lines, write_chat
from tests.fake_artifact import CONTEXT, END, GENERATION

USER = [{"role": "user", "content": "hi"}]


def load(path: Path, *scripts: list[int], **more: Any) -> q35c.Model:
    return q35c.load(write_chat(path / "m.q35c", *scripts, **more), threads=1)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """A model that thinks "hm", says "Yes." and calls; without thinking it says "No!"."""
    script = lines("\nhm", CLOSE, BLANK, "Yes.", CALLED)
    with load(tmp_path_factory.mktemp("thinker"), script, lines("~No!")) as model:
        yield model


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[q35c.Model]:
    """A model whose every token depends on the whole past."""
    generation = {**GENERATION, "do_sample": True, "stop_ids": []}
    path = tmp_path_factory.mktemp("babbler")
    with load(path, noise=8.0, generation=generation, context=512) as model:
        yield model


def test_an_answer_has_reasoning_content_and_calls(thinker: q35c.Model) -> None:
    made = thinker.chat(USER, tools=[NOW])
    assert isinstance(made, q35c.ChatAnswer)
    assert (made.reasoning, made.content, made.finish_reason) == ("hm", "Yes.", "tool_calls")
    (call,) = made.tool_calls
    assert (call.name, call.arguments) == ("now", {"zone": "UTC"}) and call.id.startswith("call_")
    usage = made.usage
    assert (usage.new_tokens, usage.reasoning_tokens, usage.cached_tokens) == (10, 2, 0)
    assert usage.prompt_tokens == len("user:hi\n") + 3 and usage.prefill_seconds > 0
    assert made.stop == END and usage.decode_tokens_per_second > 0


def test_an_answer_is_a_message_of_the_history(thinker: q35c.Model) -> None:
    made = thinker.chat(USER, tools=[NOW])
    function = {"name": "now", "arguments": {"zone": "UTC"}}
    assert made.message == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "hm",
        "tool_calls": [{"id": made.tool_calls[0].id, "type": "function", "function": function}],
    }
    again = thinker.chat([*USER, made.message, {"role": "tool", "content": "noon"}])
    assert again.reasoning == "hm"


def test_a_stream_yields_the_parts(thinker: q35c.Model) -> None:
    stream = thinker.chat(USER, tools=[NOW], stream=True)
    parts = list(stream)
    kinds = [type(part) for part in parts]
    assert kinds[:2] == [ReasoningDelta] * 2 and kinds[2:6] == [ContentDelta] * 4
    assert kinds[6:] == [CallStart, CallArguments, CallEnd]
    assert stream.result.tool_calls[0].arguments_text == parts[-2].text == '{"zone": "UTC"}'
    with pytest.raises(StopIteration):
        next(stream)


def test_calls_are_content_without_tools(thinker: q35c.Model) -> None:
    made = thinker.chat(USER)
    assert made.content.startswith("Yes.<tool_call>") and not made.tool_calls
    assert made.finish_reason == "stop"


def test_thinking_may_be_off(thinker: q35c.Model) -> None:
    made = thinker.chat(USER, thinking=False)
    assert (made.reasoning, made.content) == ("", "No!")
    assert made.usage.reasoning_tokens == 0
    assert thinker.chat(USER, template={"enable_thinking": False}).content == "No!"


@pytest.mark.parametrize(
    ("most", "reasoning", "content", "tokens"),
    [(1, "h", "", 1), (2, "hm", "", 2), (5, "hm", "Y", 2)],
)
def test_an_answer_may_be_cut_off(
    thinker: q35c.Model, most: int, reasoning: str, content: str, tokens: int
) -> None:
    made = thinker.chat(USER, max_new_tokens=most)
    assert (made.reasoning, made.content, made.finish_reason) == (reasoning, content, "length")
    assert made.usage.reasoning_tokens == tokens


def test_half_a_call_is_none(tmp_path: Path) -> None:
    with load(tmp_path, lines("~", CUT)) as model:
        made = model.chat(USER, thinking=False, tools=[NOW])
    assert (made.content, made.tool_calls, made.finish_reason) == ("", (), "stop")
    assert "tool_calls" not in made.message


def test_stop_strings_are_looked_for_in_content_only(thinker: q35c.Model) -> None:
    made = thinker.chat(USER, stop=["m", "es", "zone"], tools=[NOW])
    assert (made.reasoning, made.content, made.stop) == ("hm", "Y", "es")
    assert (made.finish_reason, made.tool_calls) == ("stop", ())
    assert made.usage.new_tokens == 7
    assert thinker.chat(USER, stop=["<|im_end|>", "Yet"], tools=[NOW]).content == "Yes."


def test_one_call_may_be_enough(tmp_path: Path) -> None:
    with load(tmp_path, lines("~", CALLED, "\nand more")) as model:
        one = model.chat(USER, thinking=False, tools=[NOW], parallel_tool_calls=False)
        all_of_it = model.chat(USER, thinking=False, tools=[NOW])
    assert (one.content, one.finish_reason, one.usage.new_tokens) == ("", "tool_calls", 1)
    assert (all_of_it.content, all_of_it.finish_reason) == ("and more", "tool_calls")


def test_tools_may_be_kept_from_the_model(thinker: q35c.Model) -> None:
    made = thinker.chat(USER, tools=[NOW], tool_choice="none")
    assert made.tool_calls == () and made.content.startswith("Yes.<tool_call>")


def test_a_closed_stream_is_cancelled(thinker: q35c.Model) -> None:
    stream = thinker.chat(USER, stream=True)
    assert next(stream) == ReasoningDelta("h")
    stream.close()
    assert (stream.result.reasoning, stream.result.finish_reason) == ("h", "cancelled")
    assert list(stream) == []
    stream.close()
    unread = thinker.chat(USER, stream=True)
    unread.close()
    assert unread.result.finish_reason == "cancelled"


def test_an_answer_ends_where_the_context_is_full(babbler: q35c.Model) -> None:
    made = babbler.chat([{"role": "user", "content": "x" * 450}], seed=1)
    assert made.finish_reason == "context"
    assert made.usage.prompt_tokens + made.usage.new_tokens == babbler.context + 1


def test_control_tokens_of_users_are_text(thinker: q35c.Model) -> None:
    made = thinker.chat([{"role": "user", "content": "<|im_end|>"}])
    assert made.usage.prompt_tokens == len("user:<|im_end|>\n") + 3


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"template": 5}, "template"),
        ({"thinking": 1}, "thinking"),
        ({"stream": 1}, "stream"),
        ({"tools": 5}, "tools"),
        ({"nonsense": 5}, "nonsense"),
        ({"temperature": "hot"}, "temperature"),
        ({"logit_bias": {270: 1.0}}, "logit_bias"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_wrong_options_are_named(thinker: q35c.Model, options: Any, where: str) -> None:
    with pytest.raises(OptionError) as caught:
        thinker.chat(USER, **options)
    assert caught.value.where == where


def test_a_conversation_that_is_too_long(thinker: q35c.Model) -> None:
    with pytest.raises(PromptError, match="longer than the context"):
        thinker.chat([{"role": "user", "content": "x" * CONTEXT}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_end|><think>\n", True),
        ("<think>\n", True),
        ("<|im_end|><think>\n\n</think>\n\n", False),
        ("<think><|im_end|>assistant", False),
        ("", False),
    ],
)
def test_the_prompt_says_whether_the_answer_begins_in_reasoning(
    thinker: q35c.Model, text: str, expected: bool
) -> None:
    assert begins_thinking(thinker.tokenizer, thinker.tokenizer.encode(text)) is expected


def test_kept_answers_are_those_of_a_new_session(babbler: q35c.Model) -> None:
    """Turns, turns taken back, other beginnings, streams that were cut off: all as if each were the first."""
    chance = random.Random(5)
    cached = 0
    with Conversation(babbler) as conversation:
        messages: list[dict[str, Any]] = []
        for turn in range(40):
            kind = chance.randrange(4) if len(messages) > 2 else 0
            if kind == 1:
                del messages[-2:]
            elif kind == 2 or sum(len(m["content"]) for m in messages) > 120:
                messages = [{"role": "system", "content": "s" * chance.randint(1, 90)}]
            messages.append(
                {"role": "user", "content": chance.choice("abc") * chance.randint(1, 40)}
            )
            stream = conversation.answer(messages, seed=turn, max_new_tokens=12, top_k=50)
            if chance.random() < 0.3:
                next(stream, None)
                stream.close()
            else:
                made, alone = [
                    [*answers] and answers.result
                    for answers in (
                        stream,
                        babbler.chat(messages, seed=turn, max_new_tokens=12, top_k=50, stream=True),
                    )
                ]
                assert outcome(made) == outcome(alone), turn
                cached += made.usage.cached_tokens
            messages.append({"role": "assistant", "content": "ok"})
    assert cached > 500


def outcome(answer: ChatAnswer) -> tuple[Any, ...]:
    return answer.reasoning, answer.content, answer.finish_reason, answer.usage.new_tokens


def test_a_kept_session_is_given_back(babbler: q35c.Model) -> None:
    gc.collect()
    before = len(babbler._budget._live)
    with Conversation(babbler) as conversation:
        long = [{"role": "system", "content": "s" * 70}, *USER]
        list(conversation.answer(long, max_new_tokens=3))
        unfinished = conversation.answer(long, max_new_tokens=100)
        next(unfinished)
        assert unfinished.result.usage.cached_tokens == 64
        list(conversation.answer(long, max_new_tokens=3))
        assert unfinished.result.finish_reason == "cancelled"
        assert len(babbler._budget._live) == before + 1
    conversation.close()
    del unfinished
    gc.collect()
    assert len(babbler._budget._live) == before


def test_an_interrupt_between_steps_loses_nothing(
    babbler: q35c.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [{"role": "system", "content": "s" * 70}, *USER]
    with Conversation(babbler) as conversation:
        stream = conversation.answer(long, seed=1, max_new_tokens=100)
        next(stream)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Sampler, "sample", interrupt)
            list(stream)
        stream.close()
        assert stream.result.finish_reason == "cancelled" and stream.result.reasoning
        again = conversation.answer(long, seed=1, max_new_tokens=3)
        list(again)
        assert again.result.usage.cached_tokens == 64


def interrupt(*_: object) -> int:
    raise KeyboardInterrupt


def test_a_kept_session_survives_a_failed_step(tmp_path: Path) -> None:
    scripts = lines("\nabc"), lines("~z!")
    with load(tmp_path, *scripts, failing_token=ord("z")) as model, Conversation(model) as kept:
        long = [{"role": "system", "content": "y" * 70}]
        assert [*kept.answer([*long, *USER])][-1] == ReasoningDelta("c")
        with pytest.raises(q35c.errors.ExecutionError):
            list(kept.answer([*long, *USER], thinking=False))
        stream = kept.answer([*long, *USER])
        assert [*stream][-1] == ReasoningDelta("c") and stream.result.usage.prompt_tokens > 64
