"""What the attention kernels share: shapes, the layout of the cache, where a sequence's cells lie.

Keys are stored as [Hkv, context / 32, D, 32], so that one vector load serves as many keys; values as
[Hkv, context, D]. Both are f32 or bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import Expr, ramp, widen

CELLS = 32  # keys of one block
TILE_ROWS = 4  # query rows computed together
QUERY_TOKENS = (
    8  # tokens of a prefill task: all their heads read each key block from the cache once
)
SLOT_BYTES = 64  # unit of the slots that the runtime passes


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

    def key(self, base: Expr, head: Expr, block: Expr) -> Expr:
        """Return the first element of a block of 32 keys: [D, 32]."""
        first = self.k_offset_bytes // self.element_bytes
        return base + first + (head * (self.context // CELLS) + block) * (self.D * CELLS)

    def value(self, base: Expr, head: Expr, cell: Expr) -> Expr:
        """Return the first element of a value: [D]."""
        first = self.v_offset_bytes // self.element_bytes
        return base + first + (head * self.context + cell) * self.D

    def load(self, state: Expr, at: Expr, lanes: int) -> Expr:
        """Load a vector of the cache as f32."""
        vector = state[ramp(at, lanes)]
        return vector if self.dtype == "f32" else widen(vector, lanes)


@dataclass(frozen=True)
class AttentionShape:
    """Describe one attention kernel. A task computes `query_tokens` tokens of one key head's group."""

    Hq: int
    cache: Cache
    query_tokens: int
    splits: int
    isa: Isa

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
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.Hq // self.Hkv

    @property
    def rows(self) -> int:
        """Query rows of a task: tokens by heads of the group."""
        return self.query_tokens * self.group

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def row_words(self) -> int:
        """Scratch of one query row: D sums, then the maximum and the sum of weights, padded to a line."""
        return self.D + 16

    @property
    def task_words(self) -> int:
        return self.tiles * TILE_ROWS * self.row_words
