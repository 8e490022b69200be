"""The kernels of a vision tower against float64: bytes, positions, norms, biases and GELU, attention to all.

Rounded results are compared with the exact ones of the same kernel, rounded: no value may be rounded twice or otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import V4, V4_BF16
from q35c.codegen.cpu.kernels.attention.picture import (
    cell_words,
    padded_dims,
    picture_attention,
    picture_prepare,
    picture_shape,
)
from q35c.codegen.cpu.kernels.linear.biased import linear_bias
from q35c.codegen.cpu.kernels.rows.layer_norm import layer_norm
from q35c.codegen.cpu.kernels.rows.picture import interpolate_rows, scale_pixels
from q35c.codegen.cpu.kernels.rows.rotary import axial_rotary_table
from q35c.ir import reference
from q35c.layouts.rows import bf16_row_words
from tests.kernels.harness import (
    BEST,
    EACH_ISA,
    ISA,
    Kernels,
    assert_close,
    build_kernels,
    compile_only,
    from_bf16,
    guard,
    pack_formatted,
    stored,
    to_bf16,
)

WIDTHS = (16, 48, 96, 1152)
PIXELS = (1, 27, 96, 1536)
TOKENS = (1, 2, 3, 7, 33, 64, 130)
EPS, SCALE, SHIFT = 1e-6, 1 / 127.5, -1.0
FREQUENCIES = {9: (1.0, 0.3, 0.01), 18: (1.0, 0.5, 0.25, 0.125)}


@dataclass(frozen=True)
class Biased:
    """A linear with a bias: outputs, inputs, format of the weights, kind of rows, epilogue."""

    N: int
    K: int
    dtype: str
    rows: str
    epilogue: str

    def __str__(self) -> str:
        return f"{self.epilogue}_{self.N}_{self.K}_{self.dtype}_{self.rows}"


EPILOGUES = ("bias", "gelu_tanh", "gelu_erf", "bias_residual")
LINEARS = [
    *(Biased(46, 65, "f32", "f32", epilogue) for epilogue in EPILOGUES),
    *(Biased(98, 77, "bf16", "bf16", epilogue) for epilogue in EPILOGUES),
    Biased(16, 48, "f32", "f32", "bias"),
    Biased(320, 256, "bf16", "bf16", "gelu_tanh"),
]


def row_element(isa: Isa) -> type:
    return np.uint16 if isa.offers("dot2_bf16") else np.float32


class Result:
    """Rows that a kernel writes, f32 or rounded to bf16, between guards and poisoned."""

    def __init__(self, tokens: int, width: int, form: str, isa: Isa) -> None:
        self.width, self.form = width, form
        self.is_paired = form == "bf16" and isa.offers("dot2_bf16")
        self.words = bf16_row_words(width, self.is_paired) if form == "bf16" else width + 3
        dtype = np.uint16 if self.is_paired else np.float32
        columns = self.words * (2 if self.is_paired else 1)
        self.array = guard(np.zeros((tokens, columns), dtype), poison=True)
        self._before = self.array.copy()

    @property
    def values(self) -> np.ndarray:
        """Return the rows in f32, and fail if something behind them was written."""
        end = self.width + self.width % 2 if self.is_paired else self.width
        behind = (a[:, end:].tobytes() for a in (self.array, self._before))
        assert len(set(behind)) == 1, "columns past the row changed"
        if self.is_paired and self.width % 2:
            assert not self.array[:, self.width].any(), "an odd last value shares its word"
        rows = np.array(self.array[:, : self.width])
        return from_bf16(rows) if self.is_paired else rows


def round_rows(x: np.ndarray) -> np.ndarray:
    return from_bf16(to_bf16(x))


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request) -> Kernels:
    isa, functions = request.param, {}
    for form in ("f32", "bf16"):
        functions |= {f"norm{d}_{form}": layer_norm(d, EPS, isa, form) for d in WIDTHS}
        functions |= {f"pixels{k}_{form}": scale_pixels(k, SCALE, SHIFT, isa, form) for k in PIXELS}
        for case in LINEARS:
            functions[f"{case}_{form}"] = linear_bias(
                case.N, case.K, case.dtype, case.epilogue, isa, case.rows, form
            )
    functions |= {f"rows{d}": interpolate_rows(d, 9, 4, isa) for d in WIDTHS}
    functions |= {f"table{n}": axial_rotary_table(f) for n, f in FREQUENCIES.items()}
    return build_kernels(functions, isa)


def in_both_forms(
    kernels: Kernels, name: str, tokens: int, width: int, *arguments, behind: tuple = ()
) -> np.ndarray:
    """Call a kernel for f32 and for rounded rows, with 1, 2 and 3 threads; return the exact ones."""
    strides = [a for a in arguments if isinstance(a, int)]
    arrays = [a for a in arguments if not isinstance(a, int)]
    made = {}
    for form in ("f32", "bf16"):
        results = []
        for threads in (1, 2, 3):
            y = Result(tokens, width, form, kernels.isa)
            words = [tokens, *strides, y.words, *(s for s in behind if isinstance(s, int))]
            extra = [a for a in behind if not isinstance(a, int)]
            kernels.call(f"{name}_{form}", *arrays, y.array, *extra, *words, threads=threads)
            results.append(y.values)
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
        made[form] = results[0]
    np.testing.assert_array_equal(made["bf16"], round_rows(made["f32"]))
    return made["f32"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(kernels, width, tokens):
    rng = np.random.default_rng(width + tokens)
    ld_x = width + tokens % 3
    x = guard(rng.normal(5, 3, (tokens, ld_x)).astype(np.float32))
    w, b = (guard(rng.normal(0, 1, width).astype(np.float32)) for _ in range(2))
    got = in_both_forms(kernels, f"norm{width}", tokens, width, x, w, b, ld_x)
    wide = (a.astype(np.float64) for a in (x[:, :width], w, b))
    assert_close(got, reference.layer_norm(*wide, EPS))


def test_layer_norm_far_from_zero(kernels):
    """Differences from a mean of 1000 keep their digits."""
    x = 1000 + np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    one, zero = (guard(np.full(96, v, np.float32)) for v in (1, 0))
    got = in_both_forms(kernels, "norm96", 5, 96, guard(x), one, zero, 96)
    assert_close(got, reference.layer_norm(x.astype(np.float64), one, zero, EPS), 1e-8)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", PIXELS)
def test_pixels(kernels, width, tokens):
    x = guard(np.random.default_rng(width).integers(0, 256, (tokens, width)).astype(np.uint8))
    got = in_both_forms(kernels, f"pixels{width}", tokens, width, x)
    np.testing.assert_allclose(got, x.astype(np.float64) * SCALE + SHIFT, atol=2e-7)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_linear_with_a_bias(kernels, case, tokens):
    rng = np.random.default_rng(case.N + tokens)
    weight = rng.normal(0, case.K**-0.5, (case.N, case.K)).astype(np.float32)
    exact = rng.normal(0, 2, (tokens, case.K)).astype(np.float32)
    if case.rows == "bf16":
        exact = round_rows(exact)
    x, ld_x = stored_rows(exact, case.rows, kernels.isa)
    bias = guard(rng.normal(0, 1, case.N).astype(np.float32))
    r = guard(rng.normal(0, 1, (tokens, case.N + 5)).astype(np.float32))
    is_residual = case.epilogue.endswith("residual")
    behind = (r, case.N + 5) if is_residual else ()
    w = pack_formatted(weight, case.dtype)
    got = in_both_forms(kernels, str(case), tokens, case.N, w, bias, x, ld_x, behind=behind)
    want = exact.astype(np.float64) @ stored(weight, case.dtype).T + bias
    if case.epilogue.startswith("gelu"):
        want = reference.gelu(want, case.epilogue.removeprefix("gelu_"))
    assert_close(got, want + r[:, : case.N] if is_residual else want, 1e-12)


def stored_rows(x: np.ndarray, form: str, isa: Isa) -> tuple[np.ndarray, int]:
    """Return rows as a product reads them, behind them NaN, and their stride in words."""
    result = Result(len(x), x.shape[1], form, isa)
    result.array[:, : x.shape[1]] = to_bf16(x) if result.is_paired else x
    if result.is_paired and x.shape[1] % 2:
        result.array[:, x.shape[1]] = 0
    return result.array, result.words


def test_gelu_at_the_edges(kernels):
    """Huge, tiny and far out: no NaN, zero far below, the value itself far above."""
    x = np.array([-1e30, -90, -13, -5, -1e-30, 0, 1e-30, 4, 13, 90, 1e30], np.float32)
    rows = np.zeros((len(x), 65), np.float32)
    rows[:, 0] = x
    weight = np.zeros((46, 65), np.float32)
    weight[:, 0] = 1
    arguments = (pack_formatted(weight, "f32"), guard(np.zeros(46, np.float32)), guard(rows))
    for form in ("tanh", "erf"):
        y = Result(len(x), 46, "f32", kernels.isa)
        case = Biased(46, 65, "f32", "f32", f"gelu_{form}")
        kernels.call(f"{case}_f32", *arguments, y.array, len(x), 65, y.words)
        with np.errstate(over="ignore"):
            want = reference.gelu(x.astype(np.float64), form)
        np.testing.assert_allclose(y.values[:, 0], want, rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_interpolated_rows(kernels, width, tokens):
    rng = np.random.default_rng(width + tokens)
    table = guard(rng.normal(size=(9, width)).astype(np.float32))
    taps = guard(rng.integers(0, 9, (tokens, 4)).astype(np.int32))
    weights = guard(rng.random((tokens, 4)).astype(np.float32))
    results = []
    for threads in (1, 2, 3):
        y = Result(tokens, width, "f32", kernels.isa)
        kernels.call(
            f"rows{width}", table, taps, weights, y.array, tokens, y.words, threads=threads
        )
        results.append(y.values)
    assert_close(results[0], reference.interpolate_rows(table.astype(np.float64), taps, weights))
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("number", FREQUENCIES)
def test_axial_table(kernels, number):
    places = guard(np.random.default_rng(0).integers(0, 1000, (37, 2)).astype(np.int32))
    want = reference.axial_rotary_table(places, FREQUENCIES[number])
    for threads in (1, 2, 3):
        table = guard(np.zeros(want.shape, np.float32), poison=True)
        kernels.call(f"table{number}", places, table, 37, threads=threads)
        np.testing.assert_allclose(table, want, atol=1e-6)


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Heads, their dims, the type of keys and values, and the instruction set."""

    H: int
    D: int
    dtype: str = "f32"
    isa: Isa = ISA

    def __str__(self) -> str:
        return f"{self.H}x{self.D} {self.dtype} {self.isa.name}"

    @property
    def is_paired(self) -> bool:
        return self.dtype == "bf16" and self.isa.offers("dot2_bf16")


