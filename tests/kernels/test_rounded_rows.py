"""Rows rounded to bf16 and to int8, on every instruction set that runs here."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import V4_BF16
from q35c.codegen.cpu.kernels.rows.round_bf16 import round_rows
from q35c.formats import bf16, integer, registry
from tests.kernels.harness import (
    EACH_ISA,
    EVERY_ISA,
    Kernels,
    build_kernels,
    compile_only,
    guard,
    nmse,
)
from tests.kernels.row_formats import Bf16Rows, Int8Rows

WIDTHS = (1, 2, 3, 15, 16, 65, 127, 128, 300)
INT8 = (  # less than a group, whole ones, some with a rest
    (1, 32), (3, 32), (32, 32), (77, 32), (1000, 32), (64, 64), (65, 64), (320, 64), (128, 128), (200, 128),
)  # fmt: skip


@functools.cache
def kernels_of(isa: Isa) -> Kernels:
    formats = [(Bf16Rows(isa), width) for width in WIDTHS]
    formats += [(Int8Rows(isa, group), width) for width, group in INT8]
    functions = {}
    for rows, width in formats:
        functions |= rows.function(width)
    return build_kernels(functions, isa)


@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("width", WIDTHS)
def test_bf16_is_the_nearest(isa: Isa, width: int) -> None:
    rng, rows, kernels = np.random.default_rng(width), Bf16Rows(isa), kernels_of(isa)
    for tokens in (1, 2, 7):
        x = rng.normal(size=(tokens, width + 3)) * 10.0 ** rng.integers(-30, 30, (tokens, 1))
        x = guard(x.astype(np.float32))
        x.view(np.uint32)[0, 0] = 0x3F808000  # a tie: down to even
        if width > 2:
            x.view(np.uint32)[0, 1:3] = 0x3F818000, 0x7F7FFFFF  # up to even; up to infinity
        first = rows.store(kernels, x, width)
        want = bf16.round_bf16(np.array(x[:, :width]))
        assert rows.values(first, width).astype(np.float32).tobytes() == want.tobytes()
        for threads in (2, 3):
            assert rows.store(kernels, x, width, threads=threads).tobytes() == first.tobytes()
        used = width if not isa.offers("dot2_bf16") else -(-width // 2)
        assert (first[:, used:] == -1).all(), "words past the row changed"


@pytest.mark.parametrize("isa", EACH_ISA)
def test_what_is_no_number_stays_so(isa: Isa) -> None:
    patterns = [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF80FFFF, 0x7F800000, 0xFF800000]  # fmt: skip
    x = guard(np.tile(np.array(patterns, np.uint32).view(np.float32), (1, 2)))
    rows = Bf16Rows(isa)
    got = rows.values(rows.store(kernels_of(isa), x, 16), 16)[0]
    assert np.isnan(got[[0, 1, 2, 3, 4, 5]]).all()
    assert got[6] == np.inf and got[7] == -np.inf


def test_wide_registers_are_used() -> None:
    """AVX-512 code is compiled on every machine."""
    compile_only(round_rows(77, V4_BF16), V4_BF16, "zmm")


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("width", "group"), INT8)
def test_int8_is_the_nearest(isa: Isa, width: int, group: int) -> None:
    rng, rows, kernels = np.random.default_rng(width), Int8Rows(isa, group), kernels_of(isa)
    for tokens in (1, 4, 9):
        x = rng.normal(size=(tokens, width + 3)) * 10.0 ** rng.integers(-8, 8, (tokens, 1))
        x[0, : width // 2] = 0  # a group of zeros must not divide by zero
        x = guard(x.astype(np.float32))
        first = rows.store(kernels, x, width)
        got = rows.values(first, width)
        want = registry.round_rows(x[:, :width].astype(np.float64), f"q8g{group}")
        step = np.abs(integer.split_groups(x[:, :width], group)).max(-1) / 127
        wide = np.repeat(step, group, -1)[:, :width]
        assert (np.abs(got - x[:, :width]) <= 0.5001 * wide).all()
        assert nmse(got, want) <= 1e-5  # a tie may fall either way
        second = rows.store(kernels, x, width, threads=2)
        used = rows.layout(width).used_words
        assert np.array_equal(first[:, :used], second[:, :used])
