"""One token of the gated delta rule for each row of a batch, against float64: 60 shapes, any slots.

`test_gated_delta.py` covers runs of tokens; here every row is another sequence, with its own state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from q35c.codegen.kernels.gated_delta import gated_delta
from q35c.ir import reference
from tests.kernels.harness import EACH_ISA, Kernels, assert_close, build_kernels, guard

Shape = tuple[int, int, int, int]  # key heads, value heads, key dim, value dim
SHAPES: tuple[Shape, ...] = (
    (1, 1, 32, 32),
    (1, 2, 32, 48),
    (2, 2, 48, 32),
    (1, 3, 64, 80),
    (3, 3, 80, 64),
    (1, 4, 112, 32),
    (2, 6, 32, 144),
    (5, 5, 48, 48),
    (2, 4, 128, 128),
    (1, 1, 256, 256),
)
SEQUENCES = (1, 2, 3, 4, 5, 8)
EPS, OFFSET = 1e-6, 128  # the offset is in bytes
SLOTS = np.array([5, 0, 3, 1, 4, 2, 7, 6])


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request: Any) -> Kernels:
    functions = {
        str(index): gated_delta(*shape, EPS, OFFSET, "batch", request.param)
        for index, shape in enumerate(SHAPES)
    }
    return build_kernels(functions, request.param)


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
        self.state_words = value_heads * key_dim * value_dim
        self.units = (4 * self.state_words + OFFSET) // 64 + 1  # slots count 64 bytes
        self.memory = np.full((len(SLOTS), 16 * self.units), np.nan, np.float32)
        for sequence in range(len(SLOTS)):
            state = self.of(self.memory, sequence)
            state[...] = rng.normal(size=state.shape)

    def of(self, memory: np.ndarray, sequence: int) -> np.ndarray:
        """Return one sequence's state [Hv, Dk, Dv]."""
        _, value_heads, key_dim, value_dim = self.shape
        part = memory[sequence, OFFSET // 4 :][: self.state_words]
        return part.reshape(value_heads, key_dim, value_dim)

    def run(self, kernels: Kernels, count: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Return output and all memory after one step of the first `count` slots."""
        width = self.shape[1] * self.shape[3]
        y = guard(np.zeros((count, width + 1), np.float32), poison=True)
        memory = guard(self.memory)
        scratch = guard(np.zeros(16, np.float32), poison=True)
        kernels.call(
            str(SHAPES.index(self.shape)), *self.rows.values(), *self.weights.values(), memory,
            guard(SLOTS[:count].astype(np.int64) * self.units), y, scratch, count,
            *(rows.shape[1] for rows in self.rows.values()), width + 1, threads=threads,
        )  # fmt: skip
        return y, memory

    def expected(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return output and new state in float64 of one row."""
        key_heads, value_heads, key_dim, value_dim = self.shape
        qkv, z, b, a = (self.exact[name][row : row + 1] for name in ("qkv", "z", "b", "a"))
        a_log, dt_bias, norm_w = (weight.astype(np.float64) for weight in self.weights.values())
        q, k, v = np.split(qkv, [key_heads * key_dim, 2 * key_heads * key_dim], -1)
        q, k = (part.reshape(1, key_heads, key_dim) for part in (q, k))
        decay = -np.exp(a_log) * reference.softplus(a + dt_bias)
        state = self.of(self.memory, SLOTS[row]).astype(np.float64)
        v = v.reshape(1, value_heads, value_dim)
        out, state = reference.delta_rule(q, k, v, decay, reference.sigmoid(b), state)
        gate = z.reshape(1, value_heads, value_dim)
        return reference.gated_rms_norm(out, norm_w, gate, EPS).ravel(), state


@pytest.mark.parametrize("count", SEQUENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_sequences(kernels: Kernels, shape: Shape, count: int) -> None:
    problem = Problem(shape, count)
    outputs = []
    for threads in (1, 2, 3):
        y, memory = problem.run(kernels, count, threads)
        outputs.append(y.tobytes() + memory.tobytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert np.isnan(y[:, -1]).all(), "columns past the row changed"
    left = np.array(memory)
    for row, sequence in enumerate(SLOTS[:count]):
        out, state = problem.expected(row)
        assert_close(y[row, :-1], out, note=row)
        assert_close(problem.of(left, sequence), state, note=row)
        problem.of(left, sequence)[...] = problem.of(problem.memory, sequence)
    np.testing.assert_array_equal(left, problem.memory)
