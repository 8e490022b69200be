"""RMS norm against float64."""

import numpy as np
import pytest

from q35c.codegen.cpu.isa.x86 import V4
from q35c.codegen.cpu.kernels.rows.norm import rms_norm
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows
from tests.kernels.harness import (
    EACH_ISA,
    RoundedRows,
    assert_close,
    build_kernels,
    compile_only,
    guard,
)

WIDTHS = (1, 7, 16, 33, 64, 72, 128, 1000, 1024, 2048)
BOTH = (16, 33)  # widths whose norms have offsets of 0 and of 1; the others have 1
ROUNDED = ((64, 32), (64, 64), (128, 32), (1024, 64), (2048, 128))  # widths and groups
TOKENS = (1, 2, 3, 5, 17, 64)
EPS = 1e-6


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request):
    isa = request.param
    functions = {
        f"norm{d}_{o}": rms_norm(d, EPS, float(o), isa) for d in WIDTHS for o in offsets(d)
    }
    for d, group in ROUNDED:
        for is_kept in (True, False):
            functions[f"rounding{d}_{group}_{is_kept}"] = rms_norm(d, EPS, 1.0, isa, group, is_kept)
        functions[f"round{d}_{group}"] = quantize_rows(d, group, isa)
    return build_kernels(functions, isa)


def offsets(width):
    return (0, 1) if width in BOTH else (1,)


def reference(x, w, offset):
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS) * (offset + w)


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(kernels, width):
    for tokens in TOKENS:
        for offset in offsets(width):
            check_norm(kernels, width, tokens, offset)


def check_norm(kernels, width, tokens, offset):
    rng = np.random.default_rng(width * 100 + tokens)
    ld_x, ld_y = width + tokens % 3, width + tokens % 5
    x = guard(rng.normal(0, 3, (tokens, ld_x)).astype(np.float32))
    w = guard(rng.normal(0, 1, width).astype(np.float32))
    results = []
    for threads in (1, 2, 3):
        y = guard(np.zeros((tokens, ld_y), np.float32), poison=True)
        before = y.copy()
        kernels.call(f"norm{width}_{offset}", x, w, y, tokens, ld_x, ld_y, threads=threads)
        assert y[:, width:].tobytes() == before[:, width:].tobytes(), "columns past the row changed"
        results.append(np.array(y[:, :width]))
    assert_close(results[0], reference(x[:, :width], w, offset), note=f"{tokens} tokens")
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize(("width", "group"), ROUNDED)
def test_norm_that_rounds(kernels, width, group):
    """Its bits are those of norm and rounding one after the other."""
    for tokens in TOKENS:
        check_rounding(kernels, width, group, tokens)


def check_rounding(kernels, width, group, tokens):
    rng = np.random.default_rng(width + tokens)
    ld_x = width + tokens % 3
    x = guard(rng.normal(0, 3, (tokens, ld_x)).astype(np.float32))
    w = guard(rng.normal(0, 1, width).astype(np.float32))
    want = guard(np.zeros((tokens, width), np.float32), poison=True)
    kernels.call(f"norm{width}_1", x, w, want, tokens, ld_x, width)
    for threads in (1, 2, 3):
        for is_kept in (True, False):
            y = guard(np.zeros((tokens, width), np.float32), poison=True)
            untouched, rounded = y.tobytes(), RoundedRows(tokens, width, group, kernels.isa)
            kernels.call(
                f"rounding{width}_{group}_{is_kept}", x, w, y, rounded.words,
                tokens, ld_x, width, rounded.words.shape[1], threads=threads,
            )  # fmt: skip
            rounded.check(kernels, want, f"round{width}_{group}")
            assert y.tobytes() == (want.tobytes() if is_kept else untouched)


def test_norm_in_place(kernels):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(9, 1000)).astype(np.float32), guard(np.ones(1000, np.float32))
    y = guard(x)
    kernels.call("norm1000_1", y, w, y, 9, 1000, 1000, threads=2)
    assert_close(y, reference(x, w, 1))


def test_norm_tiny_and_huge_rows(kernels):
    x = np.stack([np.full(64, 1e-30), np.full(64, 1e15), np.zeros(64)]).astype(np.float32)
    w, y = guard(np.ones(64, np.float32)), guard(np.zeros((3, 64), np.float32), poison=True)
    kernels.call("norm64_1", guard(x), w, y, 3, 64, 64)
    expected = reference(x, w, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)


def test_norm_avx512_compiles():
    compile_only(rms_norm(1000, EPS, 1.0, V4), V4, "zmm")
