"""S6: a busy server with a cache gives, bit for bit, what one without gives to one client after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q35c
from q35c.runtime.memory import state_bytes
from q35c.serve.engine import Engine
from q35c.serve.request import Finished, Request, Ticket
from tests.compiled import artifact
from tests.prompts import conversations
from tests.serve.talk import Answer, ask, request

MODELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("moe", "bf16", {}),
    ("dense", "w4", {}),
    ("moe", "w4-small", {}),
    ("dense", "f32", {"kv_dtype": "int8"}),
)
VOCABULARY, START, NEW_TOKENS, MOST = 307, 306, 32, 1200
CLIENTS = 7  # requests that are under way at once: more than rows
BETWEEN_RESTARTS = 40
# States that the cache has room for, one for each life of the server: all, a few, hardly one.
ROOM = (100.0, 5.0, 1.2)


def batched(items: list[Any], count: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), count):
        yield items[first : first + count]


def wanted(ids: list[int], **fields: Any) -> Request:
    """Ask for greedy tokens with the logarithms of all shares, which differ where a logit differs."""
    return request(ids, NEW_TOKENS, logprobs=VOCABULARY, **fields)


def bits(answer: Answer) -> list[Any]:
    """Return all numbers of an answer."""
    return [(token.id, token.logprob, token.top) for token in answer.tokens]


def requests(prompts: list[list[int]], rng: np.random.Generator) -> Iterator[list[Request]]:
    """Yield what arrives at once; now and then a prompt is asked for twice, to be forked."""
    for number, some in enumerate(batched(prompts, CLIENTS)):
        asked = [wanted(ids, client=str(place % 3)) for place, ids in enumerate(some)]
        if rng.random() < 0.3:
            asked[-1] = wanted(some[-1], group="g")
            asked.append(wanted(some[-1], group="g", seed=number))
        yield asked


def converse(engine: Engine, asked: list[Request], want: list[Any], rng: Any) -> None:
    """Ask at once, go away from some answers, and compare what came of all."""
    answers = [Answer() for _ in asked]
    tickets: list[Ticket] = []
    for item, answer in zip(asked, answers, strict=True):
        tickets.append(engine.submit(item, answer.post))
        if rng.random() < 0.15:
            answer.wait(int(rng.integers(NEW_TOKENS)))
            engine.cancel(tickets[-1])
    for item, answer in zip(asked, answers, strict=True):
        last = answer.wait().last
        assert isinstance(last, Finished), last
        got, expected = bits(answer), want[item.ids]
        assert got == expected[: len(got)], f"a prompt of {len(item.ids)} tokens"
        assert last.reason == "cancelled" or len(got) == NEW_TOKENS


def check(key: Any, directory: Path, count: int, seed: int) -> None:
    kind, precision, options = key
    rng = np.random.default_rng(seed)
    prompts = list(conversations(seed, count, vocab=306, start=START, most=MOST))
    with q35c.load(artifact(kind, precision, **options), threads=1) as model:
        cold = Engine(model)
        want = {tuple(ids): bits(ask(cold, wanted(ids))[0]) for ids in prompts}
        cold.close()
        evictions = cached = total = 0
        for life, some in enumerate(batched(prompts, BETWEEN_RESTARTS)):
            states = ROOM[life % len(ROOM)]
            size = int(states * state_bytes(model.manifest, MOST // 2))
            engine = Engine(model, cache_bytes=size, cache_dir=directory)
            for asked in requests(some, rng):
                converse(engine, asked, want, rng)
                total += sum(len(item.ids) for item in asked)
            engine.close()
            numbers = engine.statistics()
            evictions, cached = evictions + numbers.evictions, cached + numbers.cached_tokens
        print(f"seed {seed}: {cached / total:.0%} of {total} tokens were kept, {evictions} evicted")
        assert cached > 0.2 * total and (evictions > 0 or count <= BETWEEN_RESTARTS)


def test_conversations_through_the_server(tmp_path: Path) -> None:
    check(MODELS[1], tmp_path, count=20, seed=5)


@pytest.mark.nightly
@pytest.mark.parametrize("key", MODELS, ids=str)
def test_a_thousand_conversations(key: Any, tmp_path: Path) -> None:
    for seed in range(
        6, 10
    ):  # a conversation goes on from any before it: of more, few are of the same life
        check(key, tmp_path / str(seed), count=250, seed=seed)
