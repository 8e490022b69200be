"""Blocks of memory: tensors in a block, the state of a sequence.

Every block starts at a multiple of 64 bytes and every tensor in it too, so that generated code may
load whole cache lines and vectors. The compiler and the reader use the same functions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Blob = Literal["weights", "state", "arena", "io", "barrier"]  # what programs point into
BLOBS: tuple[Blob, ...] = ("weights", "state", "arena", "io", "barrier")

ALIGNMENT = 64
SLOT_BYTES = ALIGNMENT  # unit of the slots that tell programs where sequences' states begin
ELEMENT_BYTES = 4  # programs point to whole words
SLOT_WORDS = SLOT_BYTES // ELEMENT_BYTES
MAX_BARRIER_BYTES = 1 << 20  # with a counter for each group of each expert's inner rows
GRID = 32  # tokens: cutting a sequence at a multiple of this into calls changes no bit of a result
STAMP_BYTES = 2048  # from the start of a probing thread's part: cycles before and after its work

# The barrier's cache lines: int32 arrivals at 0, generation at 64, sleepers at 68, then counters of `q35c_claim`. They and what follows in
# the block, counters of `q35c_arrive`, start as zeros.
PART_COUNTERS = 128
DIVIDED_CALLS = 16  # most between two barriers: each has a counter
BARRIER_BYTES = PART_COUNTERS + 4 * DIVIDED_CALLS

DTYPES = {  # name -> (safetensors name, bytes)
    "f32": ("F32", 4),
    "bf16": ("BF16", 2),
    "i64": ("I64", 8),
    "i32": ("I32", 4),
    "i8": ("I8", 1),
    "u8": ("U8", 1),
}


def align(size: int) -> int:
    """Round up to a multiple of 64."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a dense tensor, without padding."""
    return math.prod(shape) * DTYPES[dtype][1]


def pack_tensors(specs: Iterable[tuple[str, Sequence[int]]]) -> tuple[list[int], int]:
    """Place (dtype, shape) tensors one after another; return their offsets and the block's bytes."""
    offsets: list[int] = []
    end = 0
    for dtype, shape in specs:
        offsets.append(end)
        end += align(tensor_bytes(dtype, shape))
    return offsets, end


def state_layout(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the manifest's `state` from tensors with name, dtype, layout, shape and growth."""
    listed = [dict(tensor) for tensor in tensors]
    offsets, total = pack_tensors((tensor["dtype"], tensor["shape"]) for tensor in listed)
    placed = [{**tensor, "offset": at} for tensor, at in zip(listed, offsets, strict=True)]
    return {"bytes": total, "tensors": placed}
