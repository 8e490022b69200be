"""Prompts in which images stand between tokens: rows in place of embeddings, and rotary positions of three axes.

A row takes one cell of a cache, as a token does. Positions go by two rules: a token's is one more than the largest before it,
on all axes; an image's rows have that one in time, and go on from it by their row in height and by their column in width.
So an image of 3 x 5 rows takes 15 cells and 5 positions, wherever a prompt is cut into calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from q35c import arguments
from q35c.artifact import Manifest
from q35c.artifact.entries import AXES
from q35c.errors import PromptError
from q35c.runtime.device import Media
from q35c.runtime.prompts import MAX_ID, check_ids

CellIds = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image, or a pair of frames of a clip, as the text model reads it.

    `rows` are f32[height * width, hidden], row by row of a grid of patches merged 2 x 2. Raises PromptError for others.
    """

    rows: NDArray[np.float32]
    height: int
    width: int

    def __post_init__(self) -> None:
        height = arguments.integer("height", self.height, 1, 2**15)
        width = arguments.integer("width", self.width, 1, 2**15)
        _check_rows(self.rows, height, width)

    def cell_ids(self) -> CellIds:
        """Return a negative number for each row, equal for those of equal pictures alone: what caches know them by."""
        digest = hashlib.sha256(f"{self.height} {self.width} ".encode())
        digest.update(np.ascontiguousarray(self.rows).data)
        drawn = hashlib.shake_256(digest.digest()).digest(8 * len(self.rows))
        return np.frombuffer(drawn, np.int64) | np.int64(-(2**63))

    def positions(self) -> NDArray[np.int32]:
        """Return the positions i32[3, height * width] (time, height, width) from the picture's first on."""
        height, width = np.indices((self.height, self.width), np.int32).reshape(2, -1)
        return np.stack([np.zeros_like(height), height, width])


@dataclass(frozen=True, slots=True, eq=False)
class MultimodalPrompt:
    """Token ids and pictures, in order; `join` makes one, and a slice is one too.

    ids        i64[T]: token ids, and negative numbers where rows of pictures stand
    positions  i32[3, T], counted from the beginning of the prompt that this is a slice of
    counter    i32[T + 1]: the position of a token that would stand at each place
    rows       f32[R, hidden]: those of the negative ids, in order
    """

    ids: CellIds
    positions: NDArray[np.int32]
    counter: NDArray[np.int32]
    rows: NDArray[np.float32]

    @classmethod
    def join(cls, parts: Sequence[Sequence[int] | Picture]) -> MultimodalPrompt:
        """Return the prompt of token ids and pictures. Raises PromptError that names the part."""
        listed = arguments.sequence(
            "parts", parts, "a list of token ids and pictures", error=PromptError
        )
        ids: list[CellIds] = []
        positions: list[NDArray[np.int32]] = []
        rows: list[NDArray[np.float32]] = []
        start = 0
        for number, part in enumerate(listed):
            if isinstance(part, Picture):
                ids.append(part.cell_ids())
                positions.append(start + part.positions())
                rows.append(part.rows)
            else:
                ids.append(_checked(number, part))
                ahead = np.arange(start, start + len(ids[-1]), dtype=np.int32)
                positions.append(np.broadcast_to(ahead, (AXES, len(ahead))))
            start = int(positions[-1].max()) + 1
        if not ids:
            raise PromptError("the prompt holds no tokens", hint="give at least one token")
        return cls._made(ids, positions, rows)

    @classmethod
    def _made(
        cls,
        ids: list[CellIds],
        positions: list[NDArray[np.int32]],
        rows: list[NDArray[np.float32]],
    ) -> MultimodalPrompt:
        if len({part.shape[1] for part in rows}) > 1:
            raise PromptError("the pictures are of several models", expected="rows of one width")
        placed = np.concatenate(positions, axis=1)
        counter = np.zeros(placed.shape[1] + 1, np.int32)
        np.maximum.accumulate(placed.max(axis=0) + 1, out=counter[1:])
        joined = np.concatenate(rows) if rows else np.empty((0, 0), np.float32)
        return cls(np.concatenate(ids), placed, counter, joined)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: slice) -> MultimodalPrompt:
        """Return a part of the prompt, which goes on where the part before it ends."""
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise IndexError("a prompt is cut into parts that hang together")
        stop = max(start, stop)
        first, last = (int(np.count_nonzero(self.ids[:at] < 0)) for at in (start, stop))
        return MultimodalPrompt(
            self.ids[start:stop],
            self.positions[:, start:stop],
            self.counter[start : stop + 1],
            self.rows[first:last],
        )

    @property
    def tokens(self) -> list[int]:
        """Return the token ids alone."""
        return self.ids[self.ids >= 0].tolist()

    @property
    def has_pictures(self) -> bool:
        """Say whether there is a row of a picture."""
        return len(self.rows) > 0

    @property
    def advance(self) -> int:
        """Return by how much the position of the next token grows."""
        return int(self.counter[-1] - self.counter[0])


