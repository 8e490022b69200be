"""The matrix tile of bf16 weights and bf16 rows, for instruction sets that multiply bf16 pairs.

    acc[i, j] += X[row i, 2p] * W[j, 2p] + X[row i, 2p + 1] * W[j, 2p + 1]     for each pair p in order

An int32 word is a pair. The instruction adds the two exact products to an f32 sum one after the other; every output
has one accumulator whatever the tile's height, so a row's result depends neither on how many rows are computed with
it nor on the number of threads.

A block of 32 output columns is one stream of 128-byte lines, one for each pair. One row: the limit is memory
bandwidth. Many rows: the limit is one pair product a cycle. The tall tile, 8 rows x 2 vectors, needs a load for
each product and one for each line, all from a block that stays in L2 and rows that lie an odd number of cache lines
apart (rows/round_bf16.py): at a power of two they would fight for one set of L1.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.kernels.products.product import (
    Operands,
    Product,
    accumulators,
    clear,
    finish,
    store_sums,
    sums_buffer,
)
from q35c.codegen.cpu.kernels.vectors import Expr, ramp, splat_int
from q35c.layouts.weights import BLOCK, ceil_div


@dataclass(frozen=True)
class PairProduct(Product):
    """A product of bf16 rows with bf16 weights; W and X count in pairs."""

    @property
    def element(self) -> str:
        return "int32"

    @property
    def x_element(self) -> str:
        return "int32"

    @property
    def pairs(self) -> int:
        """Number of pairs of inputs; an odd K has a zero behind it."""
        return ceil_div(self.K, 2)

    @property
    def block_elements(self) -> int:
        return self.pairs * BLOCK

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of a tile: each height takes what the taller ones leave."""
        return (8, 4, 2, 1)

    def sweep(self, operands: Operands, begin: Expr, end: Expr) -> None:
        position = begin
        for rows in self.heights:
            count = T.Bind(T.truncdiv(end - position, rows))
            _tiles(self, operands, position, count, rows)
            position = T.Bind(position + count * rows)


def _tiles(product: PairProduct, operands: Operands, begin: Expr, count: Expr, rows: int) -> None:
    size, vectors = product.isa.lanes, product.vectors
    with T.serial(count) as tile:
        first = T.Bind(begin + tile * rows)
        x_rows = [T.Bind(operands.x_row(first + i)) for i in range(rows)]
        acc = accumulators(product, rows, vectors)
        clear(product, acc)
        with T.serial(product.pairs) as pair:
            weights = [
                T.Bind(operands.w[operands.block, ramp(pair * BLOCK + v * size, size)])
                for v in vectors
            ]
            for i, row in enumerate(x_rows):
                x = T.Bind(splat_int(operands.x[row, pair], size))
                for j, weight in enumerate(weights):
                    at = [i, j, ramp(0, size)]
                    value = apply(product.isa, "dot2_bf16", acc[*at], weight, x)
                    T.buffer_store(acc, value, at)
        sums = sums_buffer(rows)
        store_sums(product, acc, sums, T.int64(0), vectors)
        finish(product, operands, sums, first, T.int64(rows))
