"""Tiles of assembly give the bits of the statements they stand for, which serve AVX-512 without VNNI."""

from dataclasses import replace

import numpy as np
import pytest

from q35c.codegen.cpu.isa.x86 import V4
from q35c.codegen.cpu.kernels.linear.linear import linear
from q35c.codegen.cpu.kernels.products.narrow_tile_avx2 import Tile
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows, row_layout
from q35c.codegen.pack import PackedWeight
from q35c.formats.registry import integer_format
from tests.kernels.harness import ISA, build_kernels, guard

# As if AVX2 had registers for them.
STATEMENTS = replace(ISA, tuning=V4.tuning)
SHAPES = ((40, 200, "i4g64"), (33, 96, "i5g32"), (64, 640, "i4g128"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_give_the_same_bits(shape):
    outputs, width, dtype = shape
    group = integer_format(dtype).group
    rng = np.random.default_rng(outputs)
    weight = rng.normal(size=(outputs, width)).astype(np.float32)
    packed = PackedWeight("w", "linear", dtype, ("w",), (weight.shape,))
    blocks = packed.chunks(lambda name, start, stop: weight[start:stop])
    w = guard(np.concatenate([block.reshape(-1) for block in blocks]))
    functions = [
        {"linear": linear(outputs, width, dtype, "none", isa)} for isa in (ISA, STATEMENTS)
    ]
    functions[0]["round"] = quantize_rows(width, group, ISA)
    forms = [build_kernels(functions[i], isa) for i, isa in enumerate((ISA, STATEMENTS))]
    # Every height alone, tall ones in pairs, with panels that are not full, and with more tiles than share one.
    for tokens in (1, 2, 3, 4, 5, 6, 11, 12, 71, 270):
        x = guard(rng.normal(size=(tokens, width)).astype(np.float32))
        q = guard(np.zeros((tokens, row_layout(width, group, ISA).words), np.int32))
        forms[0].call("round", x, q, tokens, width, q.shape[1])
        results = []
        for kernels in forms:
            y = guard(np.zeros((tokens, outputs), np.float32), poison=True)
            kernels.call("linear", w, q, y, tokens, q.shape[1], outputs, threads=2)
            results.append(y.tobytes())
        assert results[0] == results[1], tokens


@pytest.mark.parametrize(("rows", "bits"), [(6, 0), *((r, b) for b in (4, 5) for r in range(1, 7))])
def test_a_tile_fits_the_registers(rows, bits):
    """Sums, levels, a word of a row and a product; constants where there is room."""
    tile = Tile(rows, 64, bits)
    taken = [*range(tile.product + 1), *tile.resident.values()]
    assert max(taken) <= 15 and len(set(taken)) == len(taken)
