"""What memory holds, as numpy sees it: types by the manifest's names, and the inputs of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q35c.layouts import blobs
from q35c.runtime.device import HasState, Media

# bfloat16 has no numpy type of its own: its bits are handled as uint16.
NUMPY_TYPES = {
    "f32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
}


def fill_inputs(
    fields: Mapping[str, NDArray[Any]],
    origin: int,
    sequences: Sequence[HasState],
    tokens: Sequence[int],
    media: Media | None = None,
) -> None:
    """Write what a step appends: equally many tokens to each sequence, whose slots count from the address `origin`.

    `media` holds the rows of negative tokens, and the positions of all; without it they are text.
    """
    count = len(tokens)
    each = count // len(sequences)
    fields["tokens"][:count] = tokens
    for row, sequence in enumerate(sequences):
        fields["slots"][row] = (sequence.state.address - origin) // blobs.SLOT_BYTES
        fields["starts"][row] = sequence.length
        # Text has the same position on all three rotary axes (t, h, w).
        at = sequence.position
        ahead = at if each == 1 else np.arange(at, at + each)
        fields["positions"][:, row * each : (row + 1) * each] = ahead
    if media is not None:
        fields["positions"][:, :count] = media.positions
        if len(media.rows):
            fields["rows"][:count][fields["tokens"][:count] < 0] = media.rows
