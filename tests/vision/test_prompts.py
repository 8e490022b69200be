"""Pads and positions are those of transformers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config

from q35c.errors import MediaError
from q35c.vision.prompts import Clip, Grid, Span, VisionTokens, expand, positions

TOKENS = VisionTokens(image_pad=90, video_pad=91, start=92, end=93)


def encode(text: str) -> list[int]:
    return [ord(character) % 64 for character in text]


def test_a_picture_takes_a_pad_for_each_token() -> None:
    ids, spans = expand([1, 92, 90, 93, 2, 90], [Grid(2, 3), Grid(1, 2)], [], TOKENS, encode)
    assert ids == [1, 92, *[90] * 6, 93, 2, 90, 90]
    assert spans == [Span(2, Grid(2, 3)), Span(10, Grid(1, 2))]


def test_a_clip_says_its_times_within_the_pair_of_the_template() -> None:
    clip = Clip((Grid(1, 2), Grid(1, 2)), (0.26, 1.75))
    ids, spans = expand([92, 91, 93], [], [clip], TOKENS, encode)
    first, second = encode("<0.3 seconds>"), encode("<1.8 seconds>")
    assert ids == [92, *first, 92, 91, 91, 93, *second, 92, 91, 91, 93, 93]
    assert [span.start for span in spans] == [1 + 13 + 1, 1 + 13 + 4 + 13 + 1]


@pytest.mark.parametrize(
    ("ids", "images", "clips", "words"),
    [
        ([1, 2], 1, 0, "pictures"),
        ([1, 90], 0, 0, "pictures"),
        ([90, 90], 1, 0, "pictures"),
        ([91], 0, 0, "clips"),
        ([90], 1, 1, "clips"),
    ],
)
def test_places_and_pictures_must_be_as_many(
    ids: list[int], images: int, clips: int, words: str
) -> None:
    given_clips = [Clip((Grid(1, 1),), (0.0,))] * clips
    with pytest.raises(MediaError, match=words):
        expand(ids, [Grid(1, 1)] * images, given_clips, TOKENS, encode)


def reference(pieces: list[Any]) -> tuple[np.ndarray, int]:
    """Return the reference's positions of pieces, and the next one: a number of text tokens, or (kind, rows, columns)."""
    ids: list[int] = []
    kinds: list[int] = []
    grids: dict[int, list[tuple[int, ...]]] = {1: [], 2: []}
    for piece in pieces:
        kind, count = (0, piece) if isinstance(piece, int) else (piece[0], piece[1] * piece[2])
        ids += [7] * count
        kinds += [kind] * count
        if kind:
            grids[kind].append((1, piece[1] * 2, piece[2] * 2))
    # The reference takes a clip as a number of frames of one shape.
    clips = [
        (len(list(group)), *shape) for shape, group in itertools.groupby(g[1:] for g in grids[2])
    ]
    model = object.__new__(modeling_qwen3_5.Qwen3_5Model)
    torch.nn.Module.__init__(model)
    model.config = Qwen3_5Config()
    found, delta = model.get_rope_index(
        torch.tensor([ids]), torch.tensor([kinds]), _tensor(grids[1]), _tensor(clips)
    )
    return found[:, 0].numpy(), len(ids) + int(delta)


def _tensor(grids: list[tuple[int, ...]]) -> torch.Tensor | None:
    return torch.tensor(grids) if grids else None


def ours(pieces: list[Any]) -> tuple[np.ndarray, int]:
    spans, at = [], 0
    for piece in pieces:
        if isinstance(piece, int):
            at += piece
        else:
            spans.append(Span(at, Grid(*piece[1:])))
            at += spans[-1].grid.tokens
    return positions(at, spans)


PIECE = st.tuples(st.sampled_from([1, 2]), st.integers(1, 9), st.integers(1, 9))


@given(st.integers(1, 20), st.lists(st.tuples(PIECE, st.integers(1, 20)), max_size=6))
def test_positions_have_three_axes_and_fewer_steps_than_cells(first: int, rest: list[Any]) -> None:
    pieces = [first, *itertools.chain.from_iterable(rest)]
    found, after = ours(pieces)
    want, want_after = reference(pieces)
    assert np.array_equal(found, want) and after == want_after


def test_a_tall_picture_takes_more_cells_than_positions() -> None:
    found, after = positions(43, [Span(1, Grid(20, 2))], first=5)
    assert after == 5 + 1 + 20 + 2
    assert found[:, 0].tolist() == [5, 5, 5]
    assert found[:, 1].tolist() == [6, 6, 6] and found[:, 40].tolist() == [6, 25, 7]
    assert found[:, 41].tolist() == [26, 26, 26]


def test_pictures_may_touch() -> None:
    """The reference fails there; the template never writes it."""
    found, after = positions(5, [Span(0, Grid(2, 1)), Span(2, Grid(1, 3))])
    assert found.tolist() == [[0, 0, 2, 2, 2], [0, 1, 2, 2, 2], [0, 0, 2, 3, 4]] and after == 5
