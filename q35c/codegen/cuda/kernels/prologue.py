"""What a product does to its rows first: norm and rounding, in shared memory, so that neither needs a launch of its own.

Every block does it again for the rows that it reads. They lie in the L2 cache, and a launch saved is worth more, as long as
they are few. The bits are those of the kernels `rms_norm`, `quantize_rows` and `round_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from q35c.codegen.cuda.kernels.family import WARP, Parameters, ceil_div
from q35c.codegen.cuda.kernels.make import Expr, T, add, array, let, local, shared, store
from q35c.codegen.cuda.kernels.rounding import VALUES, round_values
from q35c.codegen.cuda.kernels.threads import (
    barrier,
    block_sum,
    columns,
    extern,
    silu,
    warp_sum,
    when,
)
from q35c.formats.registry import integer_format
from q35c.layouts.rows import IntegerRow

WARPS = 8
THREADS = WARPS * WARP
MOST_BYTES = (
    38 << 10
)  # of staged rows: with the sums of 8 rows they are static shared memory, of which there are 48 KiB
KINDS = ("none", "round", "norm", "gated")


@dataclass(frozen=True)
class Prologue:
    """Say how f32 rows of K values become rows of a dtype: "round", or "norm" before that; with "none" they are such rows.

    With "gated" the norm is that of each head of `head_dim` values, times SiLU of a gate (`delta_output`).
    """

    kind: str
    K: int
    rows: str
    eps: float = 0.0
    offset: float = 0.0
    head_dim: int = 0

    @property
    def row_type(self) -> str:
        """Return the type of words that the kernel is given."""
        return "float32" if self.kind != "none" or self.rows == "f32" else "uint32"

    @property
    def words(self) -> int:
        """Return the words of a staged row."""
        if form := integer_format(self.rows):
            return IntegerRow(self.K, form.group, has_starts=False).sums
        return self.K if self.rows == "f32" else ceil_div(self.K, 2)

    @property
    def is_needed(self) -> bool:
        return self.kind != "none"

    def stage(
        self, x: Expr, norm: Expr, gate: Expr, row_of: Callable[[Expr], Expr], count: Expr, tile: int, lane: Expr, warp: Expr
    ) -> Expr:  # fmt: skip
        """Bring the first `count` of `tile` rows to shared memory, x[row_of(r)] as row r; return them, [tile, words]."""
        thread = let("thread", warp * WARP + lane)
        staged = shared("staged", (tile, self.words), "float32" if self.rows == "f32" else "uint32")
        parts = shared("squares", (tile, self.K // self.head_dim if self.head_dim else WARPS))
        with T.serial(count) as r:
            row = let("staged_row", row_of(r))
            value = self._values(x, norm, gate, row, parts, r, thread, lane)

            self._store(staged, r, value, thread, lane)
        barrier()
        return staged

    def _values(
        self, x: Expr, norm: Expr, gate: Expr, row: Expr, parts: Expr, r: Expr, thread: Expr, lane: Expr
    ) -> Callable[[Expr], Expr]:  # fmt: skip
        """Return what makes value k of a row."""
        if self.kind == "gated":
            self._head_factors(x, row, parts, r, thread, lane)

            def gated(k: Expr) -> Expr:
                normed = x[row, k] * parts[r, k // self.head_dim] * norm[k % self.head_dim]
                return normed * silu(gate[row, k])

            return gated
        if self.kind == "round":
            return lambda k: x[row, k]
        total = local("total", (1,))
        store(total, T.float32(0), 0)
        with columns(self.K, thread, THREADS) as d:
            add(total, x[row, d] * x[row, d], 0)
        block_sum(total, parts, thread, WARPS, r)
        factor = let("factor", self._factor(total[0], self.K))
        return lambda k: x[row, k] * factor * (norm[k] + T.float32(self.offset))

    def _head_factors(
        self, x: Expr, row: Expr, factors: Expr, r: Expr, thread: Expr, lane: Expr
    ) -> None:
        """Let factors[r] be what each head of a row is multiplied by; a warp does a head."""
        heads, total = self.K // self.head_dim, local("total", (1,))
        with T.serial(ceil_div(heads, WARPS)) as turn:
            head = let("head", turn * WARPS + thread // WARP)
            with when(head < heads):
                store(total, T.float32(0), 0)
                with columns(self.head_dim, lane, WARP) as d:
                    at = let("at", head * self.head_dim + d)
                    add(total, x[row, at] * x[row, at], 0)
                warp_sum(total)
                with when(lane == 0):
                    store(factors, self._factor(total[0], self.head_dim), r, head)
        barrier()

    def _factor(self, squares: Expr, count: int) -> Expr:
        return T.rsqrt(squares * T.float32(1.0 / count) + T.float32(self.eps))

    def _store(
        self, staged: Expr, r: Expr, value: Callable[[Expr], Expr], thread: Expr, lane: Expr
    ) -> None:
        form = integer_format(self.rows)
        if form is None:
            with columns(self.words, thread, THREADS) as word:
                store(staged, value(word) if self.rows == "f32" else self._pair(value, word), r, word)  # fmt: skip
            return
        row, lanes = IntegerRow(self.K, form.group, has_starts=False), form.group // VALUES
        with T.serial(ceil_div(row.scales, THREADS)) as turn:  # all lanes: they meet
            word = let("word", turn * THREADS + thread)
            values = local("values", (VALUES,))
            for j in range(VALUES):
                k = let("k", word * VALUES + j)
                store(values, T.float32(0), j)
                with when(k < self.K):
                    store(values, value(k), j)
            made = round_values(values, form.group)
            with when(word < row.scales):
                store(staged, T.cast(made.word[0], "uint32"), r, word)
            with when(word < row.scales, lane % lanes == 0):
                store(staged, T.cast(made.scale, "uint32"), r, row.scales + word // lanes)

    def _pair(self, value: Callable[[Expr], Expr], word: Expr) -> Expr:
        low = extern("uint32", "q35c_bf16", value(word * 2))
        second = value(T.min(word * 2 + 1, self.K - 1))
        if self.K % 2:
            second = T.Select(word * 2 + 1 < self.K, second, T.float32(0))
        high = T.shift_left(extern("uint32", "q35c_bf16", second), T.uint32(16))
        return T.bitwise_or(low, high)

    def arrays(self, norm: Expr, gate: Expr, tokens: Expr, ld_gate: Expr) -> tuple[Expr, Expr]:
        """Return the weight of the norm and the gate, None where a kernel takes none."""
        if norm is not None:
            norm = array(norm, (self.head_dim or self.K,), "float32")
        return norm, None if gate is None else array(gate, (tokens, ld_gate), "float32")


def prologue_of(p: Parameters, K: int) -> Prologue:
    """Return the prologue that a product's parameters ask for; without any it has none."""
    kind = p.get("prologue", "none")
    return Prologue(kind, K, p["rows"], p.get("eps", 0.0), p.get("offset", 0.0))


def prologue_arguments(p: Parameters) -> tuple[str, str]:
    """Return the pointers and strides that a kernel takes for its prologue, each behind a space."""
    pointers = {"norm": " norm", "gated": " norm gate"}.get(p.get("prologue", "none"), "")
    return pointers, " ld_gate" if "gate" in pointers else ""
