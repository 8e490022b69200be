"""Norm, rotation and the cache write before attention, against float64.

Thirteen heads' shapes times six token counts, both forms; whatever of the cache is not written must stay as it was. In
a cache of bf16 pairs the odd half beside a last, even cell is made zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.prepare import attention_prepare
from q35c.codegen.cpu.kernels.attention.shape import is_paired
from q35c.ir import reference
from tests.kernels.harness import (
    EACH_ISA,
    Kernels,
    assert_close,
    build_kernels,
    from_bf16,
    guard,
    to_bf16,
)

CONTEXT, EPS, KEYS_OFFSET = 128, 1e-6, 128  # the offset is in bytes
TOKENS = (1, 2, 3, 5, 8, 33)
START = 30  # the longest run crosses two blocks of 32 keys
SLOTS = np.array([5, 0, 3, 1, 4, 2, 7, 6])
STARTS = np.array([0, 1, 31, 32, 33, 64, 100, CONTEXT - 1])


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, head dim, rotated dims and cache type."""

    Hq: int
    Hkv: int
    D: int
    R: int
    dtype: str = "f32"

    @property
    def element(self) -> type:
        return {"f32": np.float32, "bf16": np.uint16, "int8": np.uint8}[self.dtype]

    @property
    def cache_words(self) -> int:
        """Elements of the keys, and of the values, of one sequence; int8 has 4 bytes for each scale."""
        return self.Hkv * CONTEXT * (self.D + 4 * (self.dtype == "int8"))

    @property
    def region_words(self) -> int:
        """Elements of one sequence's region: what comes before, keys, values, 64 bytes more."""
        size = np.dtype(self.element).itemsize
        return (KEYS_OFFSET + 64) // size + 2 * self.cache_words

    @property
    def values_offset(self) -> int:
        return KEYS_OFFSET + self.cache_words * np.dtype(self.element).itemsize


CASES = (
    Heads(1, 1, 32, 2),
    Heads(2, 1, 32, 30),
    Heads(3, 1, 48, 16),
    Heads(4, 2, 80, 20, "bf16"),
    Heads(6, 2, 64, 16),
    Heads(5, 5, 112, 28, "bf16"),
    Heads(8, 4, 128, 32),
    Heads(7, 7, 144, 36),
    Heads(8, 1, 256, 64, "bf16"),
    Heads(1, 1, 32, 8, "int8"),
    Heads(4, 2, 80, 20, "int8"),
    Heads(3, 3, 112, 28, "int8"),
    Heads(8, 2, 256, 64, "int8"),
)


def scale_of(heads: Heads) -> float:
    return float(np.float32(heads.D**-0.5))


@pytest.fixture(scope="module", params=EACH_ISA)
def isa(request: Any) -> Isa:
    return request.param


@pytest.fixture(scope="module")
def kernels(isa: Isa) -> Kernels:
    functions = {
        f"{rows}_{index}": attention_prepare(
            heads.Hq, heads.Hkv, heads.D, heads.R, EPS, scale_of(heads), heads.dtype, CONTEXT,
            KEYS_OFFSET, heads.values_offset, rows, isa,
        )
        for index, heads in enumerate(CASES)
        for rows in ("sequence", "batch")
    }  # fmt: skip
    return build_kernels(functions, isa)


