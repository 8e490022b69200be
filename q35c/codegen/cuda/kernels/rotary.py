"""Cosines and sines of the interleaved multi-axis rotary angles.

    angle[t, i] = position[axis(i), t] * inv_freq[i]        table[t] = scaling * (cos of all, then sin of all)

Axes 1 and 2 own every third angle of their section, from angle 1 and 2 on; axis 0 the rest. One thread an angle.
"""

from __future__ import annotations

from tvm.tirx import PrimFunc

from q35c.codegen.cuda.kernels.family import ONE, Family, elementwise, fixed, per_row
from q35c.codegen.cuda.kernels.make import T, array, let, make_kernel, store
from q35c.codegen.cuda.kernels.threads import columns, threads

AXES = 3
TOKENS = 8  # of a block
LANES = 32
_ARGUMENTS = "positions table tokens ld_positions ld_table"


def axis_of(angle: int, sections: tuple[int, ...]) -> int:
    """Return the axis whose position an angle takes."""
    axis = angle % AXES
    return axis if axis and angle < sections[axis] * AXES else 0


def rotary_table(
    inv_freq: tuple[float, ...], sections: tuple[int, ...], scaling: float
) -> PrimFunc:
    """Make the kernel (POSITIONS i32 [3, T], TABLE f32 [T, R], T, ld_positions, ld_table)."""
    half = len(inv_freq)
    axes = [axis_of(angle, sections) for angle in range(half)]

    def body(positions, table, tokens, ld_positions, ld_table) -> None:  # type: ignore[no-untyped-def]
        positions = array(positions, (AXES, ld_positions), "int32")
        table = array(table, (tokens, ld_table), "float32")
        grid = ((tokens + (TOKENS - 1)) // TOKENS, 1, 1)
        with threads(grid, (LANES, TOKENS, 1)) as (block, lane, ty):
            row = let("row", block * TOKENS + ty)
            with T.If(row < tokens), T.Then(), columns(half, lane, LANES) as i:
                frequency, axis = T.float32(inv_freq[0]), 0
                for angle in range(1, half):
                    frequency = T.Select(i >= angle, T.float32(inv_freq[angle]), frequency)
                    axis = T.Select(i >= angle, axes[angle], axis)
                position = let("position", T.cast(positions[axis, row], "float32"))
                angle = let("angle", position * frequency)
                store(table, T.cos(angle) * T.float32(scaling), row, i)
                store(table, T.sin(angle) * T.float32(scaling), row, half + i)

    return make_kernel(_ARGUMENTS, {"positions": "int32", "table": "float32"}, body)


ROTARY_TABLE = Family(
    rotary_table,
    _ARGUMENTS,
    writes="table",
    cost=lambda p: elementwise(2 * len(p["inv_freq"]), 60 * len(p["inv_freq"])),
    grid=lambda p: (per_row(over=TOKENS), fixed(1), ONE),
)
