"""What clients of a server ask one after the other, as token ids: chats, agents with tools, questions about documents."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import numpy as np

START, END, THINK, CLOSE = 1, 2, 3, 4
VOCAB = 200_000


class Texts:
    """Texts by name: the same name is the same text, whenever it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, list[int]] = {}

    def __call__(self, name: str, tokens: int) -> list[int]:
        if name not in self._made:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            self._made[name] = rng.integers(10, VOCAB, tokens).tolist()
        return self._made[name]


def message(text: list[int]) -> list[int]:
    return [START, 5, *text, END]


def prompt(*parts: list[int]) -> list[int]:
    """Return a conversation with the beginning of an answer that thinks."""
    return [*(token for part in parts for token in part), START, 6, THINK]


def chats(seed: int, turns: int = 12, count: int = 6) -> Iterator[list[int]]:
    """Yield prompts of chats by turns, with one system message; what was thought is dropped from history."""
    rng, text = random.Random(seed), Texts()
    histories = [message(text("system", 600)) for _ in range(count)]
    for turn in range(turns):
        for chat in range(count):
            histories[chat] += message(text(f"user {chat} {turn}", rng.randint(20, 200)))
            yield prompt(histories[chat])
            answer = text(f"answer {chat} {turn}", rng.randint(80, 500))
            histories[chat] += [START, 6, *answer, END]


def agents(
    seed: int, count: int = 2, queries: int = 3, steps: int = 12, *, sends_back: bool = True
) -> Iterator[list[int]]:
    """Yield prompts of agents by turns, each a loop of calls for every query.

    With `sends_back` the thoughts since the last query are part of the prompt; a new query drops them.
    """
    rng, text = random.Random(seed), Texts()
    system = message(text("system", 15_000))
    done: list[list[int]] = [[] for _ in range(count)]
    for query in range(queries):
        loops: list[list[tuple[list[int], list[int], list[int]]]] = [[] for _ in range(count)]
        for agent in range(count):
            done[agent] += message(text(f"user {agent} {query}", rng.randint(50, 400)))
        for step in range(steps):
            for agent in range(count):
                name = f"{agent} {query} {step}"
                shown = [
                    [
                        START,
                        6,
                        *([THINK, *thought, CLOSE] if sends_back else []),
                        *call,
                        END,
                        *result,
                    ]
                    for thought, call, result in loops[agent]
                ]
                yield prompt(system, done[agent], *shown)
                thought = text(f"thought {name}", rng.randint(60, 500))
                call = text(f"call {name}", rng.randint(40, 600))
                size = rng.choice([80, 300, 1500, 4000])
                result = message(text(f"result {name}", size)) if step < steps - 1 else []
                loops[agent].append((thought, call, result))
        for agent in range(count):
            for _, call, result in loops[agent]:
                done[agent] += [START, 6, *call, END, *result]


def questions(seed: int, count: int = 120, documents: int = 30) -> Iterator[list[int]]:
    """Yield prompts of questions about three documents each, some of which are asked for often."""
    rng, text = random.Random(seed), Texts()
    shares = [1 / (at + 1) for at in range(documents)]
    sizes = [rng.randint(800, 3000) for _ in range(documents)]
    for number in range(count):
        chosen: list[int] = []
        while len(chosen) < 3:
            (document,) = rng.choices(range(documents), shares)
            if document not in chosen:
                chosen.append(document)
        found = [token for at in chosen for token in text(f"document {at}", sizes[at])]
        system = [START, 5, *text("system", 400), *found, END]
        yield prompt(system, message(text(f"question {number}", rng.randint(20, 60))))
