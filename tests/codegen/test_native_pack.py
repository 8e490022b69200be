"""The compiled packer does what `pack_blocks` defines, on row lengths around every edge."""

import numpy as np
import pytest

from q35c.codegen.cpu.native_pack import packer
from q35c.codegen.pack import PackedWeight, pack_blocks
from q35c.formats.registry import integer_format, largest_value, stored
from q35c.layouts.weights import block_shape
from q35c.runtime.cpu.library import Library

# Of a format the lengths: below, at, beside and above a whole group, and a long one.
LENGTHS = {
    "i4g32": (1, 31, 64, 129),
    "i4g128": (32, 100, 129, 320),
    "i5g32": (1, 32, 129),
    "i5g64": (31, 64, 129, 320),
    "i8g64": (32, 100, 129),
}
FORMATS = tuple(LENGTHS)


def weight_of(inputs: int, dtype: str) -> PackedWeight:
    return PackedWeight("w", "linear", dtype, ("source",), ((96, inputs),))


@pytest.fixture(scope="module")
def pack():
    weights = [weight_of(inputs, dtype) for dtype in FORMATS for inputs in LENGTHS[dtype]]
    return packer(weights, Library)


@pytest.mark.parametrize(("dtype", "inputs"), [(d, n) for d in FORMATS for n in LENGTHS[d]])
def test_packer(pack, inputs: int, dtype: str) -> None:
    rng = np.random.default_rng(inputs)
    rows = rng.standard_normal((96, inputs)).astype(np.float32) * np.float32(0.02)
    rows[3] = 0
    rows[4] *= np.float32(1e-12)
    rows[5, :] = np.abs(rows[5])
    rows[6] = rng.uniform(-1, 1, inputs)  # no scale that is tried first keeps to LARGEST_SUM
    rows[7] = 0.3
    got, want = pack(rows, dtype), pack_blocks(rows, dtype)
    form = integer_format(dtype)
    assert form is not None
    assert got.shape == want.shape == (3, *block_shape(dtype, inputs))
    # Two scales with the same error but for rounding may be taken for one another: a group in thousands.
    assert (got != want).any(-1).mean() <= 0.01


@pytest.mark.parametrize("dtype", FORMATS)
def test_packer_agrees_on_every_magnitude(pack, dtype: str) -> None:
    """The smallest, the largest that `largest_value` lets through, and denormal ones between them."""
    rng = np.random.default_rng(9)
    exponents = np.linspace(-148, np.log2(largest_value(dtype)), 96).astype(int)
    rows = np.clip(rng.standard_normal((96, 129)), -1, 1) * 2.0 ** exponents[:, None]
    rows = rows.astype(np.float32)
    rows[:, ::7] = np.float32(2.0**-130)
    np.testing.assert_array_equal(pack(rows, dtype), pack_blocks(rows, dtype))
    form = integer_format(dtype)
    assert form is not None
    kept = stored(rows, dtype)
    error = np.abs(kept - rows).max(-1) / np.abs(rows).max(-1)
    is_normal = exponents > -118  # a scale is 2^-126 at least
    assert error[is_normal].max() < {4: 0.25, 5: 0.15, 8: 0.07}[form.bits]


def test_floating_rows_need_no_compiled_packer() -> None:
    rows = np.ones((32, 7), np.float32)
    pack = packer([weight_of(7, "bf16")], Library)
    np.testing.assert_array_equal(pack(rows, "bf16"), pack_blocks(rows, "bf16"))