CELLS = 192
needs_pairs = pytest.mark.skipif(not BEST.offers("dot2_bf16"), reason="needs AVX512-BF16")
HEADS = [
    Heads(2, 72),
    Heads(3, 64),
    Heads(2, 72, isa=BEST),
    Heads(1, 16, isa=BEST),
    Heads(2, 40, "bf16"),
    *(
        pytest.param(Heads(*shape, "bf16", V4_BF16), marks=needs_pairs)
        for shape in ((2, 72), (3, 64), (1, 128))
    ),
]


@functools.cache
def attention_kernels(heads: Heads) -> Kernels:
    shape = {"H": heads.H, "D": heads.D, "kv_dtype": heads.dtype, "cells": CELLS, "isa": heads.isa}
    functions = {
        f"attend_{form}": picture_attention(**shape, result=form) for form in ("f32", "bf16")
    }
    functions["prepare"] = picture_prepare(**shape, scale=heads.D**-0.5)
    return build_kernels(functions, heads.isa)


def attend(heads: Heads, qkv: np.ndarray, table: np.ndarray, form: str, threads: int, parts: int):
    """Run both kernels on cells that hold NaN before."""
    tokens, (H, D), kernels = len(qkv), (heads.H, heads.D), attention_kernels(heads)
    shape = picture_shape(H, D, heads.dtype, CELLS, heads.isa)
    words = cell_words(H, D, heads.dtype, heads.isa) * CELLS
    cells = guard(np.zeros(words, np.int32), poison=True)
    q = guard(np.zeros((tokens, H * padded_dims(D)), np.float32), poison=True)
    scratch = guard(np.zeros(threads * shape.task_words, np.float32), poison=True)
    y = Result(tokens, H * D, form, heads.isa)
    options = {"threads": threads, "parts": parts}
    kernels.call("prepare", guard(qkv), guard(table), q, cells, tokens, qkv.shape[1], **options)
    kernels.call(f"attend_{form}", q, cells, y.array, scratch, tokens, y.words, **options)
    return y.values


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65, 100, 129, 192])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_to_all(heads, tokens):
    rng = np.random.default_rng(heads.D + tokens)
    qkv = rng.normal(0, 1.5, (tokens, 3 * heads.H * heads.D + 7)).astype(np.float32)
    places = rng.integers(0, 40, (tokens, 2))
    table = reference.axial_rotary_table(places, 1e4 ** -(np.arange(heads.D // 4) / heads.D * 4))
    results = [attend(heads, qkv, table, "f32", *how) for how in ((1, 0), (2, 0), (3, 7))]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
    wide = (a.astype(np.float64) for a in (qkv[:, : 3 * heads.H * heads.D], table))
    want = reference.picture_attention(*wide, heads=heads.H, scale=heads.D**-0.5)
    assert_close(results[0], want, 5e-5 if heads.is_paired else 1e-7)
    rounded = attend(heads, qkv, table, "bf16", 2, 0)
    np.testing.assert_array_equal(rounded, round_rows(results[0]))


def test_avx512_forms_compile():
    compile_only(layer_norm(768, EPS, V4), V4, "zmm")
    compile_only(picture_attention(2, 72, "bf16", 64, V4_BF16, "bf16"), V4_BF16, "zmm")
    compile_only(linear_bias(96, 64, "bf16", "gelu_tanh", V4_BF16, "bf16", "bf16"), V4_BF16, "zmm")
