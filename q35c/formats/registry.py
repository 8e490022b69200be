"""Formats by name: the dtype of a weight in the quantized stage, or of rounded rows.

Weights are "f32", "bf16", or integers with a scale for each group (integer.py). bf16 weights meet rows in f32, or rows that
are rounded to "bf16" themselves where the instruction set's products of pairs shall serve.
"""

from __future__ import annotations

import re

import numpy as np

from q35c.formats.bf16 import round_bf16
from q35c.formats.integer import IntegerFormat, rounded_rows, stored_weight

Array = np.ndarray

_INTEGER = re.compile(r"(?:i([458])|q(8))g(32|64|128)")


def integer_format(dtype: str) -> IntegerFormat | None:
    """Return the format that an integer dtype names, None for a floating one."""
    match = _INTEGER.fullmatch(dtype)
    if match is None:
        return None
    return IntegerFormat(int(match[1] or match[2]), int(match[3]))


def largest_value(dtype: str) -> float:
    """Return the largest magnitude that a weight may have to be stored in a format."""
    if dtype == "bf16":
        return float.fromhex("0x1.fep127")
    # Of integers' candidates the errors are squared and added in f32.
    return float(np.finfo(np.float32).max) if dtype == "f32" else 2.0**60


def stored(weight: Array, dtype: str) -> Array:
    """Return the values that a weight [.., N, K] has after it was stored in a format, in its own dtype."""
    if dtype == "bf16":
        return round_bf16(weight.astype(np.float32)).astype(weight.dtype)
    form = integer_format(dtype)
    return weight if form is None else stored_weight(weight, form)


def is_row_format(dtype: str) -> bool:
    """Tell whether rows of activations may be rounded to a dtype."""
    return dtype == "bf16" or (dtype.startswith("q") and integer_format(dtype) is not None)


def round_rows(x: Array, dtype: str) -> Array:
    """Return x [.., K] rounded to bf16, or to int8 with one scale for each group: what `quantize_rows` keeps."""
    form = integer_format(dtype)
    if form is None:
        return round_bf16(x.astype(np.float32)).astype(x.dtype)
    return rounded_rows(x, form)
