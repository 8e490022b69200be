"""What a vision tower reads beside a picture's patches: from how many rows and columns of patches there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q35c.vision_config import MERGE

TAPS = 4  # rows of the position table that a patch lies between

Integers = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GridInputs:
    """The inputs that follow from a grid of N patches, in the order of the patches: all of a token's, row by row."""

    taps: Integers  # [N, 4], rows of the position table
    tap_weights: Floats  # [N, 4], adding up to 1
    places: Integers  # [N, 2], row and column


def grid_inputs(rows: int, columns: int, table_side: int) -> GridInputs:
    """Return taps, their weights and places for a grid of patches, whose sides are multiples of 2.

    The position table is a square of `table_side` rows that is stretched over the grid, corner on corner, and interpolated
    between (transformers' `get_vision_interpolation_indices_and_weights`).
    """
    axes = _block_order(rows, columns)
    (row_taps, row_weights), (column_taps, column_weights) = (
        _between(axis, size, table_side) for axis, size in zip(axes, (rows, columns), strict=True)
    )
    taps = row_taps[:, :, None] * table_side + column_taps[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    places = np.stack(axes, axis=-1)
    return GridInputs(
        taps.reshape(-1, TAPS).astype(np.int32),
        weights.reshape(-1, TAPS),
        places.astype(np.int32),
    )


def _block_order(rows: int, columns: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the row and the column of every patch, blocks of 2x2 one after another."""
    grid = np.indices((rows, columns)).reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
    row, column = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return row, column


def _between(places: NDArray[Any], size: int, side: int) -> tuple[NDArray[Any], Floats]:
    """Return the two places of an axis of the table around each place of the grid [N, 2], and their weights in f32."""
    source = places.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    around = np.floor(source).astype(np.int64)[:, None] + np.arange(2)
    distance = np.abs(source[:, None] - around.astype(np.float32))
    weights = np.maximum(np.float32(1) - distance, np.float32(0))
    return np.clip(around, 0, side - 1), weights
