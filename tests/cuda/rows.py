"""Rows of activations as CUDA kernels read them, and the values that they stand for."""

from __future__ import annotations

import numpy as np

from q35c.formats.bf16 import to_bf16
from q35c.formats.registry import integer_format, round_rows
from q35c.layouts.rows import SUM_FACTOR, IntegerRow, bf16_row_words


def stored_rows(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return f32 [T, K] as rows of a dtype, uint32 words but for f32."""
    if dtype == "f32":
        return np.ascontiguousarray(x, np.float32)
    width = x.shape[1]
    if dtype == "bf16":
        words = np.zeros((len(x), bf16_row_words(width, True)), np.uint32)
        words.view(np.uint16)[:, :width] = to_bf16(x)
        return words
    form = integer_format(dtype)
    assert form is not None
    row = IntegerRow(width, form.group, has_starts=False)
    padded = np.zeros((len(x), row.groups * form.group), np.float32)
    padded[:, :width] = x
    groups = padded.reshape(len(x), row.groups, form.group)
    top = np.abs(groups).max(-1)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top != 0)
    codes = np.rint(groups * inverse[..., None]).astype(np.int8)
    words = np.zeros((len(x), row.words), np.uint32)
    words[:, : row.scales] = codes.reshape(len(x), -1).view(np.uint32)
    words[:, row.scales : row.sums] = (top * np.float32(1 / 127)).view(np.uint32)
    sums = SUM_FACTOR * codes.sum(-1, dtype=np.int32)
    words[:, row.sums : row.used_words] = sums.view(np.uint32)
    return words


def row_values(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return the float64 values that stored rows stand for."""
    return (x if dtype == "f32" else round_rows(x, dtype)).astype(np.float64)
