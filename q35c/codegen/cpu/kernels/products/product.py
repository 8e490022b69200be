"""What every product with packed weights shares: its shape, where its rows are, what happens to its sums.

The sums of a few rows with one block of 32 output columns arrive in a small buffer f32 [rows, 32]; `finish` applies
the epilogue and stores them. How they come about is the business of float_tile.py (f32 and bf16 weights) and
integer_tile.py (integers).

These are plain functions that emit statements into the kernel under construction: call them as a
statement inside TVMScript. (T.inline macros would cost half a second of parsing for each linear.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.gelu import vgelu
from q35c.codegen.cpu.kernels.products.narrow_tile_avx2 import AHEAD_BYTES
from q35c.codegen.cpu.kernels.rows.round_bf16 import store_bf16
from q35c.codegen.cpu.kernels.vectors import STACK, Expr, fetch, ramp, splat, vsilu
from q35c.layouts.weights import BLOCK, LINE_WORDS, ceil_div

Vectors = Sequence[int]  # indices of vectors in a line of 32 outputs


@dataclass(frozen=True)
class Product:
    """Describe a product with packed weights: N output rows (before swiglu) of K inputs each.

    `epilogue` says what is stored: "none" the sums, "residual" sums plus the same element of R,
    "swiglu" silu(gate) * up of the two halves of each block, "bias" sums plus B[column], "gelu_tanh" and "gelu_erf" the GELU
    of those, "bias_residual" those plus the same element of R. With `is_rounded` Y is bf16, in halves of words.
    """

    N: int
    K: int
    dtype: str
    epilogue: str
    isa: Isa
    is_rounded: bool = False

    @property
    def blocks(self) -> int:
        """Number of 32-row blocks of weights."""
        return ceil_div(self.N, BLOCK)

    @property
    def block_elements(self) -> int:
        """Number of stored elements of a block."""
        raise NotImplementedError

    @property
    def element(self) -> str:
        """TIR type of a stored element of W."""
        raise NotImplementedError

    @property
    def x_element(self) -> str:
        """TIR type of an element of X."""
        raise NotImplementedError

    def sweep(self, operands: Operands, begin: Expr, end: Expr) -> None:
        """Emit the product of one block with the rows at positions begin..end, int64."""
        raise NotImplementedError

    @property
    def is_swiglu(self) -> bool:
        """Tell whether gate and up vectors pair into one output vector."""
        return self.epilogue == "swiglu"

    @property
    def outputs(self) -> int:
        """Number of columns of Y."""
        return self.N // 2 if self.is_swiglu else self.N

    @property
    def block_outputs(self) -> int:
        """Number of columns of Y that one full block makes."""
        return BLOCK // 2 if self.is_swiglu else BLOCK

    @property
    def vectors(self) -> Vectors:
        """Indices of the vectors of a line."""
        return tuple(range(BLOCK // self.isa.lanes))

    def weights(self, data: Expr, matrices: int = 1) -> Expr:
        """Declare the buffer [blocks, elements] of some matrices, one after another."""
        # int64: all experts of a layer together may pass 2^31 elements.
        shape = (T.int64(matrices * self.blocks), T.int64(self.block_elements))
        return T.decl_buffer(shape, self.element, data=data)


@dataclass(frozen=True)
class Operands:
    """Hold the buffers of one block's product, and where its rows are.

    w [blocks, elements]; x, y and r (the residual, or y) by row and column. `block` counts in w,
    `column_block` in the columns of y. `x_row(position)` and `y_row(position)` give rows.
    """

    w: Expr
    x: Expr
    y: Expr
    r: Expr
    block: Expr
    column_block: Expr
    x_row: Callable[[Expr], Expr]
    y_row: Callable[[Expr], Expr]
    bias: Expr = None  # f32 [N], of an epilogue that has one


def accumulators(product: Product, rows: int, vectors: Vectors, dtype: str = "float32") -> Expr:
    """Allocate one vector for each row and vector of a tile; LLVM keeps it in registers."""
    return T.alloc_buffer((rows, len(vectors), product.isa.lanes), dtype, annotations=STACK)


def sums_buffer(rows: int) -> Expr:
    """Allocate the sums of some rows with one block."""
    return T.alloc_buffer((rows, BLOCK), "float32", annotations=STACK)


def fetch_ahead(w: Expr, block: Expr, start: Expr, lines: int) -> None:
    """Emit prefetches into L1 of the lines of 32 words that lie AHEAD_BYTES behind some of a packed block.

    A tile of few rows alternates between waiting for memory and multiplying. Measured for integers: tiles of 4 to 8 rows 20 to 35 %
    faster with 4 bits and up to twice as fast with 5; a distance of 2 KiB or a prefetch into L2 gains less. One row becomes up
    to 3 times as fast without VNNI; with it, 1.5 times on one machine and 15 % slower on another. bf16: one row 1.4 times as
    fast, 4 rows 1.6 times.
    """
    for word in range(0, lines * BLOCK, LINE_WORDS):
        fetch(w[block, start + AHEAD_BYTES // 4 + word], 1)


def load_sums(product: Product, acc: Expr, sums: Expr, first: Expr, vectors: Vectors) -> None:
    """Emit acc = the sums of the tile whose first row is `first`."""
    lanes = product.isa.lanes
    for i in range(int(acc.shape[0])):
        for j, v in enumerate(vectors):
            value = sums[first + i, ramp(v * lanes, lanes)]
            T.buffer_store(acc, value, [i, j, ramp(0, lanes)])


def store_sums(product: Product, acc: Expr, sums: Expr, first: Expr, vectors: Vectors) -> None:
    """Emit sums of the tile whose first row is `first` = acc."""
    lanes = product.isa.lanes
    for i in range(int(acc.shape[0])):
        for j, v in enumerate(vectors):
            value = acc[i, j, ramp(0, lanes)]
            T.buffer_store(sums, value, [first + i, ramp(v * lanes, lanes)])


def clear(product: Product, acc: Expr) -> None:
    """Emit acc = 0."""
    lanes = product.isa.lanes
    for i in range(int(acc.shape[0])):
        for j in range(int(acc.shape[1])):
            T.buffer_store(acc, splat(0.0, lanes), [i, j, ramp(0, lanes)])


def finish(product: Product, operands: Operands, sums: Expr, first: Expr, rows: Expr) -> None:
    """Emit the epilogue of the rows at positions first.., and their stores."""
    lanes = product.isa.lanes
    outputs = product.block_outputs
    narrow = product.outputs % outputs  # columns of a last block that is not full
    with T.serial(rows) as i:
        row = T.Bind(operands.y_row(first + i))
        if product.is_swiglu:
            for v in range(0, outputs, lanes):
                gate, up = sums[i, ramp(v, lanes)], sums[i, ramp(v + outputs, lanes)]
                T.buffer_store(sums, vsilu(gate, lanes) * up, [i, ramp(v, lanes)])
        if not narrow:
            _store_row(product, operands, sums, i, row)
            return
        with T.If(operands.column_block < product.blocks - 1):
            with T.Then():
                _store_row(product, operands, sums, i, row)
            with T.Else(), T.serial(narrow) as column:
                _store_columns(product, operands, sums, i, row, column, 1)


def _store_row(product: Product, operands: Operands, sums: Expr, i: Expr, row: Expr) -> None:
    for column in range(0, product.block_outputs, product.isa.lanes):
        _store_columns(product, operands, sums, i, row, column, product.isa.lanes)


def _store_columns(
    product: Product, operands: Operands, sums: Expr, i: Expr, row: Expr, column: Expr, lanes: int
) -> None:
    value = sums[i, ramp(column, lanes)]
    columns = ramp(operands.column_block * product.block_outputs + column, lanes)
    if operands.bias is not None:
        value = value + operands.bias[columns]
    if product.epilogue.startswith("gelu"):
        value = vgelu(value, lanes, product.epilogue.removeprefix("gelu_"))
    if product.epilogue.endswith("residual"):
        value = value + operands.r[row, columns]
    if product.is_rounded:
        store_bf16(operands.y, value, row, columns, lanes)
    else:
        T.buffer_store(operands.y, value, [row, columns])
