"""Weight layouts: which checkpoint tensors make a packed weight, and the bytes it becomes (layouts/weights.py).

Everything is read, converted and written in slices of about a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from q35c.formats.bf16 import to_bf16
from q35c.formats.integer import IntegerFormat, quantize_weight
from q35c.formats.registry import integer_format
from q35c.layouts.weights import (
    BLOCK,
    CACHE_LINE,
    IntegerBlock,
    WeightLayout,
    block_count,
    packed_shape,
)

SLICE_BYTES = 1 << 20  # f32 bytes converted at a time: they stay in the cache

Job = Callable[[], np.ndarray]
Pack = Callable[[np.ndarray, str], np.ndarray]  # f32 [n * 32, K], format -> packed blocks
Read = Callable[[str, int, int], np.ndarray]  # name, first row, end row -> float32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight: its layout, element type and checkpoint tensors.

    layouts: `vector` (as it is, f32), `conv` ([C,1,K] -> f32 [K, C]), `linear` (sources stacked along
    rows), `swiglu` (16 gate rows then 16 up rows per block), `experts` and `experts_swiglu` (one
    block matrix per expert of a source [E, N, K], and one more if other sources hold a shared expert: [N, K], or gate and up).
    """

    name: str
    layout: WeightLayout
    dtype: str
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """Output rows of one matrix, before padding; swiglu counts gate and up."""
        if self.layout.startswith("experts"):
            return self.source_shapes[0][1]
        return sum(shape[0] for shape in self.source_shapes)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of all sources together."""
        if self.layout == "vector":
            return self.source_shapes[0]
        experts = (self.experts,) if self.layout.startswith("experts") else ()
        return (*experts, self.rows, self.inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that is stored."""
        stored = packed_shape(self.layout, self.dtype, self.matrix)
        assert stored is not None  # requests name layouts that hold what they ask for
        return stored[1]

    @property
    def experts(self) -> int:
        """Number of experts, a shared one included."""
        return self.source_shapes[0][0] + (len(self.sources) > 1)

    @property
    def values(self) -> int:
        """Number of weights, without padding."""
        return sum(math.prod(shape) for shape in self.source_shapes)

    @property
    def blocks(self) -> int:
        return block_count(self.layout, self.rows)

    def chunks(self, read: Read) -> Iterator[np.ndarray]:
        """Yield the stored bytes in order, a slice at a time."""
        return (job() for job in self.jobs(read))

    def jobs(self, read: Read, pack: Pack | None = None) -> Iterator[Job]:
        """Yield functions that make the slices; they share nothing, so threads may run several at once.

        `pack` does what `pack_blocks` does.
        """
        pack = pack_blocks if pack is None else pack
        if self.layout == "vector":
            yield lambda: read(self.sources[0], 0, self.source_shapes[0][0])
        elif self.layout == "conv":
            yield lambda: np.ascontiguousarray(
                read(self.sources[0], 0, self.source_shapes[0][0])[:, 0, :].T
            )
        elif self.layout.startswith("experts"):
            for expert in range(self.experts):
                yield partial(self._pack_expert, read, pack, expert)
        else:
            for first in range(0, self.blocks, self._slice_blocks):
                count = min(self._slice_blocks, self.blocks - first)
                yield partial(self._pack_rows, read, pack, first, count)

    @property
    def _slice_blocks(self) -> int:
        """Blocks that are converted at a time."""
        return max(1, SLICE_BYTES // (4 * BLOCK * self.inputs))

    @property
    def inputs(self) -> int:
        """Values of a row of the checkpoint's tensors."""
        return self.source_shapes[0][-1]

    def _pack_rows(self, read: Read, pack: Pack, first: int, count: int) -> np.ndarray:
        return pack(self._rows(read, first, count), self.dtype)

    def _pack_expert(self, read: Read, pack: Pack, expert: int) -> np.ndarray:
        """Pack one expert: it is read whole, because a checkpoint may store it in one piece."""
        if expert < self.source_shapes[0][0]:
            whole = read(self.sources[0], expert, expert + 1)[0]
            matrices = [whole] if self.layout == "experts" else np.split(whole, 2)
        else:
            shared = zip(self.sources[1:], self.source_shapes[1:], strict=True)
            matrices = [read(name, 0, shape[0]) for name, shape in shared]
        parts = []
        for first in range(0, self.blocks, self._slice_blocks):
            count = min(self._slice_blocks, self.blocks - first)
            if self.layout == "experts":
                rows = stack(matrices, first * BLOCK, count * BLOCK)
            else:
                gate, up = matrices
                rows = interleave(gate, up, first, count)
            parts.append(pack(rows, self.dtype))
        return np.concatenate(parts)

    def _rows(self, read: Read, first: int, count: int) -> np.ndarray:
        if self.layout == "swiglu":
            half = BLOCK // 2
            start, stop = first * half, min((first + count) * half, self.source_shapes[0][0])
            gate, up = (read(name, start, stop) for name in self.sources)
            return interleave(gate, up, 0, count)
        start, stop, parts = first * BLOCK, (first + count) * BLOCK, []
        base = 0
        for name, shape in zip(self.sources, self.source_shapes, strict=True):
            low, high = max(start - base, 0), min(stop - base, shape[0])
            if low < high:
                parts.append(read(name, low, high))
            base += shape[0]
        return stack(parts, 0, count * BLOCK)


def stack(parts: list[np.ndarray], start: int, rows: int) -> np.ndarray:
    """Return `rows` rows of the stacked parts from `start`, zero beyond their end."""
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    taken = whole[start : start + rows]
    if len(taken) == rows:
        return taken
    out = np.zeros((rows, whole.shape[1]), np.float32)
    out[: len(taken)] = taken
    return out


def interleave(gate: np.ndarray, up: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return blocks of 16 gate rows and 16 up rows, zero beyond the end."""
    half = BLOCK // 2
    halves = [
        stack([part], first * half, count * half).reshape(count, half, -1) for part in (gate, up)
    ]
    return np.concatenate(halves, axis=1).reshape(count * BLOCK, -1)


def pack_blocks(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Turn f32 [n * 32, K] into f32 [n, K, 32], bf16 bits u16 [n, K/2, 32, 2] (odd K: zero) or
    integers u8 [n, block_bytes].
    """
    if form := integer_format(dtype):
        return pack_integers(rows, form)
    count, inputs = len(rows) // BLOCK, rows.shape[1]
    blocks = rows.reshape(count, BLOCK, inputs)
    if dtype == "f32":
        return np.ascontiguousarray(blocks.transpose(0, 2, 1))
    bits = to_bf16(blocks)
    if inputs % 2:
        bits = np.concatenate([bits, np.zeros((count, BLOCK, 1), np.uint16)], axis=2)
    pairs = np.ascontiguousarray(bits).view(np.uint32)  # [n, 32, K/2]
    return (
        np.ascontiguousarray(pairs.transpose(0, 2, 1)).view(np.uint16).reshape(count, -1, BLOCK, 2)
    )


def pack_integers(rows: np.ndarray, form: IntegerFormat) -> np.ndarray:
    """Turn f32 [n * 32, K] into u8 [n, block_bytes]."""
    levels, scales, exponents = quantize_weight(rows, form)
    count, groups = len(rows) // BLOCK, levels.shape[1]
    codes = np.searchsorted(form.levels, levels).astype(np.uint8)
    sets = codes.reshape(count, BLOCK, groups, -1, form.set_inputs // 4, 4)
    words = pack_words(sets, form.bits)
    lines = words.transpose(0, 2, 3, 4, 1, 5)  # [n, groups, sets, lines of a set, 32, 4]
    packed = np.zeros((count, IntegerBlock(form, rows.shape[1]).block_bytes), np.uint8)
    packed[:, :BLOCK] = exponents.reshape(count, BLOCK)
    by_group = scales.reshape(count, BLOCK, groups)
    end = CACHE_LINE
    for first in range(0, groups, 2):
        for place, group in enumerate(range(first, min(first + 2, groups))):
            start = end + place * BLOCK
            packed[:, start : start + BLOCK] = by_group[:, :, group]
        pair = lines[:, first : first + 2].reshape(count, -1)
        start = end + CACHE_LINE
        end = start + pair.shape[1]
        packed[:, start:end] = pair
    return packed


def pack_words(sets: np.ndarray, bits: int) -> np.ndarray:
    """Turn u8 [.., words, 4], a set's inputs in words of 4, into the words [.., lines, 4] that store them."""
    if bits == 8:
        return sets
    low = sets & np.uint8(15)
    halves = low[..., 0::2, :] | low[..., 1::2, :] << np.uint8(4)  # words 0 | 1, then 2 | 3 ..
    if bits == 4:
        return halves
    high = sets >> np.uint8(4)
    first = high[..., 0, :]
    for word in range(1, sets.shape[-2]):
        first = first | high[..., word, :] << np.uint8(word)
    return np.concatenate([first[..., None, :], halves], -2)
