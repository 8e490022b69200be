"""What the attention kernels share: shapes, the cache in its layout (layouts/cache.py), where a sequence's cells lie."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.vectors import Expr, ramp, widen
from q35c.layouts.blobs import SLOT_BYTES
from q35c.layouts.cache import CELLS, SCALE_ROWS, cache_layout, value_width
from q35c.layouts.weights import ceil_div

# Cells of one step of the online softmax; steps begin at cell 0, whatever a call's first token.
STEP = 2 * CELLS
FEWEST_QUERY_ROWS = 64  # of a prefill task, on any target
LOWEST = -1e30  # below any score; a real -inf would make NaN of inf - inf


@dataclass(frozen=True)
class Cache:
    """Describe the key/value cache of one layer in a sequence's region."""

    Hkv: int
    D: int
    dtype: str
    context: int
    k_offset_bytes: int
    v_offset_bytes: int

    @property
    def element(self) -> str:
        return "float32" if self.dtype == "f32" else "uint16"

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "f32" else 2

    def base(self, slot: Expr) -> Expr:
        """Return the first element of a sequence's region."""
        return slot * (SLOT_BYTES // self.element_bytes)

    @property
    def block_elements(self) -> int:
        """Elements of a block of 32 keys, or of 32 values."""
        return self.D * CELLS

    def key(self, base: Expr, head: Expr, block: Expr) -> Expr:
        """Return the first element of a block of 32 keys: [D, 32]."""
        first = self.k_offset_bytes // self.element_bytes
        return base + first + (head * (self.context // CELLS) + block) * self.block_elements

    def value(self, base: Expr, head: Expr, cell: Expr) -> Expr:
        """Return the first element of a value: [D]."""
        first = self.v_offset_bytes // self.element_bytes
        return base + first + (head * self.context + cell) * self.D

    def load(self, state: Expr, at: Expr, lanes: int) -> Expr:
        """Load a vector of the cache as f32."""
        vector = state[ramp(at, lanes)]
        return vector if self.dtype == "f32" else widen(vector, lanes)


@dataclass(frozen=True)
class PairedCache(Cache):
    """Describe a cache of bf16 pairs; elements are int32 words of two."""

    @property
    def element(self) -> str:
        return "int32"

    @property
    def element_bytes(self) -> int:
        return 4

    @property
    def block_elements(self) -> int:
        return self.D * CELLS // 2

    def value(self, base: Expr, head: Expr, cell: Expr) -> Expr:
        """Return the first element of the block of 32 values that this cell is in."""
        block = T.shift_right(cell, T.int64(CELLS.bit_length() - 1))
        first = self.v_offset_bytes // self.element_bytes
        return base + first + (head * (self.context // CELLS) + block) * self.block_elements


@dataclass(frozen=True)
class ByteCache(PairedCache):
    """Describe a cache of int8 pairs with the scales of its cells; elements are bytes."""

    @property
    def element(self) -> str:
        return "int8"

    @property
    def element_bytes(self) -> int:
        return 1

    @property
    def block_elements(self) -> int:
        return (self.D + SCALE_ROWS) * CELLS


def cell_scale(D: int, lane: Expr) -> Expr:
    """Return where a cell's f32 scale lies in a block of int8 keys or values."""
    return D * CELLS + 4 * lane


def is_paired(kv_dtype: str, isa: Isa) -> bool:
    """Tell whether a cache of this type is stored in pairs, and so read by pairs.py."""
    return cache_layout(kv_dtype, isa.offers("dot2_bf16")) != "cells32"


def make_cache(
    Hkv: int, D: int, kv_dtype: str, context: int, k_offset_bytes: int, v_offset_bytes: int, isa: Isa
) -> Cache:  # fmt: skip
    """Return the cache in the layout of this type and instruction set."""
    layout = PairedCache if is_paired(kv_dtype, isa) else Cache
    layout = ByteCache if kv_dtype == "int8" else layout
    return layout(Hkv, D, kv_dtype, context, k_offset_bytes, v_offset_bytes)


@dataclass(frozen=True)
class AttentionShape:
    """Describe one attention kernel. A task computes `query_tokens` tokens of one key head's group.

    A token sees the cells up to its own, or all of them where attention is not causal.
    """

    Hq: int
    cache: Cache
    query_tokens: int
    splits: int
    isa: Isa
    is_causal: bool = True

    @property
    def Hkv(self) -> int:
        return self.cache.Hkv

    @property
    def D(self) -> int:
        return self.cache.D

    @property
    def lanes(self) -> int:
        return self.isa.lanes

    @property
    def is_paired(self) -> bool:
        return isinstance(self.cache, PairedCache)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.Hq // self.Hkv

    @property
    def rows(self) -> int:
        """Query rows of a task: tokens by heads of the group."""
        return self.query_tokens * self.group

    @property
    def value_width(self) -> int:
        """Dims of one column of a paired values block."""
        return value_width(self.D)

    @property
    def tile_rows(self) -> int:
        """Query rows of a register tile, with two vectors of sums for each: of several heights the one that leaves fewest empty."""
        heights = [min(self.rows, height) for height in self.isa.tuning.query_tile_rows]
        return min(heights, key=lambda height: ceil_div(self.rows, height) * height)

    @property
    def tiles(self) -> int:
        return ceil_div(self.rows, self.tile_rows)

    def token(self, first: Expr, row: Expr, tokens: Expr) -> Expr:
        """Return the token of a task's row; rows beyond the last token repeat it."""
        return T.min(first + T.truncdiv(row, T.int64(self.group)), tokens - 1)

    def last_cell(self, start: Expr, token: Expr, end_cell: Expr) -> Expr:
        """Return the last cell that a token sees, of cells before end_cell; the first token's own cell is `start`."""
        return start + token if self.is_causal else end_cell - 1

    def live_tiles(self, tokens: Expr) -> Expr:
        """Return how many tiles the rows of a task's first tokens fill."""
        return T.truncdiv(tokens * self.group + (self.tile_rows - 1), T.int64(self.tile_rows))

    @property
    def row_words(self) -> int:
        """Scratch of one query row: D sums, then the maximum and the sum of weights, padded to a line."""
        return self.D + 16

    @property
    def task_words(self) -> int:
        return self.tiles * self.tile_rows * self.row_words


def query_tokens(group: int, isa: Isa) -> int:
    """Return the tokens of a prefill task: about as many rows as measured. For tiles of one height a power of two, which fills whole ones where
    the group is no larger than one.
    """
    tokens = max(1, isa.tuning.query_rows // group)
    return tokens if len(isa.tuning.query_tile_rows) > 1 else 1 << (tokens.bit_length() - 1)


def cell_bytes(dtype: str, dim: int) -> float:
    """Return the bytes of one dim of a key or value; an int8 one has an f32 scale for all its dims."""
    return {"f32": 4, "bf16": 2, "int8": 1 + 4 / dim}[dtype]
