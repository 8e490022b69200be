"""What storing does to weights: error bounds, zeros, NaN, and that storing twice changes nothing more."""

import numpy as np
import pytest

from q35c.formats import integer, registry
from q35c.formats.registry import integer_format

INTEGERS = [f"i{bits}g{group}" for bits in (4, 5, 8) for group in (32, 64, 128)]


def test_integer_formats_are_read_from_their_names():
    form = integer_format("i4g64")
    assert form is not None and (form.bits, form.group, form.zero_point) == (4, 64, 32)
    assert form.bits_per_weight == 4.125
    for other in ("f32", "bf16", "i32", "i4", "i4g48", "i6g64", "i4g64x"):
        assert integer_format(other) is None


@pytest.mark.parametrize("dtype", INTEGERS)
def test_error_is_small(dtype: str):
    form = integer_format(dtype)
    assert form is not None
    w = np.random.default_rng(0).standard_normal((64, 384)).astype(np.float32)
    error = np.sqrt(np.square(registry.stored(w, dtype) - w).mean())
    # Gaussian groups: 0.07 to 0.09 of a deviation in 4 bits, half of it in 5, a fourteenth in 8.
    assert error < {4: 0.095, 5: 0.048, 8: 0.008}[form.bits]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_searched_scale_is_not_worse_than_the_plain_one(dtype: str):
    form = integer_format(dtype)
    assert form is not None
    w = np.random.default_rng(1).standard_t(4, (200, 2 * form.group)).astype(np.float32)
    groups = integer.split_groups(w, form.group)
    exponents = integer.row_exponents(w, form)
    wanted = np.abs(groups).max(-1) / (form.zero_point - 1)
    scale = integer.scale_values(integer.scale_codes(wanted, exponents), exponents)
    plain = integer.nearest_levels(groups, scale, form) * scale[..., None]
    searched = integer.split_groups(registry.stored(w, dtype), form.group)
    errors = [np.square(groups - values).sum(-1) for values in (searched, plain)]
    assert errors[0].sum() <= errors[1].sum()


@pytest.mark.parametrize("dtype", [name for name in INTEGERS if not name.startswith("i8")])
def test_every_group_keeps_its_sums(dtype: str):
    """Even where no scale that is tried first does: the sums of 16 magnitudes are what 16 bits allow with int8 rows."""
    form = integer_format(dtype)
    assert form is not None
    assert integer.LARGEST_SUM * 127 < 1 << 15
    rng = np.random.default_rng(5)
    shape = (300, 2 * form.group)
    rows = {
        "normal": rng.standard_normal(shape),
        "even": rng.uniform(-1, 1, shape),
        "equal": np.ones(shape),
    }
    rows["all but equal"] = rng.choice([-1, 1], shape) * rng.uniform(0.97, 1, shape)
    for name, values in rows.items():
        w = values.astype(np.float32)
        levels, _, _ = integer.quantize_weight(w, form)
        halves = np.abs(levels.astype(int)).reshape(-1, 8, 2, 2).sum((1, 3))
        assert halves.max() <= integer.LARGEST_SUM, name
        assert np.square(registry.stored(w, dtype) - w).sum() <= 0.01 * np.square(w).sum(), name


def test_scales_are_rounded_to_the_nearest_that_is_stored():
    exponents, every = np.array([100]), np.arange(256, dtype=np.uint8)[None]
    scales = integer.scale_values(every, exponents)
    sizes = 2.0 ** (100 - 127) * np.ldexp(1 + np.arange(128) % 16 / 16, np.arange(128) // 16)
    np.testing.assert_array_equal(scales[0], np.concatenate([sizes, -sizes]).astype(np.float32))
    np.testing.assert_array_equal(integer.scale_codes(scales, exponents), every)
    between = np.random.default_rng(0).uniform(sizes[0] / 4, sizes[-1] * 2, (1, 1000))
    got = integer.scale_values(integer.scale_codes(between, exponents), exponents)[0]
    nearest = np.abs(between[0][:, None] - sizes).min(1)
    np.testing.assert_allclose(np.abs(between[0] - got), nearest, rtol=1e-3)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_row_uses_the_upper_half_of_its_scales(dtype: str):
    """Its largest magnitude fits without clipping, whatever it is; less would waste exponents."""
    form = integer_format(dtype)
    assert form is not None
    top = np.random.default_rng(3).uniform(1, 4, (500, 1)).astype(np.float32)
    rows = np.concatenate([top, np.full((500, form.group - 1), 0.01, np.float32)], 1)
    rows *= np.float32(10) ** np.random.default_rng(4).integers(-15, 15, (500, 1))
    _, codes, exponents = integer.quantize_weight(rows, form)
    assert (codes & 127 >= 64).all()
    for share in integer.TOP_SHARES[form.bits] + integer.LAST_SHARES[form.bits]:
        wanted = rows[:, :1] / np.float32(share * form.zero_point)
        got = integer.scale_values(integer.scale_codes(wanted, exponents), exponents)
        np.testing.assert_allclose(got, wanted, rtol=1 / 32)


@pytest.mark.parametrize("dtype", [*INTEGERS, "bf16", "f32"])
def test_zeros_stay_and_one_value_is_kept(dtype: str):
    w = np.zeros((2, 70), np.float32)
    w[1, 3] = -0.75
    got = registry.stored(w, dtype)
    assert got.shape == w.shape and got.dtype == w.dtype
    np.testing.assert_allclose(got, w, rtol=0.032)
    assert (got[0] == 0).all()


@pytest.mark.parametrize("dtype", ["q8g32", "q8g64", "q8g128", "bf16"])
def test_rounded_rows_depend_on_no_other_row(dtype: str):
    x = np.random.default_rng(2).standard_normal((5, 100))
    whole = registry.round_rows(x, dtype)
    np.testing.assert_array_equal(whole[2:3], registry.round_rows(x[2:3], dtype))
    assert np.abs(whole - x).max() <= np.abs(x).max() / 254 * 1.001
