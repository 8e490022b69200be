"""Embedding lookup: exact values of the packed table."""

import numpy as np
import pytest

from q35c.codegen.cpu.kernels.linear.embedding import embedding
from tests.kernels.harness import (
    EACH_ISA,
    ISA,
    build_kernels,
    guard,
    pack_formatted,
    pack_rows,
    stored,
)

SHAPES = ((1, 1), (5, 2), (31, 64), (32, 63), (33, 65), (100, 128), (997, 257), (64, 1024))
TOKENS = (1, 2, 3, 7, 40)
# Formats, and tables of them: less than a group, whole ones, and some with a rest.
INTEGERS = {
    "i4g32": ((1, 1), (33, 65), (100, 128)),
    "i4g128": ((97, 257), (64, 1024)),
    "i5g32": ((33, 65), (100, 128)),
    "i5g64": ((1, 1), (97, 257), (64, 1024)),
    "i8g64": ((33, 65), (100, 128)),
}


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request):
    isa = request.param
    names = [(v, h, d) for v, h in SHAPES for d in ("f32", "bf16")]
    return build_kernels({f"{d}_{v}_{h}": embedding(v, h, d, isa) for v, h, d in names}, isa)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding(kernels, shape, dtype):
    for tokens in TOKENS:
        check_embedding(kernels, shape, dtype, tokens)


def check_embedding(kernels, shape, dtype, tokens):
    rows, width = shape
    rng = np.random.default_rng(rows + width + tokens)
    table = rng.normal(size=shape).astype(np.float32)
    packed, ids = guard(pack_rows(table, dtype)), guard(rng.integers(0, rows, tokens, np.int32))
    ids[0] = rows - 1
    ld_y = width + tokens % 3
    for threads in (1, 2, 3):
        y = guard(np.zeros((tokens, ld_y), np.float32), poison=True)
        before = y.copy()
        kernels.call(f"{dtype}_{rows}_{width}", packed, ids, y, tokens, ld_y, threads=threads)
        np.testing.assert_array_equal(y[:, :width], stored(table, dtype)[ids])
        assert y[:, width:].tobytes() == before[:, width:].tobytes(), "columns past the row changed"


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i4g32"])
def test_rows_stand_in_place_of_negative_ids(dtype: str) -> None:
    """Whole rows, of several chunks and an odd number of columns; where ids are none, they are not read."""
    vocabulary, width, tokens = 97, 257, 9
    kernels = build_kernels({"embedding": embedding(vocabulary, width, dtype, ISA, is_mixed=True)})
    rng = np.random.default_rng(width)
    table = rng.normal(size=(vocabulary, width)).astype(np.float32)
    ids = guard(rng.integers(0, vocabulary + 9, tokens, np.int32))
    rows = guard(np.full((tokens, width), np.nan, np.float32))
    want = stored(table, dtype)[np.minimum(ids, vocabulary - 1)]
    for row, token in ((0, -1), (3, -(2**31)), (4, -7), (8, -1)):
        ids[row] = token
        rows[row] = rng.normal(size=width)
        want[row] = rows[row]
    for threads in (1, 2, 3):
        y = guard(np.zeros((tokens, width + 1), np.float32), poison=True)
        packed = guard(pack_formatted(table, dtype))
        kernels.call("embedding", packed, ids, rows, y, tokens, width + 1, threads=threads)
        np.testing.assert_array_equal(y[:, :width], want)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_ids_outside_the_table_stay_inside_memory(kernels, dtype):
    table = np.arange(997 * 257, dtype=np.float32).reshape(997, 257) % 128
    ids = guard(np.array([-1, 997, 2**31 - 1, -(2**31)], np.int32))
    y = guard(np.zeros((4, 257), np.float32))
    kernels.call(f"{dtype}_997_257", guard(pack_rows(table, dtype)), ids, y, 4, 257)
    np.testing.assert_array_equal(y, table[[0, 996, 996, 0]])


@pytest.fixture(scope="module")
def integer_kernels():
    tables = [(shape, dtype) for dtype, shapes in INTEGERS.items() for shape in shapes]
    return build_kernels({f"{s}{d}": embedding(*s, d, ISA) for s, d in tables})


@pytest.mark.parametrize(("dtype", "shape"), [(d, s) for d, of in INTEGERS.items() for s in of])
def test_integer_tables(integer_kernels, dtype, shape):
    rows, width = shape
    table = np.random.default_rng(rows).normal(size=shape).astype(np.float32)
    ids = guard(np.array([rows - 1, 0, rows // 2], np.int32))
    for threads in (1, 2):
        y = guard(np.zeros((3, width), np.float32), poison=True)
        packed = pack_formatted(table, dtype)
        integer_kernels.call(f"{shape}{dtype}", packed, ids, y, 3, width, threads=threads)
        np.testing.assert_array_equal(y, stored(table, dtype)[ids])
