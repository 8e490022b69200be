"""One token of the gated delta net for each row of a batch, against float64: 8 shapes, any slots.

`test_gated_delta.py` covers runs of tokens; here every row is another sequence, with its own state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from q35c.codegen.cpu.kernels.delta.tasks import gated_delta_decode
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows
from q35c.ir import reference
from tests.kernels.harness import (
    EACH_ISA,
    Kernels,
    RoundedRows,
    assert_close,
    build_kernels,
    guard,
)

Shape = tuple[int, int, int, int]  # key heads, value heads, key dim, value dim
SHAPES: tuple[Shape, ...] = (
    (1, 1, 32, 32),
    (1, 2, 32, 48),
    (1, 3, 64, 80),
    (3, 3, 80, 64),
    (1, 4, 112, 32),
    (2, 6, 32, 144),
    (2, 4, 128, 128),
    (1, 1, 256, 256),
)
SEQUENCES = (1, 2, 3, 4, 5, 8)
EPS, OFFSET = 1e-6, 128  # the offset is in bytes
SLOTS = np.array([5, 0, 3, 1, 4, 2, 7, 6])


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request: Any) -> Kernels:
    widths = {shape[1] * shape[3] for shape in SHAPES}
    return build_kernels(
        {
            str(index): gated_delta_decode(
                *shape, taps_of(shape), EPS, OFFSET, request.param, group_of(shape)
            )
            for index, shape in enumerate(SHAPES)
        }
        | {f"round {width}": quantize_rows(width, 32, request.param) for width in widths},
        request.param,
    )


def taps_of(shape: Shape) -> int:
    return 2 + sum(shape) // 16 % 3


def group_of(shape: Shape) -> int:
    """Return the group in which outputs are rounded: only whole ones of a head are."""
    return 0 if shape[3] % 32 else 32


class Problem:
    """Random rows, weights and the states of eight sequences, NaN where nothing belongs."""

    def __init__(self, shape: Shape, count: int) -> None:
        self.shape = key_heads, value_heads, key_dim, value_dim = shape
        rng = np.random.default_rng(sum(shape) * 100 + count)
        channels, width = 2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim
        widths = {"qkv": channels, "z": width, "b": value_heads, "a": value_heads}
        self.rows = {
            name: guard(rng.normal(size=(count, size + count % 3)).astype(np.float32))
            for name, size in widths.items()
        }
        self.exact = {
            name: self.rows[name][:, :size].astype(np.float64) for name, size in widths.items()
        }
        weights = {
            "a_log": np.log(rng.uniform(0.05, 8, value_heads)),
            "dt_bias": rng.normal(size=value_heads),
            "norm_w": 1 + 0.2 * rng.normal(size=value_dim),
        }
        self.weights = {name: guard(array.astype(np.float32)) for name, array in weights.items()}
        taps = taps_of(shape)
        self.conv_w = rng.normal(size=(channels, 1, taps)).astype(np.float32)
        # A sequence's slot holds either state at the same offset: here of two memories.
        self.states = ((value_heads, key_dim, value_dim), (taps - 1, channels))
        most = max(math.prod(state) for state in self.states)
        self.units = (4 * most + OFFSET) // 64 + 1  # slots count 64 bytes
        empty = np.full((len(self.states), len(SLOTS), 16 * self.units), np.nan, np.float32)
        self.memories = list(empty)
        for sequence in range(len(SLOTS)):
            for state in self.of(self.memories, sequence):
                state[...] = rng.normal(size=state.shape)

    def of(self, memories: Sequence[np.ndarray], sequence: int) -> list[np.ndarray]:
        """Return one sequence's states [Hv, Dk, Dv] and [K - 1, C]."""
        return [
            memory[sequence, OFFSET // 4 :][: math.prod(state)].reshape(state)
            for memory, state in zip(memories, self.states, strict=True)
        ]

    def run(self, kernels: Kernels, count: int, threads: int) -> tuple[np.ndarray, Any]:
        """Return output and both memories after one step of the first `count` slots."""
        width = self.shape[1] * self.shape[3]
        qkv, *others = self.rows.values()
        y = guard(np.zeros((count, width + 1), np.float32), poison=True)
        rounded = RoundedRows(count, width, group_of(self.shape), kernels.isa)
        delta, conv = (guard(memory) for memory in self.memories)
        conv_w = guard(np.ascontiguousarray(self.conv_w[:, 0].T))
        arrays = [conv_w, conv, guard(qkv), *others, *self.weights.values(), delta]
        arrays += [guard(SLOTS[:count].astype(np.int64) * self.units), y, rounded.words]
        strides = [rows.shape[1] for rows in (qkv, *others, y, rounded.words)]
        kernels.call(str(SHAPES.index(self.shape)), *arrays, count, *strides, threads=threads)
        rounded.check(kernels, y, f"round {width}")
        return y, (delta, conv)

    def expected(self, row: int) -> tuple[np.ndarray, ...]:
        """Return output and new states in float64 of one row."""
        exact = [self.exact[name][row : row + 1] for name in ("qkv", "z", "b", "a")]
        weights = [weight.astype(np.float64) for weight in (self.conv_w, *self.weights.values())]
        delta, conv = (state.astype(np.float64) for state in self.of(self.memories, SLOTS[row]))
        out, conv, delta = reference.gated_delta_net(
            *exact, *weights, key_heads=self.shape[0], value_heads=self.shape[1], eps=EPS, conv=conv, delta=delta
        )  # fmt: skip
        return out.ravel(), delta, conv


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_sequences(kernels: Kernels, shape: Shape) -> None:
    for count in SEQUENCES:
        check_rows(kernels, shape, count)


def check_rows(kernels: Kernels, shape: Shape, count: int) -> None:
    problem = Problem(shape, count)
    outputs = []
    for threads in (1, 2, 3):
        y, memories = problem.run(kernels, count, threads)
        outputs.append(y.tobytes() + b"".join(memory.tobytes() for memory in memories))
    assert outputs[0] == outputs[1] == outputs[2]
    assert np.isnan(y[:, -1]).all(), "columns past the row changed"
    left = [np.array(memory) for memory in memories]
    for row, sequence in enumerate(SLOTS[:count]):
        out, *states = problem.expected(row)
        assert_close(y[row, :-1], out, note=row)
        before = problem.of(problem.memories, sequence)
        for got, want, old in zip(problem.of(left, sequence), states, before, strict=True):
            assert_close(got, want, note=row)
            got[...] = old
    np.testing.assert_array_equal(left, problem.memories)  # nothing else was touched
