"""The gated delta kernels against the float64 reference: convolution, chunk scan, single steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import V4, detect
from q35c.codegen.cpu.kernels.delta.tasks import (
    SHORT_RUN,
    gated_delta,
    gated_delta_decode,
    gated_delta_scratch_bytes,
)
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows
from q35c.ir import reference
from tests.kernels.harness import (
    EACH_ISA,
    Kernels,
    RoundedRows,
    assert_close,
    build_kernels,
    guard,
)

EPS, TAPS = 1e-6, 4
LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 31, 33, 63, 64, 65, 130)
CASES = ((1, 1, 32, 32), (2, 4, 32, 48), (1, 3, 64, 32), (1, 4, 128, 128), (2, 2, 48, 256))


@dataclass
class Net:
    """Kernels of one shape, one long random sequence and the weights."""

    shape: tuple[int, int, int, int]
    isa: Isa
    kernels: Kernels
    arrays: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    @property
    def channels(self) -> int:
        key_heads, value_heads, key_dim, value_dim = self.shape
        return 2 * key_heads * key_dim + value_heads * value_dim

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Return zero conv and delta states."""
        _, value_heads, key_dim, value_dim = self.shape
        conv = np.zeros((TAPS - 1, self.channels), np.float32)
        return guard(conv), guard(np.zeros((value_heads, key_dim, value_dim), np.float32))

    def run(
        self, state: Any, start: int, stop: int, rows: str, threads: int = 1, parts: int = 0
    ) -> np.ndarray:
        """Append tokens start..stop; the state is updated in place."""
        _, value_heads, _, value_dim = self.shape
        conv, delta = state
        count, width = stop - start, value_heads * value_dim
        part = {name: guard(array[start:stop]) for name, array in self.arrays.items()}
        conv_w = guard(np.ascontiguousarray(self.weights["conv_w"][:, 0].T))
        a_log, dt_bias, norm_w = (guard(self.weights[n]) for n in ("a_log", "dt_bias", "norm_w"))
        y = guard(np.zeros((count, width), np.float32), poison=True)
        size = gated_delta_scratch_bytes(*self.shape, self.isa)
        scratch = guard(np.zeros(size * threads // 4, np.float32), poison=True)
        slots, starts = guard(np.zeros(1, np.int64)), guard(np.array([start], np.int32))
        rounded = RoundedRows(count, width, group_of(value_dim), self.isa)
        inputs = [part[name] for name in ("qkv", "z", "b", "a")]
        args = [conv_w, conv, *inputs, a_log, dt_bias, norm_w, delta, slots]
        strides = [self.channels, width, value_heads, value_heads, width, rounded.words.shape[1]]
        split = {"threads": threads, "parts": parts}
        if rows == "batch":
            self.kernels.call("decode", *args, y, rounded.words, count, *strides, **split)
        else:
            args += [starts, y, rounded.words, scratch]
            self.kernels.call("delta", *args, count, *strides, **split)
        rounded.check(self.kernels, y)
        return np.array(y)

    def expected(self, start: int, stop: int, state: Any) -> tuple[np.ndarray, ...]:
        """Return output and states in float64 after tokens start..stop from a state."""
        exact = [self.arrays[n][start:stop].astype(np.float64) for n in ("qkv", "z", "b", "a")]
        weights = [
            self.weights[n].astype(np.float64) for n in ("conv_w", "a_log", "dt_bias", "norm_w")
        ]
        conv, delta = (np.array(part, np.float64) for part in state)
        return reference.gated_delta_net(
            *exact, *weights, key_heads=self.shape[0], value_heads=self.shape[1], eps=EPS,
            conv=conv, delta=delta,
        )  # fmt: skip


def group_of(value_dim: int) -> int:
    """Return the group in which outputs are rounded: only whole ones of a head are."""
    return 0 if value_dim % 32 else 32


def functions(shape: tuple[int, int, int, int], isa: Any) -> dict[str, Any]:
    _, value_heads, _, value_dim = shape
    group = group_of(value_dim)
    return {
        "delta": gated_delta(*shape, TAPS, EPS, 0, isa, group=group),
        "decode": gated_delta_decode(*shape, TAPS, EPS, 0, isa, group=group),
        "round": quantize_rows(value_heads * value_dim, 32, isa),
    }


@pytest.fixture(scope="module", params=EACH_ISA)
def isa(request: Any) -> Isa:
    return request.param


@pytest.fixture(scope="module", params=CASES, ids=str)
def net(request: Any, isa: Isa) -> Net:
    key_heads, value_heads, key_dim, value_dim = shape = request.param
    channels, tokens = 2 * key_heads * key_dim + value_heads * value_dim, 40 + max(LENGTHS)
    rng = np.random.default_rng(sum(shape))
    widths = {"qkv": channels, "z": value_heads * value_dim, "b": value_heads, "a": value_heads}
    arrays = {n: rng.normal(size=(tokens, w)).astype(np.float32) for n, w in widths.items()}
    weights = {
        "conv_w": rng.normal(size=(channels, 1, TAPS)) * 0.5,
        "a_log": np.log(rng.uniform(0.05, 8, value_heads)),
        "dt_bias": rng.normal(size=value_heads),
        "norm_w": 1 + 0.2 * rng.normal(size=value_dim),
    }
    single = {name: weight.astype(np.float32) for name, weight in weights.items()}
    return Net(shape, isa, build_kernels(functions(shape, isa), isa), arrays, single)


@pytest.mark.parametrize("start", [0, 40])
def test_runs_of_every_length(net: Net, start: int) -> None:
    for count in LENGTHS:
        state = net.empty()
        if start:
            net.run(state, 0, start, "sequence")
        want, conv, delta = net.expected(start, start + count, state)
        got = net.run(state, start, start + count, "sequence")
        assert_close(got, want, 1e-7, count)
        assert_close(state[0], conv, 1e-7, count)
        assert_close(state[1], delta, 1e-7, count)


def test_steps_continue_a_run(net: Net) -> None:
    state = net.empty()
    net.run(state, 0, 33, "sequence")
    for token in range(33, 60):
        want, _, delta = net.expected(token, token + 1, state)
        assert_close(net.run(state, token, token + 1, "batch"), want, 1e-7, token)
        assert_close(state[1], delta, 1e-7, token)


@pytest.mark.parametrize("first", [0, 5, 40])
def test_cuts_at_multiples_of_the_chunk_change_no_bit(net: Net, first: int) -> None:
    """Positions count, not rows of a call; what is left behind the last cut may be short or long."""
    for end in (65, 66, 71, 72, 100, 130):
        whole, cut = net.empty(), net.empty()
        for state in (whole, cut):
            if first:
                net.run(state, 0, first, "sequence")
        want = net.run(whole, first, end, "sequence")
        borders = [first, *(at for at in (32, 64, 128) if first < at < end), end]
        parts = [net.run(cut, a, b, "sequence") for a, b in itertools.pairwise(borders)]
        assert np.array_equal(np.concatenate(parts), want)
        assert all(np.array_equal(*pair) for pair in zip(cut, whole, strict=True))


def test_few_rows_of_a_chunk_equal_steps(net: Net) -> None:
    for start, end in ((0, 32 + SHORT_RUN - 1), (32 - SHORT_RUN + 1, 32 + SHORT_RUN - 1), (40, 43)):
        run, steps = net.empty(), net.empty()
        for state in (run, steps):
            if start:
                net.run(state, 0, start, "sequence")
        rest = start if start else 32
        if not start:
            net.run(steps, 0, rest, "sequence")
        want = [net.run(steps, token, token + 1, "batch") for token in range(rest, end)]
        got = net.run(run, start, end, "sequence")
        assert np.array_equal(got[rest - start :], np.concatenate(want))
        assert all(np.array_equal(*pair) for pair in zip(run, steps, strict=True))


def test_results_do_not_depend_on_threads(net: Net) -> None:
    results = []
    for split in ((1, 1), (2, 2), (3, 3), (2, 4), (1, 3)):
        state = net.empty()
        rows = [net.run(state, 0, 70, "sequence", *split), net.run(state, 70, 71, "batch", *split)]
        results.append(np.concatenate([*rows, state[1].reshape(-1, rows[0].shape[1])]))
    assert all(np.array_equal(results[0], result) for result in results)


@pytest.mark.skipif(detect() is V4, reason="the tests above ran them")
def test_wide_vectors_compile() -> None:
    assert build_kernels(functions((2, 4, 32, 48), V4), V4).code.startswith(b"\x7fELF")
