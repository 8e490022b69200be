"""Packed weights against their definition, one element at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from q35c.codegen import pack
from q35c.codegen.pack import PackedWeight, to_bf16
from q35c.formats import registry
from q35c.formats.registry import integer_format

MATRICES = {  # layout, rows of each source
    "even": ("linear", (64,)),
    "odd_rows": ("linear", (45,)),
    "one_row": ("linear", (1,)),
    "stacked": ("linear", (40, 8, 7)),
    "gates": ("linear", (3, 3)),
    "swiglu": ("swiglu", (48, 48)),
    "swiglu_odd": ("swiglu", (21, 21)),
}
EXPERTS = {"experts": ("experts", 37), "experts_swiglu": ("experts_swiglu", 2 * 19)}
INPUTS = (1, 2, 7, 16)


def random_weight(
    layout: str, dtype: str, shapes: tuple[tuple[int, ...], ...], seed: int = 0
) -> tuple[PackedWeight, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    names = tuple(f"source{i}" for i in range(len(shapes)))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return PackedWeight("w", layout, dtype, names, shapes), arrays


class Reader:
    """Serve rows of arrays and remember the largest piece that was asked for."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays, self.most_rows = arrays, 0

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self.arrays[int(name.removeprefix("source"))]
        assert 0 <= start < stop <= len(array), "a read beyond the tensor"
        self.most_rows = max(self.most_rows, stop - start)
        return array[start:stop]


def packed(weight: PackedWeight, arrays: list[np.ndarray]) -> np.ndarray:
    """Join the chunks into the stored shape."""
    parts = list(weight.chunks(Reader(arrays)))
    flat = np.concatenate([np.ascontiguousarray(part).reshape(-1) for part in parts])
    return flat.reshape(weight.shape)


def stored(value: np.float32, dtype: str):
    if dtype == "f32":
        return value
    return torch.tensor(value).bfloat16().view(torch.int16).numpy().view(np.uint16)[()]


