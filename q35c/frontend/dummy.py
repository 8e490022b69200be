"""Random weights of any size, drawn from a seed, readable by rows.

Each tensor has its own Philox key (seed and name) and each block of rows its own counter, so a row
has the same value however it is asked for. Spreads follow Hugging Face's initialisation.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from q35c.config import ModelConfig
from q35c.frontend.tensors import (
    TOWER_PREFIX,
    Shape,
    expected_tensors,
    expected_tower_tensors,
)
from q35c.vision_config import VisionConfig

_BLOCK_ELEMENTS = 1 << 16
_MATRIX_STD = 0.02
_CONV_STD = 0.3  # torch's default for a depthwise kernel of 4 taps: uniform(-0.5, 0.5)
_NORM_STD = 0.02


class DummyWeights:
    """The tensors of a configuration with weights that only the seed decides."""

    def __init__(self, config: ModelConfig, seed: int, tower: VisionConfig | None = None) -> None:
        self.shapes: dict[str, Shape] = expected_tensors(config)
        if tower is not None:
            self.shapes |= expected_tower_tensors(tower)
        self._seed = seed

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw rows [start, stop) of axis 0 as float32."""
        row_shape = self.shapes[name][1:]
        out = np.empty((stop - start, *row_shape), np.float32)
        width = math.prod(row_shape)
        block_rows = max(1, _BLOCK_ELEMENTS // width)
        key = np.frombuffer(
            hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=16).digest(), np.uint64
        )
        for block in range(start // block_rows, -(-stop // block_rows)):
            first = block * block_rows
            low, high = max(start, first), min(stop, first + block_rows)
            random = np.random.Generator(np.random.Philox(key=key, counter=[0, block, 0, 0]))
            if low == first:
                _fill(random, name, out[low - start : high - start])
            else:  # a row's values come after those of the rows before it in the block
                drawn = np.empty((high - first, *row_shape), np.float32)
                _fill(random, name, drawn)
                out[low - start : high - start] = drawn[low - first :]
        return out


def _fill(random: np.random.Generator, name: str, out: np.ndarray) -> None:
    """Draw values with the spread that fits a tensor's role."""
    leaf = name.rpartition("linear_attn.")[2]
    if leaf == "A_log":
        out[:] = np.log(0.01 + 15.99 * random.random(out.shape, np.float32))
        return
    if leaf == "dt_bias":
        out[:] = 1
        return
    random.standard_normal(dtype=np.float32, out=out)
    if leaf == "conv1d.weight":
        out *= _CONV_STD
    elif out.ndim == 1:
        out *= _NORM_STD
        # Plain weights; the other norms add 1 themselves.
        is_plain = name.startswith(TOWER_PREFIX) and "norm" in name and name.endswith(".weight")
        if is_plain or (leaf == "norm.weight" and leaf != name):
            out += 1
    else:
        out *= _MATRIX_STD
