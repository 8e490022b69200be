"""The cache of keys and values in a sequence's state, as kernels address it (layouts/cache.py).

A warp writes a key or value, each lane some of its dims; it reads keys with a lane for each of 32 cells, and values with a
lane for each of 32 dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from q35c.codegen.cuda.kernels.family import WARP, ceil_div
from q35c.codegen.cuda.kernels.make import Expr, T, array, let, local, store
from q35c.codegen.cuda.kernels.rounding import nearest_codes
from q35c.codegen.cuda.kernels.threads import columns, extern, from_bits, low_bf16, warp_max, when
from q35c.layouts.blobs import SLOT_BYTES
from q35c.layouts.cache import CELLS, SCALE_ROWS, value_width

HUGE = 1 << 40  # elements behind a state's pointer; what a sequence has is the runtime's to know
Value = Callable[[Expr], Expr]  # dim -> f32


@dataclass(frozen=True)
class Cache:
    """Keys and values of a layer in cells32: keys [Hkv, context / 32, D, 32], values [Hkv, context, D].

    Kernels point to the keys of the call's first sequence; `slot` is the distance of another in SLOT_BYTES, int64. Indices
    are int64: a context may be long.
    """

    D: int
    dtype: str
    context: int
    v_offset_bytes: int  # of the values from the keys

    element_bytes = 4
    pointers = "state"

    @property
    def types(self) -> dict[str, str]:
        """Return the types of the elements that the pointers point to."""
        return {"state": "float32"}

    def bind(self, pointers: dict[str, Expr]) -> dict[str, Expr]:
        """Return the arrays behind the pointers."""
        return {name: array(pointers[name], (HUGE,), kind) for name, kind in self.types.items()}

    def base(self, slot: Expr) -> Expr:
        """Return where a sequence's keys begin, in elements."""
        return let("base", slot * T.int64(SLOT_BYTES // self.element_bytes))

    @property
    def values_start(self) -> Expr:
        return T.int64(self.v_offset_bytes // self.element_bytes)

    def key(self, base: Expr, head: Expr, block: Expr, d: Expr, cell: Expr) -> Expr:
        """Return where dim d of a key lies: that of cell `cell` of a block of 32."""
        line = T.cast(head * (self.context // CELLS) + block, "int64")
        return base + line * T.int64(self.D * CELLS) + T.cast(d * CELLS + cell, "int64")

    def value(self, base: Expr, head: Expr, block: Expr, d: Expr, cell: Expr) -> Expr:
        """Return where dim d of a value lies."""
        line = T.cast(head * self.context + block * CELLS + cell, "int64")
        return base + self.values_start + line * T.int64(self.D) + T.cast(d, "int64")

    def load(self, arrays: dict[str, Expr], at: Expr) -> Expr:
        """Return an element as f32, a scale of its cell aside."""
        return arrays["state"][at]

    def scaled(
        self, arrays: dict[str, Expr], of: str, base: Expr, head: Expr, block: Expr, cell: Expr, x: Expr
    ) -> Expr:  # fmt: skip
        """Return x times the scale that the elements of a cell's "key" or "value" have."""
        return x

    def write_key(
        self, arrays: dict[str, Expr], base: Expr, head: Expr, cell: Expr, lane: Expr, value: Value
    ) -> None:
        """Store a key by the lanes of a warp."""
        block, inside = cell // CELLS, cell % CELLS
        with columns(self.D, lane, WARP) as d:
            store(arrays["state"], self.rounded(value(d)), self.key(base, head, block, d, inside))

    def write_value(
        self, arrays: dict[str, Expr], base: Expr, head: Expr, cell: Expr, lane: Expr, value: Value
    ) -> None:
        """Store a value by the lanes of a warp."""
        block, inside = cell // CELLS, cell % CELLS
        with columns(self.D, lane, WARP) as d:
            store(arrays["state"], self.rounded(value(d)), self.value(base, head, block, d, inside))

    def rounded(self, value: Expr) -> Expr:
        """Return an f32 as it is stored."""
        return value


class HalfCache(Cache):
    """The same in bf16."""

    element_bytes = 2

    @property
    def types(self) -> dict[str, str]:
        return {"state": "uint16"}

    def load(self, arrays: dict[str, Expr], at: Expr) -> Expr:
        return low_bf16(T.cast(arrays["state"][at], "uint32"))

    def rounded(self, value: Expr) -> Expr:
        return T.cast(extern("uint32", "q35c_bf16", value), "uint16")


class ByteCache(Cache):
    """Keys and values in int8-pairs: blocks of D rows of 32 bytes, and behind them an f32 scale for each of 32 cells.

    Of a key dims d and d + D / 2 are a pair, in values cells c and c + 16. `scales` points to the same memory as `state`.
    """

    element_bytes = 1
    pointers = "state scales"

    @property
    def types(self) -> dict[str, str]:
        return {"state": "int8", "scales": "float32"}

    def load(self, arrays: dict[str, Expr], at: Expr) -> Expr:
        return T.cast(arrays["state"][at], "float32")

    def _block(self, base: Expr, head: Expr, block: Expr) -> Expr:
        line = T.cast(head * (self.context // CELLS) + block, "int64")
        return base + line * T.int64((self.D + SCALE_ROWS) * CELLS)

    def key(self, base: Expr, head: Expr, block: Expr, d: Expr, cell: Expr) -> Expr:
        half = self.D // 2
        inside = d % half * (2 * CELLS) + cell * 2 + d // half
        return self._block(base, head, block) + T.cast(inside, "int64")

    def value(self, base: Expr, head: Expr, block: Expr, d: Expr, cell: Expr) -> Expr:
        width, half = value_width(self.D), CELLS // 2
        inside = (
            d // width * (CELLS * width) + cell % half * (2 * width) + d % width * 2 + cell // half
        )
        return self._block(base + self.values_start, head, block) + T.cast(inside, "int64")

    def _scale(self, base: Expr, head: Expr, block: Expr, cell: Expr) -> Expr:
        start = T.shift_right(self._block(base, head, block), T.int64(2))
        return start + T.int64(self.D * CELLS // 4) + T.cast(cell, "int64")

    def scaled(
        self, arrays: dict[str, Expr], of: str, base: Expr, head: Expr, block: Expr, cell: Expr, x: Expr
    ) -> Expr:  # fmt: skip
        start = base if of == "key" else base + self.values_start
        return x * arrays["scales"][self._scale(start, head, block, cell)]

    def write_key(
        self, arrays: dict[str, Expr], base: Expr, head: Expr, cell: Expr, lane: Expr, value: Value
    ) -> None:
        block, inside = cell // CELLS, cell % CELLS
        codes, scale = self._round(value, lane)
        with columns(self.D, lane, WARP) as d:
            store(arrays["state"], codes(d), self.key(base, head, block, d, inside))
        with when(lane == 0):
            store(arrays["scales"], scale, self._scale(base, head, block, inside))

    def write_value(
        self, arrays: dict[str, Expr], base: Expr, head: Expr, cell: Expr, lane: Expr, value: Value
    ) -> None:
        block, inside = cell // CELLS, cell % CELLS
        codes, scale = self._round(value, lane)
        with columns(self.D, lane, WARP) as d:
            store(arrays["state"], codes(d), self.value(base, head, block, d, inside))
        with when(lane == 0):
            store(
                arrays["scales"], scale, self._scale(base + self.values_start, head, block, inside)
            )

    def _round(self, value: Value, lane: Expr) -> tuple[Value, Expr]:
        """Round a head with one scale; return its codes by dim, and the scale. All lanes of the warp must come here."""
        values, top = local("values", (ceil_div(self.D, WARP),)), local("top", (1,), "int32")
        store(top, 0, 0)
        with columns(self.D, lane, WARP) as d:
            store(values, value(d), d // WARP)
            bits = extern("int32", "__float_as_int", values[d // WARP])
            store(top, T.max(top[0], T.bitwise_and(bits, 0x7FFFFFFF)), 0)
        warp_max(top)
        largest = let("largest", from_bits(top[0]))
        codes = nearest_codes(largest)
        return (lambda d: T.cast(codes(values[d // WARP]), "int8")), largest * T.float32(1 / 127)


CACHES: dict[str, type[Cache]] = {"f32": Cache, "bf16": HalfCache, "int8": ByteCache}
CELL_BYTES: dict[str, Callable[[int], float]] = {
    "f32": lambda D: 4 * D, "bf16": lambda D: 2 * D, "int8": lambda D: D + 4,
}  # fmt: skip