Prompt = list[int] | MultimodalPrompt  # checked
PromptLike = Sequence[int] | MultimodalPrompt


class Placed(NamedTuple):
    """A call's tokens and what stands in place of negative ones; what its cells hold, and by how much the position grows."""

    tokens: list[int]
    media: Media | None
    ids: Iterable[int]
    positions: int


def place(prompt: Prompt, position: int) -> Placed:
    """Return what a call appends to a sequence whose next token has this position."""
    if not isinstance(prompt, MultimodalPrompt):
        return Placed(prompt, None, prompt, len(prompt))
    positions = prompt.positions + (position - int(prompt.counter[0]))
    tokens: list[int] = np.maximum(prompt.ids, -1).tolist()
    return Placed(tokens, Media(positions, prompt.rows), prompt.ids, prompt.advance)


def cell_ids(prompt: PromptLike) -> CellIds:
    """Return what each cell of a prompt holds, as caches know it."""
    is_mixed = isinstance(prompt, MultimodalPrompt)
    return prompt.ids if is_mixed else np.asarray(prompt, dtype=np.int64)


def token_ids(prompt: Prompt) -> list[int]:
    """Return the tokens of a prompt without its pictures."""
    return prompt.tokens if isinstance(prompt, MultimodalPrompt) else prompt


def check_prompt(prompt: Any, manifest: Manifest, context: int | None = None) -> Prompt:
    """Return a prompt that a model can take: ids as a list of `int`, others as they are.

    `context` is the most cells, by default as many as addresses leave room for. Raises PromptError as `check_ids`, and for pictures where the model takes none, or of another model's width.
    """
    vocab, hidden = manifest.model.vocab_size, manifest.model.hidden_size
    context = manifest.max_context if context is None else context
    if not isinstance(prompt, MultimodalPrompt):
        return check_ids(prompt, vocab, context)
    check_ids(np.maximum(prompt.ids, 0), vocab, context)
    if prompt.has_pictures and not manifest.takes_rows:
        raise PromptError(
            "the model takes no pictures",
            hint="compile a multimodal checkpoint with its vision tower",
        )
    if prompt.has_pictures and prompt.rows.shape[1] != hidden:
        raise PromptError(
            "the pictures are of another model",
            expected=f"rows of {hidden} numbers",
            got=prompt.rows.shape[1],
        )
    return prompt


def _check_rows(rows: object, height: int, width: int) -> None:
    """Raise PromptError for what is not f32[height * width, hidden] of finite numbers."""
    array = cast(NDArray[Any], rows) if isinstance(rows, np.ndarray) else None
    if (
        array is None
        or array.dtype != np.float32
        or array.ndim != 2
        or len(array) != height * width
    ):
        raise PromptError(
            "not the rows of a picture",
            expected=f"an array f32[{height * width}, hidden]: {height} x {width} rows",
            got=cast(object, rows) if array is None else f"{array.dtype} {array.shape}",
        )
    if not np.isfinite(array).all():
        raise PromptError("rows of a picture are not finite", expected="finite numbers")


def _checked(number: int, part: Any) -> CellIds:
    """Return a part's token ids; errors say which part it is."""
    try:
        return np.array(check_ids(part, MAX_ID + 1, MAX_ID), np.int64)
    except PromptError as error:
        error.where = ", ".join(filter(None, (f"part {number}", error.where)))
        raise
