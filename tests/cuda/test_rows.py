"""Look-up, rounding, rotary table and the experts' kernels on the machine."""

from __future__ import annotations

import numpy as np
import pytest

from q35c.ir import reference
from q35c.layouts.rows import IntegerRow
from tests.cuda.harness import CudaKernels, request
from tests.cuda.rows import row_values, stored_rows
from tests.kernels.harness import assert_close, pack_formatted, stored

V, H, E, INNER, TOP_K = 70, 84, 40, 32, 3
FORMATS = ("f32", "bf16", "i4g32", "i5g64", "i8g32")
INV_FREQ, SECTIONS = tuple(1e4 ** (-i / 8) for i in range(8)), (3, 3, 2)
MIXTURES = [("f32", "f32"), ("i4g32", "q8g32"), ("i5g32", "q8g32")]


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    asked = {f"embedding_{dtype}": request("embedding", V=V, H=H, dtype=dtype) for dtype in FORMATS}
    asked |= {
        f"int8_{group}_{pairs}": request("quantize_rows", K=100, group=group, pairs=pairs)
        for group, pairs in ((32, 1), (64, 2), (128, 1))
    }
    asked |= {f"bf16_{K}": request("round_rows", K=K, pairs=1) for K in (51, 64)}
    asked["table"] = request("rotary_table", inv_freq=INV_FREQ, sections=SECTIONS, scaling=1.5)
    for has_shared in (False, True):
        asked[f"route_{has_shared}"] = request("route", E=E, top_k=TOP_K, has_shared=has_shared)
        asked[f"combine_{has_shared}"] = request("combine", H=H, top_k=TOP_K, has_shared=has_shared)
    for dtype, rows in MIXTURES:
        shape = {"E": E, "I": INNER, "H": H, "top_k": TOP_K, "dtype": dtype, "rows": rows}
        asked[f"up_{dtype}"] = request("expert_gate_up", **shape)
        asked[f"down_{dtype}"] = request("expert_down", **shape)
    return CudaKernels(asked)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", FORMATS)
def test_embedding(kernels: CudaKernels, dtype: str) -> None:
    table, ids = normal(V, H), np.array([0, 31, V - 1, 32, 5], np.int32)
    w = pack_formatted(table, dtype).view(np.float32 if dtype == "f32" else np.uint32)
    y = kernels.run(f"embedding_{dtype}", 5, {"y": (5, H)}, w=w, ids=ids)["y"]
    np.testing.assert_array_equal(y, stored(table, dtype)[ids].astype(np.float32))


@pytest.mark.parametrize(("group", "pairs"), [(32, 1), (64, 2), (128, 1)])
def test_rounding_to_int8(kernels: CudaKernels, group: int, pairs: int) -> None:
    x = normal(3 * pairs, 100)
    x[1] *= np.float32(1e-20)
    x[2, :64] = 0
    row = IntegerRow(100, group, has_starts=False)
    empty = np.full((len(x), row.words), 7, np.int32)
    q = kernels.run(f"int8_{group}_{pairs}", 3, {"q": empty}, x=x)["q"]
    used = row.used_words
    np.testing.assert_array_equal(
        q[:, :used].view(np.uint32), stored_rows(x, f"q8g{group}")[:, :used]
    )
    assert (q[:, used:] == 7).all()


def test_what_is_not_finite_stays_so(kernels: CudaKernels) -> None:
    x = normal(1, 100)
    x[0, 3], x[0, 40] = np.nan, -np.inf
    row = IntegerRow(100, 32, has_starts=False)
    q = kernels.run("int8_32_1", 1, {"q": np.zeros((1, row.words), np.int32)}, x=x)["q"]
    scales = q[0, row.scales : row.sums].view(np.float32)
    np.testing.assert_array_equal(np.isfinite(scales), [False, False, True, True])


@pytest.mark.parametrize("K", [51, 64])
def test_rounding_to_bf16(kernels: CudaKernels, K: int) -> None:
    x = normal(2, K)
    x[0, :2] = np.nan, np.inf
    want = stored_rows(x, "bf16")
    y = kernels.run(f"bf16_{K}", 2, {"y": np.zeros_like(want)}, x=x)["y"]
    np.testing.assert_array_equal(y, want)


