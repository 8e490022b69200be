"""What the next turn of a conversation will begin with, to be computed while nobody waits for anything.

Once something follows an answer the template writes it anew: thinking is dropped, calls are set in its own form. So what was
generated is not how the next prompt begins, and that would be computed when the user waits for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from q35c.runtime.lease import MESSAGE_START, SLICE
from q35c.runtime.multimodal import MultimodalPrompt, token_ids
from q35c.serve.answer import Choice
from q35c.serve.conversation import Ask, Sampling, TextModel, encode, make_requests
from q35c.serve.request import Request

_ANY = "."  # in the place of what nobody knows yet


def next_request(model: TextModel, ask: Ask, choice: Choice) -> Request | None:
    """Return what computes the beginning of the turn behind an answer, None where that is not known or not worth it.

    For a worker thread. Raises what preparing a conversation raises.
    """
    start = model.tokenizer.token_id(MESSAGE_START)
    if start is None or ask.is_continued or choice.reason not in ("stop", "tool_calls"):
        return None
    template = {**ask.template, "add_generation_prompt": False}
    messages = [*ask.messages, *_turn(choice)]
    prompt = encode(model, replace(ask, messages=messages, template=template))
    if isinstance(prompt, MultimodalPrompt):
        return None
    ids = token_ids(prompt)
    places = [place for place, token in enumerate(ids) if token == start]
    known = ids[: places[-1] + 1] if places else []
    if not SLICE < len(known) <= model.context:
        return None
    (request,) = make_requests(model, known, Sampling(max_tokens=0), ask.caller, 0.0)
    return replace(request, deadline=None, is_idle=True)


def _turn(choice: Choice) -> list[dict[str, Any]]:
    """Return an answer as a message, and what follows it: a tool's result where it calls, else the user."""
    made = choice.made
    answer: dict[str, Any] = {"role": "assistant", "content": made.content}
    if made.reasoning:
        answer["reasoning_content"] = made.reasoning
    if not made.complete:
        return [answer, {"role": "user", "content": _ANY}]
    answer["tool_calls"] = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in made.complete
    ]
    return [answer, {"role": "tool", "tool_call_id": made.complete[0].id, "content": _ANY}]