def row_of(layout: str, matrix: list[np.ndarray], block: int, lane: int) -> np.ndarray | None:
    """Return the row of the stacked sources behind a lane of a block; None for padding."""
    if layout.endswith("swiglu"):
        rows, index = matrix[lane // 16], 16 * block + lane % 16
    else:
        rows, index = np.concatenate(matrix), 32 * block + lane
    return rows[index] if index < len(rows) else None


def check_matrix(got: np.ndarray, layout: str, dtype: str, matrix: list[np.ndarray]) -> None:
    """Compare [blocks, K, 32] or [blocks, K/2, 32, 2] with the definition."""
    inputs = matrix[0].shape[1]
    rows = sum(map(len, matrix))
    expected_blocks = -(-rows // 32) if layout in ("linear", "experts") else -(-rows // 2 // 16)
    assert len(got) == expected_blocks
    for block in range(len(got)):
        for lane in range(32):
            row = row_of(layout, matrix, block, lane)
            for k in range(inputs + (inputs % 2 if dtype == "bf16" else 0)):
                cell = got[block, k, lane] if dtype == "f32" else got[block, k // 2, lane, k % 2]
                is_padding = row is None or k >= inputs
                assert cell == (0 if is_padding else stored(row[k], dtype)), (block, k, lane)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", MATRICES)
def test_matrix(name: str, inputs: int, dtype: str) -> None:
    layout, rows = MATRICES[name]
    weight, arrays = random_weight(layout, dtype, tuple((n, inputs) for n in rows))
    got = packed(weight, arrays)
    assert got.dtype == (np.float32 if dtype == "f32" else np.uint16)
    check_matrix(got, layout, dtype, arrays)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, inputs: int, dtype: str) -> None:
    layout, rows = EXPERTS[name]
    weight, (array,) = random_weight(layout, dtype, ((3, rows, inputs),))
    got = packed(weight, [array])
    assert len(got) == 3
    for expert in range(3):
        whole = array[expert]
        halves = [whole[: rows // 2], whole[rows // 2 :]]
        check_matrix(got[expert], layout, dtype, [whole] if layout == "experts" else halves)


@pytest.mark.parametrize("dtype", ["f32", "i4g32"])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_shared_expert_is_the_last(name: str, dtype: str) -> None:
    layout, rows = EXPERTS[name]
    shared = ((rows, 40),) if layout == "experts" else ((rows // 2, 40),) * 2
    weight, arrays = random_weight(layout, dtype, ((3, rows, 40), *shared))
    alone, _ = random_weight(layout, dtype, ((4, rows, 40),))
    joined = np.concatenate([arrays[0], np.concatenate(arrays[1:])[None]])
    assert weight.shape == alone.shape and weight.values == alone.values
    np.testing.assert_array_equal(packed(weight, arrays), packed(alone, [joined]))


def unpack_integers(
    block: np.ndarray, dtype: str, inputs: int, lane: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return levels [groups, group] and scales [groups] of one lane of a block u8 [bytes] of rows of `inputs` values."""
    form = integer_format(dtype)
    assert form is not None
    groups = form.groups(inputs)
    exponent, codes, lines, at = int(block[lane]), [], [], 64
    for first in range(0, groups, 2):
        there = min(2, groups - first)
        codes += [int(block[at + place * 32 + lane]) for place in range(there)]
        size = there * 32 * form.group * form.bits // 8
        lines.append(block[at + 64 : at + 64 + size])
        at += 64 + size
    assert at == len(block)
    scales = [
        (-1) ** (code >> 7) * (1 + code % 16 / 16) * 2.0 ** (exponent - 127 + (code >> 4 & 7))
        for code in codes
    ]
    words = form.set_inputs // 4
    lines = np.concatenate(lines).reshape(groups, -1, form.bits * words // 8, 32, 4)
    lines = lines[..., lane, :].astype(int)
    if form.bits == 8:
        stored = lines
    else:
        low = lines[:, :, 1:] if form.bits == 5 else lines
        halves = [low[:, :, word // 2] >> 4 * (word % 2) & 15 for word in range(words)]
        stored = np.stack(halves, 2)
    if form.bits == 5:
        high = [(lines[:, :, 0] >> word & 0x01) << 4 for word in range(words)]
        stored += np.stack(high, 2)
    levels = np.array(form.levels)[stored]
    return levels.reshape(groups, -1), np.array(scales, np.float32)


@pytest.mark.parametrize("dtype", ["i4g32", "i4g128", "i5g32", "i5g64", "i8g64"])
@pytest.mark.parametrize("inputs", [1, 31, 64, 200])
@pytest.mark.parametrize("name", MATRICES)
def test_integers(name: str, inputs: int, dtype: str) -> None:
    layout, rows = MATRICES[name]
    weight, arrays = random_weight(layout, dtype, tuple((n, inputs) for n in rows))
    got = packed(weight, arrays)
    assert got.dtype == np.uint8
    for block in range(len(got)):
        for lane in range(32):
            levels, scales = unpack_integers(got[block], dtype, inputs, lane)
            values = (levels * scales[:, None]).reshape(-1)
            row = row_of(layout, arrays, block, lane)
            want = np.zeros(inputs) if row is None else registry.stored(row, dtype)
            np.testing.assert_array_equal(values[:inputs], want.astype(np.float32))
            assert (values[inputs:] == 0).all()


def test_vector_is_stored_as_it_is() -> None:
    weight, arrays = random_weight("vector", "f32", ((37,),))
    np.testing.assert_array_equal(packed(weight, arrays), arrays[0])


def test_conv_is_stored_by_tap() -> None:
    weight, (array,) = random_weight("conv", "f32", ((10, 1, 4),))
    got = packed(weight, [array])
    assert got.shape == (4, 10)
    for tap in range(4):
        for channel in range(10):
            assert got[tap, channel] == array[channel, 0, tap]


ALL_LAYOUTS = {
    **{name: (layout, tuple((n, 6) for n in rows)) for name, (layout, rows) in MATRICES.items()},
    **{name: (layout, ((3, rows, 6),)) for name, (layout, rows) in EXPERTS.items()},
}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i4g32"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", ALL_LAYOUTS)
def test_chunks_equal_the_whole(
    name: str, blocks: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, shapes = ALL_LAYOUTS[name]
    weight, arrays = random_weight(layout, dtype, shapes)
    monkeypatch.setattr(pack, "SLICE_BYTES", 1 << 30)
    whole = packed(weight, arrays)
    monkeypatch.setattr(pack, "SLICE_BYTES", 4 * 32 * 6 * blocks)
    chunks = list(weight.chunks(Reader(arrays)))
    is_experts = layout.startswith("experts")  # each is one chunk
    assert len(chunks) == (3 if is_experts else -(-weight.blocks // blocks))
    np.testing.assert_array_equal(packed(weight, arrays), whole)


@pytest.mark.parametrize("name", ["even", "stacked", "swiglu"])
def test_no_more_is_read_at_a_time_than_a_slice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, shapes = ALL_LAYOUTS[name]
    weight, arrays = random_weight(layout, "bf16", shapes)
    monkeypatch.setattr(pack, "SLICE_BYTES", 4 * 32 * 6)
    reader = Reader(arrays)
    assert len(list(weight.chunks(reader))) == weight.blocks > 1
    assert reader.most_rows <= 32


def reference_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def special_floats() -> np.ndarray:
    """Return ties to even and odd, the largest finite numbers, denormals, zeros and infinities."""
    high = np.arange(0, 0x8000, 97, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (high[:, None] | low).reshape(-1)
    bits = np.concatenate([bits, bits | np.uint32(1 << 31), np.uint32([0x7F7FFFFF, 0x7F800000])])
    return bits.view(np.float32)


def test_bf16_rounds_as_torch() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    for x in (special_floats(), bits.view(np.float32)):
        is_number = ~np.isnan(x)
        assert is_number.any()
        numbers = x[is_number]
        np.testing.assert_array_equal(to_bf16(numbers), reference_bf16(numbers))


def test_bf16_keeps_nan_a_nan() -> None:
    """Rounding up the mantissa of a NaN would make it an infinity or a zero."""
    bits = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)
    x = np.concatenate([bits.view(np.float32), np.ones(3, np.float32)])
    wide = (to_bf16(x).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(x))
    np.testing.assert_array_equal(wide[-3:], 1)
