"""The cache of keys and values in a sequence's state, as kernels address it (layouts/cache.py)."""

from __future__ import annotations

from dataclasses import dataclass

from q35c.codegen.cuda.kernels.make import Expr, T, let, store
from q35c.codegen.cuda.kernels.threads import extern, low_bf16
from q35c.layouts.blobs import SLOT_BYTES
from q35c.layouts.cache import CELLS


@dataclass(frozen=True)
class Cache:
    """Keys and values of a layer in cells32: keys [Hkv, context / 32, D, 32], values [Hkv, context, D].

    Kernels point to the keys of the call's first sequence; `slot` is the distance of another in SLOT_BYTES, int64.
    """

    D: int
    dtype: str  # f32 or bf16
    context: int
    v_offset_bytes: int  # of the values from the keys

    @property
    def element(self) -> str:
        """Return the type of a stored element."""
        return {"f32": "float32", "bf16": "uint16"}[self.dtype]

    @property
    def element_bytes(self) -> int:
        return {"f32": 4, "bf16": 2}[self.dtype]

    def base(self, slot: Expr) -> Expr:
        """Return where a sequence's keys begin, in elements, int64."""
        return let("base", slot * T.int64(SLOT_BYTES // self.element_bytes))

    def key(self, base: Expr, head: Expr, block: Expr, d: Expr, cell: Expr) -> Expr:
        """Return where dim d of a key lies in the state: that of cell `cell` of a block of 32. int64: a context may be long."""
        line = T.cast(head * (self.context // CELLS) + block, "int64")
        return base + line * T.int64(self.D * CELLS) + T.cast(d * CELLS + cell, "int64")

    def value(self, base: Expr, head: Expr, cell: Expr, d: Expr) -> Expr:
        """Return where dim d of a value lies in the state."""
        first = T.int64(self.v_offset_bytes // self.element_bytes)
        line = T.cast(head * self.context + cell, "int64")
        return base + first + line * T.int64(self.D) + T.cast(d, "int64")

    def load(self, state: Expr, at: Expr) -> Expr:
        """Return an element as f32."""
        element = state[at]
        return element if self.dtype == "f32" else low_bf16(T.cast(element, "uint32"))

    def write(self, state: Expr, at: Expr, value: Expr) -> None:
        """Round an f32 as the cache does, and store it."""
        if self.dtype == "bf16":
            value = T.cast(extern("uint32", "q35c_bf16", value), "uint16")
        store(state, value, at)
