"""Make room for pictures in a prompt, and say where its tokens are.

A template writes one pad for a picture or clip. A picture takes a pad for each of its tokens instead; a clip, for each of its
frames, the time as text and the pads between a start and an end. The start and end that the template writes around stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from q35c.errors import MediaError

TEXT_AXES = 3  # of positions: time, row, column


@dataclass(frozen=True, slots=True)
class Grid:
    """One picture's or frame's tokens: rows and columns."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def positions(self) -> int:
        """Return how far the text behind it is moved on: its longer side."""
        return max(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a picture's or frame's tokens lie in a prompt: from `start`, in cells."""

    start: int
    grid: Grid


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip's frames and the middle of each in seconds."""

    frames: tuple[Grid, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """The ids that stand for pictures in the vocabulary."""

    image_pad: int
    video_pad: int
    start: int
    end: int


def expand(
    ids: Sequence[int],
    images: Iterable[Grid],
    clips: Iterable[Clip],
    tokens: VisionTokens,
    encode: Callable[[str], Sequence[int]],
) -> tuple[list[int], list[Span]]:
    """Return the prompt with room for its pictures and clips, and where each picture and frame lies.

    `encode` turns the text of a time into ids. Raises MediaError where the pads are not as many as the pictures or clips.
    """
    left = {tokens.image_pad: list(images), tokens.video_pad: list(clips)}
    names = {tokens.image_pad: "pictures", tokens.video_pad: "clips"}
    for pad, given in left.items():
        if (places := sum(token == pad for token in ids)) != len(given):
            raise MediaError(
                f"the prompt has not as many places as there are {names[pad]}",
                where="prompt",
                expected=len(given),
                got=places,
                hint="write one pad for each, or let the chat template do it",
            )
        given.reverse()
    expanded: list[int] = []
    spans: list[Span] = []
    for token in ids:
        if token not in left:
            expanded.append(token)
            continue
        item = left[token].pop()
        if isinstance(item, Grid):
            _place(item, token, expanded, spans)
        else:
            _place_clip(item, tokens, encode, expanded, spans)
    return expanded, spans


def _place(grid: Grid, pad: int, ids: list[int], spans: list[Span]) -> None:
    spans.append(Span(len(ids), grid))
    ids.extend([pad] * grid.tokens)


def _place_clip(
    clip: Clip,
    tokens: VisionTokens,
    encode: Callable[[str], Sequence[int]],
    ids: list[int],
    spans: list[Span],
) -> None:
    for grid, seconds in zip(clip.frames, clip.seconds, strict=True):
        ids.extend([*encode(f"<{seconds:.1f} seconds>"), tokens.start])
        _place(grid, tokens.video_pad, ids, spans)
        ids.append(tokens.end)


def positions(count: int, spans: Iterable[Span], first: int = 0) -> tuple[np.ndarray, int]:
    """Return the positions of `count` tokens, i32 [3, count] (time, row, column), and the position behind them.

    Text advances all three by one a token. A picture's tokens share the time at which it begins, its rows and columns count
    from there, and the text goes on behind its longer side: so there are fewer positions than cells. Frames of a clip are
    pictures like others. `spans` come in order and do not overlap; `first` is the position of the first token.
    """
    result = np.empty((TEXT_AXES, count), np.int32)
    cell, position = 0, first
    for span in spans:
        text = span.start - cell
        result[:, cell : span.start] = np.arange(position, position + text)
        position += text
        cell = span.start + span.grid.tokens
        rows, columns = np.divmod(np.arange(span.grid.tokens), span.grid.columns)
        result[:, span.start : cell] = np.stack([np.zeros_like(rows), rows, columns]) + position
        position += span.grid.positions
    result[:, cell:] = np.arange(position, position + count - cell)
    return result, position + count - cell
