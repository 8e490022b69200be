"""bfloat16: the upper half of a float32."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def to_bf16(x: Array) -> Array:
    """Round float32 to bf16 bits, nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    half = rounded.astype(np.uint16)
    if np.isnan(x).any():  # rounding may carry a NaN's mantissa into its exponent
        half[np.isnan(x)] = 0x7FC0
    return half


def round_bf16(x: Array) -> Array:
    """Round float32 to bf16, nearest even, kept as float32; NaN stays NaN."""
    return (to_bf16(x).astype(np.uint32) << np.uint32(16)).view(np.float32)
