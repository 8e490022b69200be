"""The rotary table against float64: 60 shapes, three position axes, positions up to a million."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from q35c.codegen.cpu.kernels.rows.rotary import rotary_table
from tests.kernels.harness import Kernels, assert_close, build_kernels, guard

# Angles with the sections (time, height, width) that own them; odd ones take the scalar path.
SHAPES: dict[int, tuple[int, int, int]] = {
    1: (1, 0, 0),
    3: (1, 1, 1),
    4: (2, 1, 1),
    7: (3, 2, 2),
    8: (8, 0, 0),
    11: (5, 3, 3),
    16: (6, 5, 5),
    32: (11, 11, 10),
    33: (13, 10, 10),
    64: (24, 20, 20),
}
TOKENS = (1, 2, 3, 5, 17, 70)
FIRST = (0, 31, 4000, 65_535, 262_000, 1_009_000)  # positions begin there, one for each count
SCALING = 1.25


def frequencies(angles: int) -> np.ndarray:
    return (1e4 ** -(np.arange(angles) / angles)).astype(np.float32)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    functions: dict[str, Any] = {
        f"table_{angles}": rotary_table([float(f) for f in frequencies(angles)], sections, SCALING)
        for angles, sections in SHAPES.items()
    }
    return build_kernels(functions)


def expected(positions: np.ndarray, angles: int) -> np.ndarray:
    """Return the table in float64; only the angle itself is rounded to f32, as in the model."""
    axis = np.zeros(angles, np.int64)
    for which in (1, 2):
        axis[which : SHAPES[angles][which] * 3 : 3] = which
    chosen = positions[axis].T.astype(np.float32)  # [T, angles]
    exact = (chosen * frequencies(angles)).astype(np.float64)
    return np.concatenate([np.cos(exact), np.sin(exact)], axis=1) * SCALING


@pytest.mark.parametrize("angles", SHAPES)
def test_table(kernels: Kernels, angles: int) -> None:
    for tokens in TOKENS:
        check_table(kernels, angles, tokens)


def check_table(kernels: Kernels, angles: int, tokens: int) -> None:
    rng = np.random.default_rng(angles * 100 + tokens)
    first, stride = FIRST[TOKENS.index(tokens)], tokens + angles % 3
    positions = guard((first + rng.integers(0, 1000, (3, stride))).astype(np.int32))
    want = expected(positions[:, :tokens], angles)
    tables = []
    for threads in (1, 2, 3):
        table = guard(np.zeros((tokens, 2 * angles), np.float32), poison=True)
        kernels.call(f"table_{angles}", positions, table, tokens, stride, threads=threads)
        tables.append(table.tobytes())
    assert_close(table, want)
    assert np.abs(table - want).max() <= 2e-7
    assert tables[0] == tables[1] == tables[2]
