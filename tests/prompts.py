"""Random conversations as prompts: templates rewrite answers, users branch off, and all begin alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np


def conversations(
    seed: int, count: int, *, vocab: int, start: int, most: int, forbidden: int = -1
) -> Iterator[list[int]]:
    """Yield prompts of up to `most` tokens: turns of a few conversations by chance, in which `start` begins a message.

    Three system messages are shared. Now and then an answer comes back with other tokens, a conversation is taken up again
    at an earlier turn, or two have the same long document.
    """
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> list[int]:
        ids = rng.integers(0, vocab, rng.integers(low, high))
        return np.where((ids == start) | (ids == forbidden), 0, ids).tolist()

    systems = [[start, *text(5, 200)] for _ in range(3)]
    documents = [text(50, 300) for _ in range(3)]
    tails = [[], [1, 2], [1, 2, 3, 4]]
    histories: list[list[list[int]]] = []
    for _ in range(count):
        kind = rng.random()
        if not histories or kind < 0.2:
            histories.append([systems[rng.integers(3)]])
        history = histories[rng.integers(len(histories))]
        if kind > 0.8 and len(history) > 2:  # taken up again at an earlier turn
            history = history[: int(rng.integers(1, len(history)))]
            histories.append(history)
        question = documents[rng.integers(3)] if kind > 0.6 else []
        history.append([start, 5, *question, *text(1, 90)])
        prompt = [*chain.from_iterable(history), start, 6, *tails[rng.integers(3)]]
        if len(prompt) > most:
            histories.remove(history)
            continue
        yield prompt
        history.append([start, 6, *text(1, 60)])
