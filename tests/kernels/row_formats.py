"""What activations are to a product: rows stored in one of three formats, and the values that stored rows stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.rows.round_bf16 import round_rows
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows, row_layout
from q35c.layouts.rows import IntegerRow, bf16_row_words
from tests.kernels.harness import Kernels, guard


@dataclass(frozen=True)
class ExactRows:
    """Rows of f32 as they are."""

    isa: Isa
    unit = 1  # rows may begin this many words apart

    def function(self, width: int, pairs: int = 1) -> dict[str, PrimFunc]:
        """Return the kernel that stores such rows, if there is one, by its name."""
        return {}

    def store(
        self, kernels: Kernels, x: np.ndarray, width: int, *, extra: int = 0, threads: int = 1, pairs: int = 1
    ) -> np.ndarray:  # fmt: skip
        """Return stored rows, `extra` words apart; what is not written is poison."""
        stored = guard(np.zeros((len(x), width + extra), np.float32), poison=True)
        stored[:, :width] = x[:, :width]
        return stored

    def values(self, stored: np.ndarray, width: int) -> np.ndarray:
        """Return the float64 values that stored rows stand for."""
        return np.array(stored[:, :width], np.float64)


@dataclass(frozen=True)
class Bf16Rows:
    """Rows rounded to bf16: pairs where there are instructions for them, else f32."""

    isa: Isa
    unit = 16

    def function(self, width: int, pairs: int = 1) -> dict[str, PrimFunc]:
        return {f"bf16_{width}_{pairs}": round_rows(width, self.isa, pairs=pairs)}

    def store(
        self, kernels: Kernels, x: np.ndarray, width: int, *, extra: int = 0, threads: int = 1, pairs: int = 1
    ) -> np.ndarray:  # fmt: skip
        words = bf16_row_words(width, self.isa.offers("dot2_bf16")) + extra
        stored = guard(np.zeros((len(x), words), np.int32), poison=True)
        strides = (len(x) // pairs, x.shape[1], words)
        kernels.call(f"bf16_{width}_{pairs}", x, stored, *strides, threads=threads)
        return stored

    def values(self, stored: np.ndarray, width: int) -> np.ndarray:
        words = np.array(stored)
        if not self.isa.offers("dot2_bf16"):
            return words.view(np.float32)[:, :width].astype(np.float64)
        halves = words.view(np.uint16)
        assert (halves[:, width : width + width % 2] == 0).all(), "an odd row ends in half a pair"
        exact = (halves[:, :width].astype(np.uint32) << 16).view(np.float32)
        return exact.astype(np.float64)


@dataclass(frozen=True)
class Int8Rows:
    """Rows rounded to int8 with a scale for each group, the sums of the groups beside them."""

    isa: Isa
    group: int
    unit = 16

    def layout(self, width: int) -> IntegerRow:
        return row_layout(width, self.group, self.isa)

    def function(self, width: int, pairs: int = 1) -> dict[str, PrimFunc]:
        name = f"int8_{width}_{self.group}_{pairs}"
        return {name: quantize_rows(width, self.group, self.isa, pairs=pairs)}

    def store(
        self, kernels: Kernels, x: np.ndarray, width: int, *, extra: int = 0, threads: int = 1, pairs: int = 1
    ) -> np.ndarray:  # fmt: skip
        words = self.layout(width).words + extra
        stored = guard(np.zeros((len(x), words), np.int32), poison=True)
        strides = (len(x) // pairs, x.shape[1], words)
        name = f"int8_{width}_{self.group}_{pairs}"
        kernels.call(name, x, stored, *strides, threads=threads)
        return stored

    def values(self, stored: np.ndarray, width: int) -> np.ndarray:
        """Check the sums, too."""
        words, layout = np.array(stored), self.layout(width)
        codes = words[:, : layout.scales].view(np.int8).astype(np.float64)
        scales = words[:, layout.scales : layout.sums].copy().view(np.float32).astype(np.float64)
        sums = words[:, layout.sums : layout.sums + layout.groups]
        assert (codes[:, width:] == 0).all()
        grouped = codes.reshape(len(words), layout.groups, self.group)
        np.testing.assert_array_equal(sums, -32 * grouped.sum(-1))
        if not self.isa.offers("dot4_u8s8"):
            halves = codes.reshape(len(words), -1, 8, 2, 2).sum((2, 4)).astype(np.int64)
            starts = words[:, layout.starts : layout.used_words].copy().view(np.int16)
            want = (-32 * halves).astype(np.int16).reshape(len(words), -1)
            np.testing.assert_array_equal(starts, want)
        return (grouped * scales[..., None]).reshape(len(words), -1)[:, :width]


Rows = ExactRows | Bf16Rows | Int8Rows
