"""From a picture's patches to the rows that the text model reads in place of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from q35c import arguments
from q35c.artifact.tower import PATCHES, PLACES, TAP_WEIGHTS, TAPS, Tower, Vision
from q35c.errors import PromptError
from q35c.runtime.device import Rows
from q35c.runtime.executor import Executor
from q35c.runtime.grid import grid_inputs
from q35c.runtime.memory import available_memory, check_allocation
from q35c.vision_config import MERGE

Patches = NDArray[np.uint8]
_MOST_SIDE = 1 << 16  # patches


def see(executor: Executor, patches: Patches, grid: Sequence[int]) -> Rows:
    """Return the rows f32[rows * columns / 4, hidden] of a picture, or of a pair of frames.

    `patches` are u8[rows * columns, patch_bytes], in the order of `q35c.vision`: all of a token's, row by row; `grid` says how
    many rows and columns of them there are. Raises PromptError for others and for a model without a vision tower,
    MemoryRefused.
    """
    vision = executor.manifest.vision
    if vision is None:
        raise PromptError(
            "the model sees no pictures",
            hint="compile a multimodal checkpoint with its vision tower",
        )
    rows, columns = _check_grid(grid, vision.tower)
    _check_patches(patches, rows * columns, vision)
    check_allocation("the vision tower", executor.manifest.tower_bytes, available_memory())
    beside = grid_inputs(rows, columns, vision.config.table_side)
    inputs: dict[str, NDArray[Any]] = {
        PATCHES: patches,
        TAPS: beside.taps,
        TAP_WEIGHTS: beside.tap_weights,
        PLACES: beside.places,
    }
    return executor.see(vision.tower, inputs, rows * columns // MERGE**2)


def _check_grid(grid: Any, tower: Tower) -> tuple[int, int]:
    """Return rows and columns of patches. Raises PromptError."""
    sides = arguments.sequence("grid", grid, "rows and columns of patches", error=PromptError)
    if len(sides) != 2:
        raise PromptError("not a grid", expected="rows and columns of patches", got=grid)
    rows, columns = (arguments.integer("grid", side, MERGE, _MOST_SIDE) for side in sides)
    if rows % MERGE or columns % MERGE:
        raise PromptError(
            "a token is of 2 x 2 patches", expected="even numbers of rows and columns", got=grid
        )
    if (tokens := rows * columns // MERGE**2) > tower.tokens:
        raise PromptError(
            "the picture is too large for this artifact",
            expected=f"up to {tower.tokens} tokens",
            got=f"{tokens}: {rows} x {columns} patches",
            hint="resize it, or compile with more max_image_tokens",
        )
    return rows, columns


def _check_patches(patches: Any, count: int, vision: Vision) -> None:
    array = cast(NDArray[Any], patches) if isinstance(patches, np.ndarray) else None
    shape = (count, vision.config.patch_bytes)
    if array is None or array.dtype != np.uint8 or array.shape != shape:
        raise PromptError(
            "not the patches of a picture of this grid",
            expected=f"an array u8[{shape[0]}, {shape[1]}]",
            got=cast(object, patches) if array is None else f"{array.dtype} {array.shape}",
        )
