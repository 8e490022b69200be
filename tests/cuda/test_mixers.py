"""Attention and the gated delta net on the machine: against the reference, from empty and from older states, alone and batched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from q35c.ir import reference
from tests.cuda.harness import CudaKernels, Same, request, unseen_barriers
from tests.cuda.machine import ORDERS
from tests.kernels.harness import assert_close, to_bf16

CONTEXT = 128
HEADS = {"Hq": 4, "Hkv": 2, "D": 48}
ROTARY, EPS = 16, 1e-6
DELTAS = [{"Hk": 2, "Hv": 4, "Dk": 32, "Dv": 48}, {"Hk": 1, "Hv": 1, "Dk": 20, "Dv": 32}]
TAPS = 4
KV_DTYPES = ("f32", "bf16", "int8")


def cache_elements() -> int:
    return HEADS["Hkv"] * CONTEXT * HEADS["D"]


def cache_bytes(kv_dtype: str) -> int:
    """Return the bytes of all keys of a layer, which are those of its values."""
    if kv_dtype == "int8":
        return HEADS["Hkv"] * (CONTEXT // 32) * (HEADS["D"] + 4) * 32
    return {"f32": 4, "bf16": 2}[kv_dtype] * cache_elements()


def attention_shape(rows: str, kv_dtype: str) -> dict[str, Any]:
    offset = cache_bytes(kv_dtype)
    return {
        **HEADS,
        "rows": rows,
        "kv_dtype": kv_dtype,
        "context": CONTEXT,
        "v_offset_bytes": offset,
    }


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    asked = {}
    for rows in ("batch", "sequence"):
        for kv_dtype in KV_DTYPES:
            shape = attention_shape(rows, kv_dtype)
            rotation = {"R": ROTARY, "eps": EPS, "scale": 0.2}
            asked[f"prepare_{rows}_{kv_dtype}"] = request("attention_prepare", **shape, **rotation)
            for splits in (1, 3):
                asked[f"attention_{rows}_{kv_dtype}_{splits}"] = request(
                    "attention", **shape, splits=splits
                )
        for number, heads in enumerate(DELTAS):
            asked[f"inputs_{rows}_{number}"] = request("delta_inputs", **heads, K=TAPS, rows=rows)
            asked[f"scan_{rows}_{number}"] = request("delta_scan", **heads, K=TAPS, rows=rows)
    for number, heads in enumerate(DELTAS):
        asked[f"output_{number}"] = request("delta_output", Hv=heads["Hv"], Dv=heads["Dv"], eps=EPS)
    asked["combine"] = request("attention_combine", Hq=4, D=48, splits=3)
    return CudaKernels(asked)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def pack_cache(keys: np.ndarray, values: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Return the state of keys and values [CONTEXT, Hkv, D] of one sequence, in cells32."""
    if kv_dtype == "int8":
        return np.concatenate([pack_bytes(keys, is_key=True), pack_bytes(values, is_key=False)])
    blocks = keys.transpose(1, 0, 2).reshape(HEADS["Hkv"], CONTEXT // 32, 32, HEADS["D"])
    parts = [blocks.transpose(0, 1, 3, 2).reshape(-1), values.transpose(1, 0, 2).reshape(-1)]
    whole = np.concatenate(parts)
    return to_bf16(whole) if kv_dtype == "bf16" else whole


def pack_bytes(x: np.ndarray, is_key: bool) -> np.ndarray:
    """Return keys or values [CONTEXT, Hkv, D], int8 times a scale for each cell, in int8-pairs."""
    D, heads, blocks = HEADS["D"], HEADS["Hkv"], CONTEXT // 32
    scale = np.abs(x).max(-1) / np.float32(127)
    codes = np.rint(x / scale[..., None]).astype(np.int8)
    cells = codes.transpose(1, 0, 2).reshape(heads, blocks, 32, D)
    if is_key:  # [D / 2, 32 cells, 2 halves]
        pairs = cells.reshape(heads, blocks, 32, 2, D // 2).transpose(0, 1, 4, 2, 3)
    else:  # [D / 16, 16 cells, 16 dims, 2 halves]
        pairs = cells.reshape(heads, blocks, 2, 16, D // 16, 16).transpose(0, 1, 4, 3, 5, 2)
    scales = np.ascontiguousarray(scale.T.reshape(heads, blocks, 32), np.float32)
    return np.concatenate([pairs.reshape(heads, blocks, -1), scales.view(np.int8)], -1).reshape(-1)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("rows", ["sequence", "batch"])
def test_attention(kernels: CudaKernels, rows: str, kv_dtype: str, splits: int) -> None:
    rng = np.random.default_rng(5)
    Hq, Hkv, D = HEADS.values()
    T = 3
    sequences = T if rows == "batch" else 1
    starts = np.array([70, 0, 31] if rows == "batch" else [62], np.int32)
    qg, k, v = normal(rng, T, Hq * 2 * D), normal(rng, T, Hkv * D), normal(rng, T, Hkv * D)
    table = normal(rng, T, ROTARY)
    norms = {"q_norm": normal(rng, D), "k_norm": normal(rng, D)}
    keys, values = (
        reference.round_cells(normal(rng, sequences, CONTEXT, Hkv, D), kv_dtype) for _ in range(2)
    )
    packed = [pack_cache(keys[b], values[b], kv_dtype) for b in range(sequences)]
    stride = len(packed[0]) + 64 - len(packed[0]) % 64
    state = np.zeros(stride * sequences, packed[0].dtype)
    for b, one in enumerate(packed):
        state[b * stride : b * stride + len(one)] = one
    slots = np.arange(sequences) * (stride * state.itemsize // 64)

    given = {"slots": slots, "starts": starts}
    rows_in = {"qg": qg, "k": k, "v": v, "table": table, **norms, "ld_q_out": Hq * D}
    outputs = {"state": state, "q_out": (T, Hq * D)}
    if kv_dtype == "int8":
        given["scales"] = Same("state", np.float32)
    made = kernels.run(f"prepare_{rows}_{kv_dtype}", T, outputs, **given, **rows_in)
    state, q = made["state"], made["q_out"]
    name = f"attention_{rows}_{kv_dtype}_{splits}"
    if splits == 1:
        y = kernels.run(name, T, {"y": (T, Hq * D)}, state=state, q=q, qg=qg, **given)["y"]
    else:
        shape = (T, Hq, splits, D + 2)
        parts = kernels.run(name, T, {"parts": shape}, state=state, q=q, **given, orders=ORDERS)
        y = kernels.run("combine", T, {"y": (T, Hq * D)}, parts=parts["parts"], qg=qg)["y"]

    exact = [x.astype(np.float64) for x in (qg, k, v, *norms.values(), table)]
    want = reference.stateful_gated_attention(
        *exact, np.arange(sequences), starts, keys.astype(np.float64), values.astype(np.float64),
        rows=rows, heads=Hq, kv_heads=Hkv, eps=EPS, scale=0.2, cache=kv_dtype,
    )  # fmt: skip
    # A key at the edge between two bf16 may be rounded the other way.
    assert_close(y, want, 1e-7 if kv_dtype == "f32" else 2e-5)


@pytest.mark.parametrize("number", range(len(DELTAS)))
@pytest.mark.parametrize(("rows", "T"), [("sequence", 1), ("sequence", 5), ("batch", 2)])
def test_delta_net(kernels: CudaKernels, rows: str, T: int, number: int) -> None:
    rng = np.random.default_rng(T)
    Hk, Hv, Dk, Dv = DELTAS[number].values()
    C, sequences = 2 * Hk * Dk + Hv * Dv, T if rows == "batch" else 1
    qkv, z, b, a = (normal(rng, T, width) for width in (C, Hv * Dv, Hv, Hv))
    conv_w, a_log, dt_bias, norm_w = (normal(rng, *s) for s in ((TAPS, C), (Hv,), (Hv,), (Dv,)))
    conv, delta = normal(rng, sequences, TAPS - 1, C), normal(rng, sequences, Hv, Dk, Dv)
    words = (
        -(-(TAPS - 1) * C // 16) * 16
    )  # of a sequence's conv inputs; its delta state lies behind
    stride = words + Hv * Dk * Dv + 16
    state = np.zeros(stride * sequences, np.float32)
    for s in range(sequences):
        at = s * stride
        state[at : at + (TAPS - 1) * C] = conv[s].reshape(-1)
        state[at + words : at + words + Hv * Dk * Dv] = delta[s].reshape(-1)
    slots = np.arange(sequences) * (stride // 16)
    inputs = {"conv_w": conv_w, "a_log": a_log, "dt_bias": dt_bias, "qkv": qkv, "b": b, "a": a}
    outputs = {"mixed": (T, C), "gates": (T, Hv * 2)}
    made = kernels.run(
        f"inputs_{rows}_{number}", T, outputs, **inputs, slots=slots, conv_state=state
    )
    # Two buffers here, as every operand has one of its own: conv inputs first, states from the same slots on.
    outputs = {"conv_state": state, "state": state[words:], "o": (T, Hv * Dv)}
    scanned = kernels.run(f"scan_{rows}_{number}", T, outputs, qkv=qkv, slots=slots, **made)
    y = kernels.run(f"output_{number}", T, {"y": (T, Hv * Dv)}, o=scanned["o"], z=z, norm_w=norm_w)

    exact = [x.astype(np.float64) for x in (qkv, z, b, a)]
    parameters = [conv_w.T, a_log, dt_bias, norm_w]
    kept = [conv.astype(np.float64), delta.astype(np.float64)]
    want = reference.stateful_gated_delta_net(
        *exact, *(p.astype(np.float64) for p in parameters), np.arange(sequences), np.zeros(sequences), *kept,
        rows=rows, key_heads=Hk, value_heads=Hv, eps=EPS,
    )  # fmt: skip
    assert_close(y["y"], want)
    for s in range(sequences):
        at = s * stride
        inputs_after = scanned["conv_state"][at : at + (TAPS - 1) * C].reshape(TAPS - 1, C)
        np.testing.assert_array_equal(inputs_after, kept[0][s].astype(np.float32))
        assert_close(scanned["state"][at : at + Hv * Dk * Dv].reshape(Hv, Dk, Dv), kept[1][s])


@pytest.mark.nightly
def test_no_barrier_can_go(kernels: CudaKernels) -> None:
    Hq, D = HEADS["Hq"], HEADS["D"]
    ones = {"q": np.ones((2, Hq * D), np.float32), "qg": np.ones((2, Hq * 2 * D), np.float32)}
    state = np.ones(2 * cache_elements(), np.float32)
    place = {"slots": np.zeros(1, np.int64), "starts": np.full(1, 90, np.int32)}
    empty = np.full((2, Hq * D), np.nan, np.float32)
    assert (
        unseen_barriers(
            kernels, "attention_sequence_f32_1", 2, state=state, **place, **ones, y=empty
        )
        == 0
    )
    Hk, Hv, Dk, Dv = DELTAS[0].values()
    C = 2 * Hk * Dk + Hv * Dv
    scanned = {
        "conv_state": np.ones(3 * C, np.float32), "state": np.ones(Hv * Dk * Dv, np.float32), "slots": np.zeros(1, np.int64),
        "qkv": np.ones((3, C), np.float32), "mixed": np.ones((3, C), np.float32), "gates": np.ones((3, Hv * 2), np.float32),
        "o": np.full((3, Hv * Dv), np.nan, np.float32),
    }  # fmt: skip
    assert unseen_barriers(kernels, "scan_sequence_0", 3, **scanned) == 0
