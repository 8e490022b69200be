"""Linear layers against float64: shapes around every tile edge, each precision and epilogue."""

import numpy as np
import pytest
from harness import (
    EACH_ISA,
    assert_close,
    build_kernels,
    compile_only,
    guard,
    pack_rows,
    pack_swiglu,
    stored,
)

from q35c.codegen.cpu.isa.x86 import V4
from q35c.codegen.cpu.kernels.linear.linear import linear

SHAPES = ((1, 1), (31, 3), (47, 65), (98, 77), (256, 320))
TOKENS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 23, 50, 130)
EPILOGUES = ("none", "residual", "swiglu")
DTYPES = ("f32", "bf16")


def kernel_name(shape, dtype, epilogue):
    return f"{dtype}_{epilogue}_{shape[0]}_{shape[1]}"


def columns(shape, epilogue):
    """Rows of W: an odd N has no gate and up halves, so swiglu takes twice as many."""
    return shape[0] * 2 if epilogue == "swiglu" else shape[0]


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request):
    isa = request.param
    cases = [(s, d, e) for s in SHAPES for d in DTYPES for e in EPILOGUES]
    return build_kernels(
        {kernel_name(s, d, e): linear(columns(s, e), s[1], d, e, isa) for s, d, e in cases}, isa
    )


class Case:
    """Random operands of one linear and its float64 result."""

    def __init__(self, shape, dtype, epilogue, tokens):
        outputs, inputs = shape
        rng = np.random.default_rng(outputs * 1000 + inputs * 10 + tokens)
        self.tokens, self.outputs, self.epilogue = tokens, outputs, epilogue
        self.ld_x, self.ld_y, self.ld_r = inputs + tokens % 3, outputs + tokens % 4, outputs + 5
        self.name = kernel_name(shape, dtype, epilogue)
        self.x = guard(rng.normal(size=(tokens, self.ld_x)).astype(np.float32))
        self.r = guard(rng.normal(size=(tokens, self.ld_r)).astype(np.float32))
        weight = rng.normal(size=(columns(shape, epilogue), inputs)).astype(np.float32)
        if epilogue == "swiglu":
            self.w = guard(pack_swiglu(weight[:outputs], weight[outputs:], dtype))
        else:
            self.w = guard(pack_rows(weight, dtype))
        self.expected = self._reference(
            self.x[:, :inputs].astype(np.float64), stored(weight, dtype)
        )

    def _reference(self, x, weight):
        product = x @ weight.T
        if self.epilogue == "residual":
            return product + self.r[:, : self.outputs]
        if self.epilogue == "swiglu":
            gate, up = product[:, : self.outputs], product[:, self.outputs :]
            return gate / (1 + np.exp(-gate)) * up
        return product

    def run(self, kernels, threads=1, rows=slice(None)):
        """Compute some rows; return the whole Y, poisoned where nothing was written."""
        x = guard(self.x[rows])
        tokens = x.shape[0]
        y = guard(np.zeros((tokens, self.ld_y), np.float32), poison=True)
        if self.epilogue == "residual":
            r = guard(self.r[rows])
            strides = (tokens, self.ld_x, self.ld_y, self.ld_r)
            kernels.call(self.name, self.w, x, y, r, *strides, threads=threads)
        else:
            strides = (tokens, self.ld_x, self.ld_y)
            kernels.call(self.name, self.w, x, y, *strides, threads=threads)
        beyond = np.ascontiguousarray(y[:, self.outputs :]).view(np.uint32)
        assert (beyond == 0xFFFFFFFF).all(), "columns past the row changed"
        return np.array(y[:, : self.outputs])


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(kernels, shape, dtype, epilogue):
    for tokens in TOKENS:
        case = Case(shape, dtype, epilogue, tokens)
        results = [case.run(kernels, threads) for threads in (1, 2, 3)]
        assert_close(results[0], case.expected, note=f"{tokens} tokens")
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(kernels, dtype, epilogue):
    case = Case((256, 320), dtype, epilogue, 60)
    together = case.run(kernels)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(20, 33), slice(59, 60)):
        assert case.run(kernels, rows=rows).tobytes() == together[rows].tobytes(), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_in_place(kernels, dtype):
    case = Case((98, 77), dtype, "residual", 13)
    y = guard(case.r)
    strides = (13, case.ld_x, case.ld_r, case.ld_r)
    kernels.call(case.name, case.w, case.x, y, y, *strides, threads=2)
    assert_close(y[:, :98], case.expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(kernels, dtype):
    case = Case((256, 320), dtype, "none", 20)
    case.x[7, 100] = np.nan
    y = case.run(kernels)
    assert np.isnan(y[7]).all()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_avx512_compiles(dtype, epilogue):
    assembly = compile_only(linear(200, 77, dtype, epilogue, V4), V4, "zmm")
    assert "vfmadd231ps" in assembly
