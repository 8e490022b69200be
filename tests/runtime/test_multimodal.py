"""Prompts of tokens and pictures: what they consist of, parts of them, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from q35c.errors import OptionError, PromptError
from q35c.runtime.multimodal import MultimodalPrompt, Picture, place


def picture(height: int, width: int, value: float = 0.5) -> Picture:
    return Picture(np.full((height * width, 4), value, np.float32), height, width)


def test_positions_of_an_image_are_those_of_its_grid() -> None:
    prompt = MultimodalPrompt.join([(7, 8), picture(2, 3), [9]])
    assert prompt.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert prompt.counter.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5, 6]
    assert prompt.tokens == [7, 8, 9] and len(prompt) == 9 and prompt.advance == 6


def test_parts_hold_what_belongs_to_them() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(6, 4)
    prompt = MultimodalPrompt.join(
        [(7, 8), Picture(rows, 2, 3), (9,), Picture(rows[:2] + 50, 1, 2)]
    )
    for start in range(len(prompt)):
        for stop in range(start + 1, len(prompt) + 1):
            part, at = prompt[start:stop], 10
            tokens, media, ids, positions = place(part, at)
            assert media is not None and ids is part.ids and positions == part.advance
            assert len(part) == len(tokens) == media.positions.shape[1] == stop - start
            assert tokens == [max(int(i), -1) for i in prompt.ids[start:stop]]
            assert len(media.rows) == tokens.count(-1)
            whole = prompt.positions[:, start:stop] - prompt.counter[start] + at
            assert np.array_equal(media.positions, whole)
            again = prompt[:stop][start:]
            assert np.array_equal(again.rows, part.rows) and np.array_equal(again.ids, part.ids)
    assert np.array_equal(prompt[3:5].rows, rows[1:3])
    assert len(prompt[5:5]) == 0


def test_cells_are_known_by_the_picture_they_are_of() -> None:
    """Equal for equal pictures; else different in every cell, also where another grid has the same rows."""
    assert np.array_equal(picture(2, 3).cell_ids(), picture(2, 3).cell_ids())
    rows = [picture(2, 3).cell_ids(), picture(3, 2).cell_ids(), picture(2, 3, 0.25).cell_ids()]
    distinct = {int(number) for ids in rows for number in ids}
    assert len(distinct) == 18 and max(distinct) < 0


@pytest.mark.parametrize(
    ("rows", "height", "width"),
    [
        (np.zeros((6, 4), np.float64), 2, 3),
        (np.zeros((5, 4), np.float32), 2, 3),
        (np.zeros(6, np.float32), 2, 3),
        ([[0.0]], 1, 1),
        (np.full((1, 4), np.nan, np.float32), 1, 1),
        (np.full((1, 4), np.inf, np.float32), 1, 1),
    ],
)
def test_what_is_no_picture(rows: Any, height: int, width: int) -> None:
    with pytest.raises(PromptError, match="rows of a picture"):
        Picture(rows, height, width)


@pytest.mark.parametrize("sides", [(0, 1), (1, -1), (1.5, 2), (None, 2), (2**20, 1)])
def test_sides_that_are_none(sides: Any) -> None:
    with pytest.raises(OptionError, match=r"height|width"):
        Picture(np.zeros((1, 4), np.float32), *sides)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "holds no tokens"),
        ("text", "a list of token ids and pictures"),
        ([[1], []], "part 1"),
        ([[1], "text"], "part 1"),
        ([[1], [2, -1]], "part 1, token 1"),
        ([[2**31]], "part 0, token 0"),
        ([picture(1, 1), Picture(np.zeros((1, 5), np.float32), 1, 1)], "several models"),
    ],
)
def test_what_is_no_prompt(parts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        MultimodalPrompt.join(parts)


def test_a_prompt_has_no_gaps() -> None:
    with pytest.raises(IndexError, match="hang together"):
        MultimodalPrompt.join([(1, 2, 3)])[::2]