def test_rotary_table(kernels: CudaKernels) -> None:
    positions = np.random.default_rng(0).integers(0, 4000, (3, 11)).astype(np.int32)
    table = kernels.run("table", 11, {"table": (11, 16)}, positions=positions)["table"]
    want = reference.rotary_table(positions, INV_FREQ, SECTIONS, 1.5)
    np.testing.assert_allclose(table, want, atol=2e-6)


@pytest.mark.parametrize("has_shared", [False, True])
def test_route(kernels: CudaKernels, has_shared: bool) -> None:
    logits, gate = normal(4, E), normal(4, 1)
    logits[1] = 1.0  # all equal: the lowest ids
    logits[2, 7] = np.nan
    logits[3, 0] = np.inf
    choices = TOP_K + has_shared
    outputs = {"ids": np.zeros((4, choices), np.int32), "weights": (4, choices)}
    made = kernels.run(f"route_{has_shared}", 4, outputs, logits=logits, gate=gate)
    weights, ids = reference.topk(reference.softmax(logits[:2].astype(np.float64), -1), TOP_K)
    np.testing.assert_array_equal(made["ids"][:2, :TOP_K], ids)
    assert_close(made["weights"][:2, :TOP_K], weights / weights.sum(-1, keepdims=True))
    assert ((made["ids"] >= 0) & (made["ids"] < E + has_shared)).all()
    if has_shared:
        assert (made["ids"][:, TOP_K] == E).all()
        assert_close(made["weights"][:, TOP_K], reference.sigmoid(gate[:, 0].astype(np.float64)))


@pytest.mark.parametrize("has_shared", [False, True])
def test_combine(kernels: CudaKernels, has_shared: bool) -> None:
    y2, weights = normal(3, TOP_K, H), normal(3, TOP_K, seed=1)
    shared, gate, residual = normal(3, H, seed=2), normal(3, 1, seed=3), normal(3, H, seed=4)
    given = {"y2": y2, "weights": weights, "shared": shared, "gate": gate, "residual": residual}
    y = kernels.run(f"combine_{has_shared}", 3, {"y": (3, H)}, **given)["y"]
    want = residual + (y2 * weights[:, :, None]).sum(1)
    assert_close(y, want + (reference.sigmoid(gate) * shared if has_shared else 0))


@pytest.mark.parametrize(("dtype", "rows"), MIXTURES)
def test_experts(kernels: CudaKernels, dtype: str, rows: str) -> None:
    tokens, weight_type = 2, np.float32 if dtype == "f32" else np.uint32
    ids = np.random.default_rng(0).integers(0, E, (tokens, TOP_K)).astype(np.int32)
    up, down = normal(E, 2 * INNER, H), normal(E, H, INNER, seed=1)
    x, y1 = normal(tokens, H, seed=2), normal(tokens * TOP_K, INNER, seed=3)
    w = pack_formatted(up, dtype, "experts_swiglu").view(weight_type)
    outputs = {"y": (tokens * TOP_K, INNER)}
    y = kernels.run(f"up_{dtype}", tokens, outputs, w=w, x=stored_rows(x, rows), ids=ids)["y"]
    pairs = np.einsum("tk,tjnk->tjn", row_values(x, rows), stored(up, dtype)[ids])
    gate, linear = np.split(pairs, 2, -1)
    assert_close(y, (reference.silu(gate) * linear).reshape(-1, INNER))

    w = pack_formatted(down, dtype, "experts").view(weight_type)
    outputs = {"y": (tokens * TOP_K, H)}
    y = kernels.run(f"down_{dtype}", tokens, outputs, w=w, x=stored_rows(y1, rows), ids=ids)["y"]
    want = np.einsum("pk,pnk->pn", row_values(y1, rows), stored(down, dtype)[ids.reshape(-1)])
    assert_close(y, want)
