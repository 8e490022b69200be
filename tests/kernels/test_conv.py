"""The causal convolution with SiLU against float64: 64 shapes, any slot; the kernels of
`delta/tasks.py` convolve the channels of one head this way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.delta.conv import ConvShape, convolve_channels
from q35c.codegen.cpu.kernels.vectors import share
from q35c.ir import reference
from tests.kernels.harness import EACH_ISA, Kernels, assert_close, build_kernels, guard

# Channels (a multiple of 16) and taps: below, at, beside and above the block of 512 channels.
SHAPES = ((16, 4), (32, 2), (48, 3), (96, 4), (208, 2), (512, 3), (528, 4), (1072, 4))
TOKENS = (1, 2, 3, 4, 5, 8, 17, 66)
GRAIN = 16  # channels that threads share out
OFFSET = 192  # bytes of other state before this layer's


def convolution(C: int, K: int, isa: Isa) -> Any:
    """Build the kernel (X f32[T, C], which is replaced, W f32[K, C], STATE f32[K-1, C], SLOTS i64[1], T, ld_x, tid, nt)."""
    shape = ConvShape(C, K, isa.lanes, OFFSET // 4)

    @T.prim_func(private=True, s_tir=True)
    def convolution_kernel(
        X: T.handle("float32"),
        W: T.handle("float32"),
        STATE: T.handle("float32"),
        SLOTS: T.handle("int64"),
        tokens: T.int64,
        ld_x: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((tokens, ld_x), "float32", data=X)
        w = T.decl_buffer((K, C), "float32", data=W)
        state = T.decl_buffer((T.int64(1) << 48,), "float32", data=STATE)
        slots = T.decl_buffer((1,), "int64", data=SLOTS)
        base: T.let[T.int64] = slots[0] * 16 + shape.slot_offset
        low: T.let[T.int64] = share(C // GRAIN, tid, nt) * GRAIN
        high: T.let[T.int64] = share(C // GRAIN, tid + 1, nt) * GRAIN
        convolve_channels(shape, x, w, state, base, T.int64(0), tokens, low, high - low)
        return T.int32(0)

    return convolution_kernel


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request: Any) -> Kernels:
    functions = {
        f"{channels}_{taps}": convolution(channels, taps, request.param)
        for channels, taps in SHAPES
    }
    return build_kernels(functions, request.param)


class Problem:
    """Random input, weights and the region of `sequences` sequences, NaN where nothing belongs."""

    def __init__(self, shape: tuple[int, int], tokens: int, sequences: int) -> None:
        self.channels, self.taps = shape
        rng = np.random.default_rng(sum(shape) * 100 + tokens)
        self.ld_x = self.channels + 16 * (tokens % 3)
        self.x = guard(rng.normal(size=(tokens, self.ld_x)).astype(np.float32))
        self.w = guard(rng.normal(size=(self.taps, self.channels)).astype(np.float32))
        self.state_words = (self.taps - 1) * self.channels
        # Slots count 64 bytes; one more line between the sequences.
        self.slot_units = (4 * self.state_words + OFFSET) // 64 + 1
        words = 16 * self.slot_units
        self.memory = np.full((sequences, words), np.nan, np.float32)
        for region in self.memory:
            self.of(region)[...] = rng.normal(size=(self.taps - 1, self.channels))

    def of(self, region: np.ndarray) -> np.ndarray:
        """Return this layer's state [K - 1, C] of one sequence's region."""
        first = OFFSET // 4
        return region[first : first + self.state_words].reshape(-1, self.channels)

    def run(self, kernels: Kernels, slots: np.ndarray, threads: int) -> tuple[Any, Any]:
        """Return output and all memory after one call."""
        tokens, memory = len(self.x), guard(self.memory)
        y = guard(self.x)  # replaced
        places = guard(slots.astype(np.int64) * self.slot_units)
        kernels.call(
            f"{self.channels}_{self.taps}", y, self.w, memory, places, tokens, self.ld_x, threads=threads
        )  # fmt: skip
        return y, memory

    def expected(self, sequence: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return output and new state in float64 of one sequence that takes these rows."""
        before = self.of(self.memory[sequence]).astype(np.float64)
        inputs = self.x[rows, : self.channels].astype(np.float64)
        whole = np.concatenate([before, inputs])
        mixed = reference.causal_conv(inputs.T, self.w.T.astype(np.float64), before.T)
        return reference.silu(mixed).T, whole[len(inputs) :]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_run_continues_its_sequence(kernels: Kernels, shape: tuple[int, int]) -> None:
    for tokens in TOKENS:
        check_run(kernels, shape, tokens)


def check_run(kernels: Kernels, shape: tuple[int, int], tokens: int) -> None:
    problem = Problem(shape, tokens, sequences=3)
    want, state = problem.expected(1, slice(None))
    outputs = []
    for threads in (1, 2, 3):
        y, memory = problem.run(kernels, np.array([1]), threads)
        outputs.append(y.tobytes() + memory.tobytes())
    assert_close(y[:, : problem.channels], want, note=f"{tokens} tokens")
    beyond = slice(problem.channels, None)
    np.testing.assert_array_equal(y[:, beyond], problem.x[:, beyond])
    changed = problem.memory.copy()
    problem.of(changed[1])[...] = state
    np.testing.assert_array_equal(memory, changed)  # NaN where it was, others' state untouched
    assert outputs[0] == outputs[1] == outputs[2]
