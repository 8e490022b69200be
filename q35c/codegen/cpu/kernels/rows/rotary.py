"""The rotary table: cosines and sines of every token's angles, shared by all layers.

    angle[t, i] = float32(position[axis_i, t]) * inv_freq[i]     table[t] = scaling * [cos(angle), sin(angle)]

Axis 1 (height) and 2 (width) own every third angle of their section, axis 0 (time) the rest. The product is rounded to
f32 as in the reference, then cos and sin are exact to f32: reduced by multiples of pi/2 and summed in f64, because
positions reach hundreds of thousands. Cost: about 60 f64 operations per angle, once per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.calls import Cost
from q35c.codegen.cpu.kernels.family import Family, Parameters, elementwise
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, let, ramp, share, vector, vector_type

_ROUND = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
_HALF_PI_HIGH = 1.5707963267341256  # 33 bits of pi/2: n * it is exact for |n| < 2^20
_HALF_PI_LOW = math.pi / 2 - _HALF_PI_HIGH + 6.123233995736766e-17
_SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7, -1, -1))  # in r^2, times r
_COS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(8, -1, -1))  # in r^2


def axis_of_angles(angles: int, sections: Sequence[int]) -> list[int]:
    """Return which of the position axes (time, height, width) each angle belongs to."""
    axes = [0] * angles
    for axis in (1, 2):
        for i in range(axis, min(sections[axis] * 3, angles), 3):
            axes[i] = axis
    return axes


def _splat(value: float, lanes: int) -> Expr:
    return T.float64(value) if lanes == 1 else T.broadcast(T.float64(value), lanes)


def _splat_int(value: int, lanes: int) -> Expr:
    return T.int64(value) if lanes == 1 else T.broadcast(T.int64(value), lanes)


def _series(z: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    result = _splat(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        result = result * z + _splat(coefficient, lanes)
    return result


def _turn(angle: Expr, quarter: int, lanes: int) -> Expr:
    """Return sin(angle + quarter * pi/2) of f64 lanes: 0 gives the sine, 1 the cosine."""

    def pick(rounded: Expr) -> Expr:
        n = rounded - _splat(_ROUND, lanes)
        bits = T.reinterpret(rounded, dtype=vector("int64", lanes)) + _splat_int(quarter, lanes)

        def reduced(r: Expr) -> Expr:
            even = (bits & _splat_int(1, lanes)) == _splat_int(0, lanes)
            plus = (bits & _splat_int(2, lanes)) == _splat_int(0, lanes)
            value = let(
                r * r,
                lambda z: T.Select(even, r * _series(z, _SIN, lanes), _series(z, _COS, lanes)),
            )
            return let(value, lambda v: T.Select(plus, v, _splat(0.0, lanes) - v))

        remainder = let(
            n,
            lambda n: (angle - n * _splat(_HALF_PI_HIGH, lanes)) - n * _splat(_HALF_PI_LOW, lanes),
        )
        return let(remainder, reduced)

    return let(angle * _splat(2 / math.pi, lanes) + _splat(_ROUND, lanes), pick)


def _fill(buffer: Expr, values: Sequence[Expr]) -> None:
    """Store constants one by one."""
    for i, value in enumerate(values):
        T.buffer_store(buffer, value, [i])


def rotary_table(
    inv_freq: Sequence[float], sections: Sequence[int], scaling: float
) -> tirx.PrimFunc:
    """Build the table kernel for R = 2 * len(inv_freq).

    Params: POSITIONS i32[3, T] (time, height, width), TABLE f32[T, R] dense, T, ld_positions, tid, nt.
    """
    angles = len(inv_freq)
    lanes = 4 if angles % 4 == 0 else 1
    wide = vector("float64", lanes)
    single = vector("float32", lanes)
    frequencies = [T.float32(f) for f in inv_freq]
    axes = [T.int32(axis) for axis in axis_of_angles(angles, sections)]

    @T.prim_func(private=True, s_tir=True)
    def rotary_table_kernel(
        POSITIONS: T.handle("int32"),
        TABLE: T.handle("float32"),
        tokens: T.int64,
        ld_positions: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        positions = T.decl_buffer((3, ld_positions), "int32", data=POSITIONS)
        table = T.decl_buffer((tokens, 2 * angles), "float32", data=TABLE)
        frequency = T.alloc_buffer((angles,), "float32", annotations=STACK)
        axis = T.alloc_buffer((angles,), "int32", annotations=STACK)
        place = T.alloc_buffer((angles,), "float32", annotations=STACK)
        _fill(frequency, frequencies)
        _fill(axis, axes)
        low: T.let[T.int64] = share(tokens, tid, nt)
        for item in T.serial(share(tokens, tid + 1, nt) - low):
            for i in T.serial(angles):
                place[i] = T.cast(positions[axis[i], low + item], "float32") * frequency[i]
            for v in T.serial(angles // lanes):
                angle: T.let[vector_type("float64", lanes)] = T.cast(
                    place[ramp(v * lanes, lanes)], wide
                )
                table[low + item, ramp(v * lanes, lanes)] = T.cast(
                    _turn(angle, 1, lanes) * _splat(scaling, lanes), single
                )
                table[low + item, ramp(angles + v * lanes, lanes)] = T.cast(
                    _turn(angle, 0, lanes) * _splat(scaling, lanes), single
                )
        return T.int32(0)

    return rotary_table_kernel


def axial_rotary_table(inv_freq: Sequence[float]) -> tirx.PrimFunc:
    """Build the table kernel of a picture for R = 4 * len(inv_freq): the angles of the row, then those of the column.

    Params: PLACES i32[T, 2] (row, column), TABLE f32[T, R], both dense, T, tid, nt.
    """
    angles = 2 * len(inv_freq)
    lanes = 4 if angles % 4 == 0 else 1
    wide, single = vector("float64", lanes), vector("float32", lanes)
    frequencies = [T.float32(f) for f in inv_freq]

    @T.prim_func(private=True, s_tir=True)
    def axial_rotary_table_kernel(
        PLACES: T.handle("int32"),
        TABLE: T.handle("float32"),
        tokens: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        places = T.decl_buffer((tokens, 2), "int32", data=PLACES)
        table = T.decl_buffer((tokens, 2 * angles), "float32", data=TABLE)
        frequency = T.alloc_buffer((angles // 2,), "float32", annotations=STACK)
        place = T.alloc_buffer((angles,), "float32", annotations=STACK)
        _fill(frequency, frequencies)
        low: T.let[T.int64] = share(tokens, tid, nt)
        for item in T.serial(share(tokens, tid + 1, nt) - low):
            row: T.let[T.int64] = low + item
            for axis, i in T.grid(2, angles // 2):
                place[axis * (angles // 2) + i] = (
                    T.cast(places[row, axis], "float32") * frequency[i]
                )
            for v in T.serial(angles // lanes):
                angle: T.let[vector_type("float64", lanes)] = T.cast(
                    place[ramp(v * lanes, lanes)], wide
                )
                table[row, ramp(v * lanes, lanes)] = T.cast(_turn(angle, 1, lanes), single)
                table[row, ramp(angles + v * lanes, lanes)] = T.cast(_turn(angle, 0, lanes), single)
        return T.int32(0)

    return axial_rotary_table_kernel


_ANGLE_OPERATIONS = 120  # of a cosine and a sine; in f64 each counts double


def _cost(p: Parameters) -> Cost:
    angles = len(p["inv_freq"])
    return elementwise(2 * angles, _ANGLE_OPERATIONS * angles)


ROTARY_TABLE = Family(
    rotary_table,
    "positions table tokens ld_positions",
    writes="table",
    cost=_cost,
    takes_isa=False,
)
AXIAL_ROTARY_TABLE = Family(
    axial_rotary_table,
    "places table tokens",
    writes="table",
    cost=lambda p: elementwise(4 * len(p["inv_freq"]), 2 * _ANGLE_OPERATIONS * len(p["inv_freq"])),
    takes_isa=False,
)
