"""Linear layers against float64: weights of every format, the rows that they meet, every instruction set that runs here.

A case is a row of EVERY: the format of its weights, what its rows are, its shape and epilogue. AVX2 and the best of this
machine run all of them, the levels between those of BETWEEN.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pytest
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import ISAS, V3, V4, V4_BF16
from q35c.codegen.cpu.kernels.linear.linear import linear
from q35c.cpuinfo import processor_flags
from q35c.formats import integer, registry
from tests.kernels.harness import (
    BEST,
    EACH_ISA,
    FLOATS,
    Kernels,
    assert_close,
    build_kernels,
    compile_only,
    guard,
    pack_formatted,
    pack_rows,
    pack_swiglu,
    stored,
)
from tests.kernels.row_formats import Bf16Rows, ExactRows, Int8Rows, Rows

EPILOGUES = ("none", "residual", "swiglu")
SHAPES = ((1, 1), (31, 3), (47, 65), (98, 77), (256, 320))
TOKENS = {
    "exact": (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 23, 50, 130),
    "bf16": (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 23, 67),
    "int8": (1, 2, 3, 5, 8, 9, 15, 16, 23, 50, 71),
}
# A product of two bf16 values is exact in f32, so only the sums round, once for each input.
LIMITS = {"exact": 1e-7, "bf16": 1e-12, "int8": 1e-7}


@dataclass(frozen=True)
class Product:
    """One linear: Y [T, outputs] of X [T, inputs], rows of this kind, and a packed weight."""

    outputs: int
    inputs: int
    weight: str
    epilogue: str
    rows: str

    def __str__(self) -> str:
        return f"{self.rows}_{self.weight}_{self.epilogue}_{self.outputs}_{self.inputs}"

    @property
    def columns(self) -> int:
        """Rows of W: an odd N has no gate and up halves, so swiglu takes twice as many."""
        return self.outputs * (2 if self.epilogue == "swiglu" else 1)

    def row_format(self, isa: Isa) -> Rows:
        if self.rows == "int8":
            return Int8Rows(isa, registry.integer_format(self.weight).group)
        return Bf16Rows(isa) if self.rows == "bf16" else ExactRows(isa)

    def kernel(self, isa: Isa) -> PrimFunc:
        rows = "bf16" if self.rows == "bf16" else "f32"
        return linear(self.columns, self.inputs, self.weight, self.epilogue, isa, rows)


# An epilogue does the same to the sums of every shape: two shapes have all, the others one each.
PAIRS = [
    (shape, epilogue)
    for shape, epilogues in zip(
        SHAPES, (["none"], ["swiglu"], EPILOGUES, ["residual"], EPILOGUES), strict=True
    )
    for epilogue in epilogues
]
EVERY = [
    *(Product(*s, w, e, "exact") for s, e in PAIRS for w in FLOATS),
    *(Product(*s, "bf16", e, "bf16") for s, e in PAIRS),
    Product(1, 1, "i4g32", "none", "int8"),
    Product(47, 65, "i8g64", "none", "int8"),
    Product(98, 77, "i4g32", "residual", "int8"),
    Product(64, 128, "i4g128", "swiglu", "int8"),
    Product(100, 200, "i8g128", "swiglu", "int8"),
    Product(256, 320, "i4g64", "residual", "int8"),
    Product(256, 320, "i8g64", "none", "int8"),
    Product(130, 1024, "i4g128", "none", "int8"),
    Product(40, 1000, "i8g32", "none", "int8"),
    Product(17, 96, "i4g32", "swiglu", "int8"),
    Product(70, 150, "i5g64", "residual", "int8"),
    Product(96, 1056, "i5g128", "none", "int8"),
    Product(33, 32, "i5g32", "swiglu", "int8"),
]
LARGEST = [  # whole groups only; each width of a weight
    Product(256, 320, "i8g64", "none", "int8"),
    Product(130, 1024, "i4g128", "none", "int8"),
    Product(96, 1056, "i5g128", "none", "int8"),
]
# One shape at every edge of a tile, one odd, the large ones.
BETWEEN = [
    Product(47, 65, "bf16", "residual", "bf16"),
    Product(256, 320, "bf16", "swiglu", "bf16"),
    Product(1, 1, "i4g32", "none", "int8"),
    Product(98, 77, "i4g32", "residual", "int8"),
    Product(17, 96, "i4g32", "swiglu", "int8"),
    *LARGEST,
]
LARGE_ROWS = {  # products whose rows are compared with their neighbours
    *(p for p in EVERY if p.outputs == 256),
    Product(96, 1056, "i5g128", "none", "int8"),
}
UNCHANGED = {p for p in LARGE_ROWS if p.epilogue == "none" and p.outputs == 256}


def products_of(isa: Isa) -> list[Product]:
    return EVERY if isa in (V3, BEST) else BETWEEN


def on_every_isa(products: Collection[Product]) -> list:
    """Return parameters (isa, product): those of these products that an instruction set runs."""
    made = []
    for name, isa in ISAS.items():
        is_here = processor_flags().issuperset(isa.cpu_features)
        skip = pytest.mark.skipif(not is_here, reason=f"needs {name}")
        for product in products_of(isa):
            if product in products:
                made.append(pytest.param(isa, product, marks=skip, id=f"{name}-{product}"))
    return made


@functools.cache
def kernels_of(isa: Isa, rows: str) -> Kernels:
    """Build all products of one kind of rows, and what stores such rows."""
    functions = {}
    for product in products_of(isa):
        if product.rows == rows:
            functions[str(product)] = product.kernel(isa)
            functions |= product.row_format(isa).function(product.inputs)
    return build_kernels(functions, isa)


class Case:
    """Random operands of one linear and its float64 result on the values that are stored."""

    def __init__(self, isa: Isa, product: Product, tokens: int) -> None:
        self.product, self.kernels = product, kernels_of(isa, product.rows)
        self.rows = product.row_format(isa)
        rng = np.random.default_rng(product.outputs * 1000 + product.inputs * 10 + tokens)
        self.ld_y = product.outputs + tokens % 4
        self.store(rng.normal(size=(tokens, product.inputs)), extra=tokens % 3)
        self.r = guard(rng.normal(size=(tokens, product.outputs + 5)).astype(np.float32))
        self.pack(rng.normal(size=(product.columns, product.inputs)))

    def store(self, x: np.ndarray, extra: int = 0) -> None:
        """Take these rows, so many units apart."""
        x, inputs = guard(x.astype(np.float32)), self.product.inputs
        self.x = self.rows.store(self.kernels, x, inputs, extra=extra * self.rows.unit)

    def pack(self, weight: np.ndarray) -> None:
        """Take this weight, gate rows over up rows."""
        weight, dtype = weight.astype(np.float32), self.product.weight
        is_swiglu = self.product.epilogue == "swiglu"
        if dtype not in FLOATS:
            self.w = pack_formatted(weight, dtype, "swiglu" if is_swiglu else "linear")
        elif is_swiglu:
            self.w = guard(pack_swiglu(*np.split(weight, 2), dtype))
        else:
            self.w = guard(pack_rows(weight, dtype))
        self.weight = stored(weight, dtype)

    def expected(self) -> np.ndarray:
        outputs = self.product.outputs
        product = self.rows.values(self.x, self.product.inputs) @ self.weight.T
        if self.product.epilogue == "residual":
            return product + self.r[:, :outputs]
        if self.product.epilogue == "swiglu":
            gate, up = product[:, :outputs], product[:, outputs:]
            return gate / (1 + np.exp(-gate)) * up
        return product

    def run(self, threads: int = 1, rows: slice = slice(None)) -> np.ndarray:
        """Compute some rows; demand that nothing is written past them."""
        x, outputs = guard(self.x[rows]), self.product.outputs
        y = guard(np.zeros((len(x), self.ld_y), np.float32), poison=True)
        residual = [guard(self.r[rows])] if self.product.epilogue == "residual" else []
        strides = (len(x), x.shape[1], self.ld_y, *(r.shape[1] for r in residual))
        name = str(self.product)
        self.kernels.call(name, self.w, x, y, *residual, *strides, threads=threads)
        beyond = np.ascontiguousarray(y[:, outputs:]).view(np.uint32)
        assert (beyond == 0xFFFFFFFF).all(), "columns past the row changed"
        return np.array(y[:, :outputs])


@pytest.mark.parametrize(("isa", "product"), on_every_isa(EVERY))
def test_linear(isa: Isa, product: Product) -> None:
    for tokens in TOKENS[product.rows]:
        case = Case(isa, product, tokens)
        results = [case.run(threads) for threads in (1, 2, 3)]
        limit = LIMITS[product.rows]
        assert_close(results[0], case.expected(), limit, note=f"{tokens} tokens")
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize(("isa", "product"), on_every_isa(LARGE_ROWS))
def test_a_row_does_not_depend_on_its_neighbours(isa: Isa, product: Product) -> None:
    case = Case(isa, product, 70)
    together = case.run()
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(20, 33), slice(59, 60)):
        assert case.run(rows=rows).tobytes() == together[rows].tobytes(), rows


@pytest.mark.parametrize(("isa", "product"), on_every_isa(UNCHANGED))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row(isa: Isa, product: Product, value: float) -> None:
    case = Case(isa, product, 20)
    x = np.random.default_rng(0).normal(size=(20, product.inputs))
    x[7, 100] = value
    case.store(x)
    y = case.run()
    assert not np.isfinite(y[7]).any()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("weight", ["f32", "bf16"])
def test_residual_in_place(isa: Isa, weight: str) -> None:
    case = Case(isa, Product(98, 77, weight, "residual", "exact"), 13)
    y = guard(case.r)
    strides = (13, case.x.shape[1], y.shape[1], y.shape[1])
    case.kernels.call(str(case.product), case.w, case.x, y, y, *strides, threads=2)
    assert_close(y[:, :98], case.expected())


def largest_levels(form):
    """Return 32 levels of largest magnitude, the least level among them, so that they have the scale 1."""
    if form.bits == 8:
        return np.array([form.levels[0]] + [form.levels[-1]] * 31, np.float32)
    half = [form.levels[0]]
    while len(half) < 16:
        rest = integer.LARGEST_SUM - sum(map(abs, half))
        half.append(max(level for level in form.levels if level <= rest))
    assert sum(map(abs, half)) >= integer.LARGEST_SUM - 2
    return np.repeat(np.reshape(half, (8, 1, 2)), 2, 1).reshape(-1).astype(np.float32)


@pytest.mark.parametrize(("isa", "product"), on_every_isa(LARGEST))
def test_the_largest_products_do_not_overflow(isa: Isa, product: Product) -> None:
    """Every activation is 127 or -127, weights are as far from 0 as a format lets them, and no two products cancel."""
    form = registry.integer_format(product.weight)
    # 15 tokens: two tall tiles of AVX2, which share a panel, and one that unpacks for itself
    case = Case(isa, product, 15)
    # 31/16 is the largest that a scale's mantissa holds: as an integer, 3,968.
    weight = np.tile(
        largest_levels(form) * np.float32(31 / 16), (product.outputs, product.inputs // 32)
    )
    case.pack(weight)
    np.testing.assert_allclose(case.weight, weight)
    for sign in (1, -1):
        x = np.tile(np.sign(weight[0]) * sign, (15, 1))
        case.store(x)
        assert_close(case.run(), x @ case.weight.T)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("weight", ["f32", "bf16"])
def test_wide_registers_are_used(weight: str, epilogue: str) -> None:
    """AVX-512 code is compiled on every machine."""
    assert "vfmadd231ps" in compile_only(linear(200, 77, weight, epilogue, V4), V4, "zmm")


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_pairs_are_multiplied_where_there_is_an_instruction(epilogue: str) -> None:
    pairs = linear(200, 77, "bf16", epilogue, V4_BF16, "bf16")
    assert "vdpbf16ps" in compile_only(pairs, V4_BF16, "zmm")
    assert "vfmadd231ps" in compile_only(linear(200, 77, "bf16", epilogue, V4, "bf16"), V4, "zmm")
    exact = compile_only(linear(200, 77, "bf16", epilogue, V4_BF16), V4_BF16, "zmm")
    assert "vdpbf16ps" not in exact, "gates read f32 rows"
