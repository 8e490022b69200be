"""The harness of the kernel tests sees what it is there to see: stray writes and reads, NaN, small errors."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tests.kernels.harness import assert_close, build_kernels, guard, nmse

COUNT = 8


def copy_at(first_read: int, first_write: int) -> PrimFunc:
    """y[i + first_write] = x[i + first_read] for COUNT values: right only where both are 0."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        X: T.handle("float32"), Y: T.handle("float32"), tid: T.int32, nt: T.int32
    ) -> T.int32:
        x = T.decl_buffer((COUNT + 2,), "float32", data=X, elem_offset=first_read)
        y = T.decl_buffer((COUNT + 2,), "float32", data=Y, elem_offset=first_write)
        for i in T.serial(COUNT):
            y[i] = x[i]
        return T.int32(0)

    return kernel


@pytest.mark.parametrize(
    ("read", "write", "seen"),
    [
        (0, 1, "4 bytes written after"),
        (0, -1, "4 bytes written before"),
        (1, 0, "NMSE inf"),  # a guard is read, and it is NaN
        (-1, 0, "NMSE inf"),
    ],
)
def test_an_index_that_is_off_by_one_is_seen(read: int, write: int, seen: str) -> None:
    kernels = build_kernels({"good": copy_at(0, 0), "bad": copy_at(read, write)})
    x = guard(np.arange(COUNT, dtype=np.float32))

    def run(name: str) -> None:
        y = guard(np.zeros(COUNT, np.float32), poison=True)
        kernels.call(name, x, y)
        assert_close(y, np.arange(COUNT))

    run("good")
    with pytest.raises(AssertionError, match=seen):
        run("bad")


def test_one_small_error_and_one_nan_are_seen() -> None:
    right = np.ones(1000)
    wrong = right.copy()
    wrong[17] += 0.02
    assert nmse(right, right) == 0.0
    with pytest.raises(AssertionError, match="NMSE 4"):
        assert_close(wrong, right)
    wrong[17] = np.nan
    assert nmse(wrong, right) == float("inf")
