"""How the keys and values of a sequence lie in its state.

    cells32      keys    [Hkv, context / 32, D, 32]: one vector load serves as many keys
                 values  [Hkv, context, D]
    bf16-pairs   keys    [Hkv, context / 32, D / 2, 32 cells, 2 dims]
                 values  [Hkv, context / 32, D / W, 16 pairs of cells, W dims, 2 cells]     W = 32, or 16 if D is odd times 16
    int8-pairs   the same with other pairs, made without shuffles: dims d and d + D / 2 of a key, cells p and p + 16 of a
                 block of values; behind a block's D rows of 32 bytes lie the f32 scales of its 32 cells: [D + 4, 32]

cells32 is of f32 or bf16. In pairs, a block of 32 cells has [D, 32] elements in both, and is read from front to back.
"""

from __future__ import annotations

from typing import Literal

CacheLayout = Literal["cells32", "bf16-pairs", "int8-pairs"]
StateLayout = Literal["plain"] | CacheLayout  # plain: dense, as its shape says
# Layout -> the dtypes of what lies so; all but plain grow with the context.
STATE_DTYPES: dict[StateLayout, tuple[str, ...]] = {
    "plain": ("f32",),
    "cells32": ("f32", "bf16"),
    "bf16-pairs": ("bf16",),
    "int8-pairs": ("i8",),
}

CELLS = 32  # tokens of one block of keys
SCALE_ROWS = 4  # rows of 32 bytes behind a block of an int8 cache: an f32 scale for each token


def cache_layout(dtype: str, has_bf16_pairs: bool) -> CacheLayout:
    """Return the layout of a cache of f32, bf16 or int8; the last is in pairs everywhere, bf16 where pairs are multiplied."""
    if dtype == "int8":
        return "int8-pairs"
    return "bf16-pairs" if dtype == "bf16" and has_bf16_pairs else "cells32"


def stored_shape(
    kind: str, heads: int, head_dim: int, context: int, layout: CacheLayout
) -> list[int]:
    """Return the shape of a layer's "keys" or "values" in the state; axis 1 counts cells or blocks of 32."""
    if layout == "int8-pairs":
        return [heads, context // CELLS, head_dim + SCALE_ROWS, CELLS]
    if kind == "keys" or layout == "bf16-pairs":
        return [heads, context // CELLS, head_dim, CELLS]
    return [heads, context, head_dim]


def value_width(head_dim: int) -> int:
    """Return the dims of one column of a paired block of values."""
    return 32 if head_dim % 32 == 0 else 16
