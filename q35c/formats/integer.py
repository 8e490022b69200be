"""Integers with scales: what storing them does to values.

Weights are "i4gN", "i5gN", "i8gN": codes of so many bits with one scale for each N consecutive inputs of an output row. A code
stands for an int8 level, which the scale multiplies: levels are evenly spaced in 8 bits, and denser around 0 in 4 and 5, as
weights are. Activations that meet such weights are "q8gN": int8 with one f32 scale for each N values of a row, so that a
row's rounding depends on no other row.

A scale takes 8 bits, a sign, 3 of exponent and 4 of mantissa: +-(1 + mantissa / 16) * 2^exponent times a power of two
that belongs to the row. Rounding it so costs 4 and 5 bits half a percent of squared error beside a scale in bf16.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

SCALE_BITS = 8
_MANTISSA = 19  # bits of an f32 mantissa behind the 4 that a scale keeps
# Exponent of a row, biased, below which squared errors would be denormal: the first scale that keeps its sums is taken.
LEAST_MEASURED = 70
_LARGEST_SCALE = 127  # code of the largest scale of a row: its exponent is 7 above the row's

# Near the means of a normal distribution's parts: integers found by steps of 1 that lower the squared error of groups of 64
# and 128, scaled as below. A fifth less of it than even spacing has. Up to 32, as AVX2 adds products in 16 bits
# (products/narrow_sums.py); up to 64 the error is 1 % lower in 4 bits and 11 % in 5, up to 16 15 % higher in 4.
# 0 is a level.
_NORMAL_LEVELS = {
    4: (-32, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 12, 16, 21, 27),
    5: (
        -32, -27, -24, -21, -18, -16, -14, -12, -10, -8, -6, -5, -4, -3, -2, -1,
        0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 21, 24, 28,
    ),
}  # fmt: skip

# The levels of the 16 inputs that such a sum takes are held to this much in magnitude, so that with int8 rows it fits
# 16 bits: 258 * 127 < 2^15. Normal weights in groups of 64 pass it in one group of seventy, which then takes another
# scale, for 0.2 % of squared error; evenly spread ones cost 16 %.
SUM_INPUTS = 32  # two such sums: of the first and of the second two of every 4 inputs
LARGEST_SUM = 258

# What the value of largest magnitude becomes, tried in turn, as shares of half the range: -1 uses all codes, the
# positive top code one less; more clips it in favour of the many small values, less rounds it more finely.
TOP_SHARES: dict[int, tuple[float, ...]] = {
    4: (-1.0, -0.93, -1.07, 0.9, 1.0),
    5: (-1.0, -0.95, -1.05, 0.88, 1.0),
    8: (-1.0, -0.97, -0.94),  # scales are 3 to 6 % apart, and what is rounded down clips
}
# For groups that pass LARGEST_SUM with all of these; with the last no level is above 16, and none can.
_LAST_SHARES = (-0.85, -0.72, -0.6, -0.5)
LAST_SHARES: dict[int, tuple[float, ...]] = {4: _LAST_SHARES, 5: _LAST_SHARES, 8: ()}


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """Codes of `bits` for int8 levels, with one scale for `group` values."""

    bits: int
    group: int

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the level of each code, in ascending order."""
        half = 1 << (self.bits - 1)
        return _NORMAL_LEVELS.get(self.bits) or tuple(range(-half, half))

    @property
    def is_even(self) -> bool:
        """Tell whether levels are evenly spaced: then a code is its level plus the zero point."""
        return self.bits not in _NORMAL_LEVELS

    @property
    def zero_point(self) -> int:
        """Return what makes a level an unsigned byte, a power of two."""
        return -self.levels[0]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Return the values between neighbouring levels: above each begins the next level's part."""
        return tuple((a + b) / 2 for a, b in itertools.pairwise(self.levels))

    @property
    def set_inputs(self) -> int:
        """Return how many inputs are stored together, so that their codes fill whole words."""
        return 32 if self.bits == 5 else 16

    @property
    def bits_per_weight(self) -> float:
        """Return the stored bits of one value, its share of the scale included, but not the row's exponent."""
        return self.bits + SCALE_BITS / self.group

    def groups(self, inputs: int) -> int:
        """Return how many groups a row of `inputs` values has; the last may be short."""
        return -(-inputs // self.group)


def split_groups(rows: Array, group: int) -> Array:
    """Return [.., K] as [.., groups, group], zero behind the last value."""
    short = -rows.shape[-1] % group
    if short:
        rows = np.concatenate([rows, np.zeros((*rows.shape[:-1], short), rows.dtype)], -1)
    return rows.reshape(*rows.shape[:-1], -1, group)


def scale_bound(form: IntegerFormat) -> float:
    """Return what a row's largest magnitude is multiplied by to bound its scales, rounding included."""
    shares = TOP_SHARES[form.bits] + LAST_SHARES[form.bits]
    return (1 + 1 / 32) / (min(map(abs, shares)) * form.zero_point)


def row_exponents(rows: Array, form: IntegerFormat) -> Array:
    """Return the biased f32 exponents int32 [..] of the least scale of rows [.., K]; what is not finite does not count."""
    magnitude = np.abs(rows, where=np.isfinite(rows), out=np.zeros(rows.shape, np.float32))
    largest = magnitude.max(-1) * np.float32(scale_bound(form))
    return np.clip((largest.view(np.int32) >> 23) - 7, 1, 247)


def scale_codes(wanted: Array, exponents: Array) -> Array:
    """Return the codes uint8 [.., groups] of the stored scales nearest to f32 [.., groups], rows' exponents [..] given."""
    bits = np.ascontiguousarray(wanted, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    half = np.uint32((1 << _MANTISSA - 1) - 1)
    nearest = magnitude + half + (magnitude >> np.uint32(_MANTISSA) & np.uint32(1))
    steps = (nearest >> np.uint32(_MANTISSA)).astype(np.int32) - (exponents[..., None] << 4)
    return (np.clip(steps, 0, _LARGEST_SCALE) | (bits >> np.uint32(31) << np.uint32(7))).astype(
        np.uint8
    )


def scale_values(codes: Array, exponents: Array) -> Array:
    """Return the f32 scales that codes uint8 [.., groups] stand for, rows' exponents [..] given."""
    steps = (codes & np.uint8(127)).astype(np.uint32) + (exponents[..., None] << 4).astype(
        np.uint32
    )
    sign = (codes >> np.uint8(7)).astype(np.uint32) << np.uint32(31)
    return (steps << np.uint32(_MANTISSA) | sign).view(np.float32)


def quantize_weight(rows: Array, form: IntegerFormat) -> tuple[Array, Array, Array]:
    """Return the levels int8 [.., groups, group], the scales' codes uint8 [.., groups] and the rows' exponents
    int32 [..] of float32 [.., K].

    Of a few scales each group takes the one with the least squared error among those that keep to LARGEST_SUM. Denormal
    values count as 0, as they do for compiled code.
    """
    rows = np.asarray(rows, np.float32)
    rows = np.where(np.abs(rows) < np.finfo(np.float32).tiny, np.float32(0), rows)
    exponents, groups = row_exponents(rows, form), split_groups(rows, form.group)
    high, low = groups.max(-1), groups.min(-1)
    top = np.where(high >= -low, high, low)
    best = np.full(top.shape, np.inf, np.float32)
    levels = np.zeros(groups.shape, np.int8)
    codes = np.zeros(top.shape, np.uint8)
    for share in TOP_SHARES[form.bits] + LAST_SHARES[form.bits]:
        is_last = share in LAST_SHARES[form.bits]
        if is_last and np.isfinite(best).all():
            break
        code = scale_codes(top * np.float32(1 / (share * form.zero_point)), exponents)
        scale = scale_values(code, exponents)
        tried = nearest_levels(groups, scale, form)
        error = np.square(groups - tried * scale[..., None]).sum(-1)
        error = np.where(exponents[..., None] < LEAST_MEASURED, np.float32(0), error)
        better = (error < best) & keeps_sums(tried, form)
        if is_last:
            better &= np.isinf(best)
        best = np.where(better, error, best)
        codes = np.where(better, code, codes)
        levels = np.where(better[..., None], tried, levels)
    return levels, codes, exponents


def keeps_sums(levels: Array, form: IntegerFormat) -> Array:
    """Tell for levels [.., group] whether their sums keep to LARGEST_SUM; levels of 8 bits need not."""
    if form.bits == 8:
        return np.ones(levels.shape[:-1], bool)
    sums = np.abs(levels.astype(np.int16)).reshape(*levels.shape[:-1], -1, SUM_INPUTS // 4, 2, 2)
    return (sums.sum((-1, -3)) <= LARGEST_SUM).all((-1, -2))


def nearest_levels(groups: Array, scale: Array, form: IntegerFormat) -> Array:
    """Return the nearest levels of values [.., group] for given scales [..]; NaN becomes 0."""
    scaled = np.nan_to_num(groups * (1 / scale)[..., None])
    if form.is_even:
        return np.clip(np.rint(scaled), form.levels[0], form.levels[-1]).astype(np.int8)
    thresholds = np.array(form.thresholds, np.float32)
    return np.array(form.levels, np.int8)[np.searchsorted(thresholds, scaled)]


def stored_weight(weight: Array, form: IntegerFormat) -> Array:
    """Return the values that a weight [.., N, K] has after it was stored, in its own dtype."""
    levels, codes, exponents = quantize_weight(weight, form)
    values = levels.astype(np.float32) * scale_values(codes, exponents)[..., None]
    return values.reshape(*weight.shape[:-1], -1)[..., : weight.shape[-1]].astype(weight.dtype)


def rounded_rows(x: Array, form: IntegerFormat) -> Array:
    """Return x [.., K] rounded to int8 with one scale for each group: what `quantize_rows` keeps."""
    groups = split_groups(x, form.group)
    scale = np.abs(groups).max(-1, keepdims=True) / 127
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    rounded = np.rint(groups * inverse) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)
