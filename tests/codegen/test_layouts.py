"""Layouts by name: what a backend chooses, what kernels use and what the reader recomputes are the same."""

from __future__ import annotations

from typing import get_args

import pytest

from q35c.codegen.cpu.backend import find_cpu
from q35c.codegen.cpu.isa.x86 import ISAS
from q35c.codegen.cpu.kernels.rows.round_int8 import row_layout
from q35c.codegen.requests import Shared
from q35c.errors import LoweringError
from q35c.layouts.rows import RowLayout, bf16_row_words, row_words
from q35c.layouts.weights import packed_shape

WIDTHS = (1, 48, 64, 100, 1024)


@pytest.mark.parametrize("level", ISAS)
def test_rows_are_as_wide_as_kernels_make_them(level: str) -> None:
    backend = find_cpu(level)
    shared = Shared(backend, 64, 1, {})
    for width in WIDTHS:
        for group in (32, 64, 128):
            expected = row_layout(width, group, backend.isa).words
            assert shared.row_words(f"q8g{group}", width) == expected
        assert shared.row_words("bf16", width) == bf16_row_words(
            width, backend.isa.offers("dot2_bf16")
        )
        assert shared.row_words("f32", width) == shared.row_words("i32", width) == width
    assert set(shared.row_layouts) == {"q8g32", "q8g64", "q8g128", "bf16"}


@pytest.mark.parametrize("layout", get_args(RowLayout))
def test_a_layout_of_rows_holds_one_type(layout: RowLayout) -> None:
    is_integer = layout.startswith("int8")
    assert (row_words(layout, "q8g64", 64) is not None) == is_integer
    assert (row_words(layout, "bf16", 64) is not None) == (not is_integer)
    for dtype in ("f32", "i8g64", "q8g63", ""):
        assert row_words(layout, dtype, 64) is None


def test_a_backend_with_a_wrong_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(find_cpu("x86-64-v3")), "row_layout", lambda *_: "bf16-pairs")
    with pytest.raises(LoweringError, match="holds no such rows"):
        Shared(find_cpu("x86-64-v3"), 64, 1, {}).row_words("q8g64", 64)


@pytest.mark.parametrize(
    ("layout", "form", "matrix", "expected"),
    [
        ("vector", "f32", (5, 7, 2), ("f32", (5, 7, 2))),
        ("vector", "i8g64", (64,), None),
        ("conv", "f32", (96, 4), ("f32", (4, 96))),
        ("conv", "f32", (96, 1, 4), None),
        ("conv", "i4g64", (96, 4), None),
        ("linear", "f32", (33, 7), ("f32", (2, 7, 32))),
        ("linear", "bf16", (32, 7), ("bf16", (1, 4, 32, 2))),
        # Exponents, a line of scales for two groups, 64 inputs of 4 bits for 32 rows each.
        ("linear", "i4g64", (32, 128), ("u8", (1, 64 + 64 + 2 * 32 * 32))),
        ("linear", "q8g64", (32, 128), None),
        ("linear", "i4g63", (32, 128), None),
        ("linear", "f32", (32,), None),
        ("swiglu", "f32", (34, 7), ("f32", (2, 7, 32))),
        ("swiglu", "f32", (33, 7), None),
        ("experts", "f32", (3, 33, 7), ("f32", (3, 2, 7, 32))),
        ("experts_swiglu", "bf16", (3, 34, 7), ("bf16", (3, 2, 4, 32, 2))),
        ("experts_swiglu", "bf16", (34, 7), None),
    ],
)
def test_the_shape_in_the_file(layout, form, matrix, expected) -> None:
    assert packed_shape(layout, form, matrix) == expected