class Problem:
    """Random rows of queries, keys and values, and the poisoned regions of eight sequences."""

    def __init__(self, index: int, tokens: int) -> None:
        self.heads = heads = CASES[index]
        self.index, self.tokens = index, tokens
        rng = np.random.default_rng(index * 100 + tokens)
        widths = (heads.Hq * 2 * heads.D, heads.Hkv * heads.D, heads.Hkv * heads.D)
        self.strides = [width + 16 * (tokens % 3) for width in widths]
        rows = [rng.normal(0, 2, (tokens, stride)).astype(np.float32) for stride in self.strides]
        self.rows = [guard(row) for row in rows]
        exact = [row[:, :width] for row, width in zip(rows, widths, strict=True)]
        norms = [rng.normal(0, 0.3, heads.D).astype(np.float32) for _ in range(2)]
        self.norms = [guard(norm) for norm in norms]
        angles = rng.uniform(-3, 3, (tokens, heads.R // 2))
        table = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        self.table = guard(table)
        q, self.k, self.v, _ = reference.project_heads(
            *(part.astype(np.float64) for part in (*exact, *norms, table)),
            heads=heads.Hq, kv_heads=heads.Hkv, eps=EPS,
        )  # fmt: skip
        self.q = q.transpose(1, 0, 2).reshape(tokens, -1) * scale_of(heads)

    def run(
        self, kernels: Kernels, rows: str, slots: np.ndarray, starts: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the queries and all regions after one call."""
        heads = self.heads
        q = guard(np.zeros((self.tokens, heads.Hq * heads.D), np.float32), poison=True)
        state = guard(np.zeros((len(SLOTS), heads.region_words), heads.element), poison=True)
        units = heads.region_words * np.dtype(heads.element).itemsize // 64
        kernels.call(
            f"{rows}_{self.index}", *self.rows, *self.norms, self.table, q, state,
            guard(slots.astype(np.int64) * units), guard(starts.astype(np.int32)),
            self.tokens, *self.strides, threads=threads,
        )  # fmt: skip
        return q, state

    def check_cache(
        self, state: np.ndarray, cells: list[tuple[int, int]], ends: list[int], isa: Isa
    ) -> None:
        """Compare what each row left at its (sequence, cell); nothing else may have changed.

        `ends` are the rows that are the last of their sequence.
        """
        heads = self.heads
        words = np.array(state).view(f"u{state.itemsize}")
        poison = words.dtype.type(-1 % 2 ** (8 * state.itemsize))
        if heads.dtype == "int8":
            for row, (sequence, cell) in enumerate(cells):
                for part, exact in zip(
                    self.find_bytes(words, sequence, cell), (self.k, self.v), strict=True
                ):
                    check_codes(*part, exact[:, row])
            assert (words == poison).all(), "something else was written"
            return
        has_pairs = is_paired(heads.dtype, isa)
        find = self.find_pairs if has_pairs else self.find
        for row, (sequence, cell) in enumerate(cells):
            key, value = find(words, sequence, cell)
            self.check_key(key.reshape(heads.Hkv, heads.D), self.k[:, row])
            exact = self.v[:, row].astype(np.float32)
            kept = exact.view(np.uint32) if heads.dtype == "f32" else to_bf16(exact)
            np.testing.assert_array_equal(value.reshape(heads.Hkv, heads.D), kept)
            key[...] = value[...] = poison
            if has_pairs and row in ends and cell % 2 == 0:
                _, beside = find(words, sequence, cell + 1)
                assert (beside == 0).all()
                beside[...] = poison
        assert (words == poison).all(), "something else was written"

    def find(self, words: np.ndarray, sequence: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """Return views of one cell's key and value, [Hkv, D]."""
        heads = self.heads
        keys, values = self.caches(words)
        keys = keys.reshape(-1, heads.Hkv, CONTEXT // 32, heads.D, 32)
        values = values.reshape(-1, heads.Hkv, CONTEXT, heads.D)
        return keys[sequence, :, cell // 32, :, cell % 32], values[sequence, :, cell]

    def find_pairs(
        self, words: np.ndarray, sequence: int, cell: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of a cache of pairs, [Hkv, D / 2, 2] and [Hkv, D / width, width]."""
        heads, (block, lane) = self.heads, divmod(cell, 32)
        width = 16 if heads.D % 32 else 32
        keys, values = self.caches(words)
        keys = keys.reshape(-1, heads.Hkv, CONTEXT // 32, heads.D // 2, 32, 2)
        values = values.reshape(-1, heads.Hkv, CONTEXT // 32, heads.D // width, 16, width, 2)
        return keys[sequence, :, block, :, lane], values[sequence, :, block, :, lane // 2, :, lane % 2]  # fmt: skip

    def find_bytes(
        self, words: np.ndarray, sequence: int, cell: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return views of the codes and scales of one cell's key and value: [Hkv, 2, D / 2] and [Hkv, D / width, width],
        and [Hkv, 4] each."""
        heads, (block, lane) = self.heads, divmod(cell, 32)
        D, width = heads.D, 16 if heads.D % 32 else 32
        blocks = [
            cache.reshape(-1, heads.Hkv, CONTEXT // 32, (D + 4) * 32)[sequence, :, block]
            for cache in self.caches(words)
        ]
        keys = blocks[0][:, : D * 32].reshape(-1, D // 2, 32, 2)[:, :, lane].swapaxes(1, 2)
        values = blocks[1][:, : D * 32].reshape(-1, D // width, 16, width, 2)
        scales = [part[:, D * 32 :].reshape(-1, 32, 4)[:, lane] for part in blocks]
        return [(keys, scales[0]), (values[:, :, lane % 16, :, lane // 16], scales[1])]

    def caches(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a view of every sequence's keys, and one of its values."""
        size, first = self.heads.cache_words, KEYS_OFFSET // words.itemsize
        return words[:, first : first + size], words[:, first + size : first + 2 * size]

    def check_key(self, key: np.ndarray, want: np.ndarray) -> None:
        if self.heads.dtype == "f32":
            assert_close(key.copy().view(np.float32), want)
        else:  # rounded from f32: at most half a step of bf16, and the f32 error
            error = np.abs(from_bf16(key) - want)
            assert (error <= 2.0**-8 * 1.001 * np.abs(want) + 1e-7).all()


def check_codes(codes: np.ndarray, scales: np.ndarray, want: np.ndarray) -> None:
    """Compare int8 codes and f32 scales with values [Hkv, D] and poison them."""
    kept = codes.reshape(want.shape).view(np.int8).astype(np.float64)
    scale = scales.copy().view(np.float32).astype(np.float64)
    np.testing.assert_allclose(scale, np.abs(want).max(-1, keepdims=True) / 127, rtol=1e-5)
    assert (np.abs(kept * scale - want) <= 0.501 * scale).all()
    codes[...] = scales[...] = 0xFF


EACH_CASE = pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))


@EACH_CASE
def test_a_run_is_appended(kernels: Kernels, isa: Isa, index: int) -> None:
    for tokens in TOKENS:
        check_run(kernels, isa, index, tokens)


def check_run(kernels: Kernels, isa: Isa, index: int, tokens: int) -> None:
    problem = Problem(index, tokens)
    outputs = []
    for threads in (1, 2, 3):
        q, state = problem.run(kernels, "sequence", np.array([2]), np.array([START]), threads)
        outputs.append(q.tobytes() + state.tobytes())
    assert_close(q, problem.q)
    cells = [(2, START + row) for row in range(tokens)]
    problem.check_cache(state, cells, [tokens - 1], isa)
    assert outputs[0] == outputs[1] == outputs[2]


@EACH_CASE
def test_rows_of_a_batch_are_sequences(kernels: Kernels, isa: Isa, index: int) -> None:
    for tokens in TOKENS:
        if tokens <= len(SLOTS):
            check_rows(kernels, isa, index, tokens)


def check_rows(kernels: Kernels, isa: Isa, index: int, tokens: int) -> None:
    problem = Problem(index, tokens)
    outputs = []
    for threads in (1, 2, 3):
        q, state = problem.run(kernels, "batch", SLOTS[:tokens], STARTS[:tokens], threads)
        outputs.append(q.tobytes() + state.tobytes())
    assert_close(q, problem.q)
    cells = list(zip(SLOTS[:tokens], STARTS[:tokens], strict=True))
    problem.check_cache(state, cells, list(range(tokens)), isa)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_int8_keeps_what_has_no_scale(kernels: Kernels, value: float) -> None:
    """Codes cannot hold NaN or infinity: the scale does. Zeros have a scale of zero."""
    problem = Problem(len(CASES) - 1, 1)
    for rows in problem.rows[1:]:
        rows[0, :256] = 0.0
        rows[0, 3] = value
    _, state = problem.run(kernels, "sequence", np.array([0]), np.array([0]), 1)
    for codes, scales in problem.find_bytes(np.array(state), 0, 0):
        with np.errstate(invalid="ignore"):
            kept = codes[0].view(np.int8) * scales[0].copy().view(np.float32)
        assert ((kept == 0) if value == 0 else ~np.isfinite(kept)).all()
