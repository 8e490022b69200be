"""Products that norm and round their rows first: the bits of the kernels that do it apart."""

from __future__ import annotations

import numpy as np
import pytest

from q35c.layouts.rows import IntegerRow, bf16_row_words
from tests.cuda.harness import CudaKernels, request, unseen_barriers
from tests.kernels.harness import pack_formatted

NORM = {"eps": 1e-6, "offset": 1.0}
N, K, E, TOP_K, TOKENS = 40, 300, 5, 2, 3
HEAD = 60
# weights, rows, tile: every type of rows, and a tile that is full, part of one, and one row.
CASES = [("i4g32", "q8g32", 2), ("i5g64", "q8g64", 3), ("bf16", "bf16", 2), ("bf16", "f32", 2)]
KINDS = ("norm", "round")


def shape(dtype: str, rows: str) -> dict:
    return {"N": N, "K": K, "dtype": dtype, "rows": rows, "epilogue": "none"}


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    asked = {"norm": request("rms_norm", D=K, **NORM), "round_bf16": request("round_rows", K=K, pairs=1)}  # fmt: skip
    for group in (32, 64):
        asked[f"round_q8g{group}"] = request("quantize_rows", K=K, group=group, pairs=1)
    for dtype, rows, tile in CASES:
        asked[f"plain_{dtype}_{rows}"] = request("linear", **shape(dtype, rows), tile=tile)
        for kind in KINDS:
            first = NORM if kind == "norm" else {}
            asked[f"{kind}_{dtype}_{rows}"] = request(
                "linear", **shape(dtype, rows), tile=tile, prologue=kind, **first
            )
    gated = {"prologue": "gated", "eps": 1e-6, "head_dim": HEAD}
    asked["gated_q8g64"] = request("linear", **shape("i5g64", "q8g64"), tile=3, **gated)
    asked["gated"] = request("delta_output", Hv=K // HEAD, Dv=HEAD, eps=1e-6)
    experts = {"E": E, "H": K, "I": 32, "top_k": TOP_K, "dtype": "i5g64", "rows": "q8g64"}
    asked["up"] = request("expert_gate_up", **experts)
    asked["norm_up"] = request("expert_gate_up", **experts, prologue="norm", **NORM)
    return CudaKernels(asked)


def normal(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def rounded(kernels: CudaKernels, x: np.ndarray, rows: str) -> np.ndarray:
    """Return rows as the kernels apart round them."""
    if rows == "f32":
        return x
    if rows == "bf16":
        empty = np.zeros((len(x), bf16_row_words(K, True)), np.uint32)
        return kernels.run("round_bf16", len(x), {"y": empty}, x=x)["y"]
    empty = np.zeros((len(x), IntegerRow(K, int(rows[3:]), has_starts=False).words), np.int32)
    made = kernels.run(f"round_{rows}", len(x), {"q": empty}, x=x)["q"]
    return made.view(np.uint32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rows", "tile"), CASES)
def test_products(kernels: CudaKernels, dtype: str, rows: str, tile: int, kind: str) -> None:
    w = pack_formatted(normal(N, K), dtype).view(np.uint32)
    weight = normal(K, seed=1)
    for tokens in (1, TOKENS):
        x = normal(tokens, K, seed=tokens)
        outputs, first = {"y": (tokens, N)}, {}
        apart = x
        if kind == "norm":
            first = {"norm": weight}
            apart = kernels.run("norm", tokens, {"y": (tokens, K)}, x=x, w=weight)["y"]
        name = f"{dtype}_{rows}"
        want = kernels.run(f"plain_{name}", tokens, outputs, w=w, x=rounded(kernels, apart, rows))
        got = kernels.run(f"{kind}_{name}", tokens, outputs, w=w, x=x, **first)
        np.testing.assert_array_equal(got["y"], want["y"])


def test_gated_norms_of_heads(kernels: CudaKernels) -> None:
    w = pack_formatted(normal(N, K), "i5g64").view(np.uint32)
    weight = normal(HEAD, seed=1)
    for tokens in (1, TOKENS):
        o, z = normal(tokens, K, seed=tokens), normal(tokens, K, seed=9)
        outputs = {"y": (tokens, N)}
        y = kernels.run("gated", tokens, {"y": (tokens, K)}, o=o, z=z, norm_w=weight)["y"]
        rows = rounded(kernels, y, "q8g64")
        want = kernels.run("plain_i5g64_q8g64", tokens, outputs, w=w, x=rows)
        got = kernels.run("gated_q8g64", tokens, outputs, w=w, x=o, norm=weight, gate=z)
        np.testing.assert_array_equal(got["y"], want["y"])


def test_experts(kernels: CudaKernels) -> None:
    w = pack_formatted(normal(E, 64, K), "i5g64", "experts_swiglu").view(np.uint32)
    x, weight, ids = normal(2, K, seed=2), normal(K, seed=1), np.array([4, 0, 1, 1], np.int32)
    outputs = {"y": (4, 32)}
    apart = kernels.run("norm", 2, {"y": (2, K)}, x=x, w=weight)["y"]
    want = kernels.run("up", 2, outputs, w=w, x=rounded(kernels, apart, "q8g64"), ids=ids)
    got = kernels.run("norm_up", 2, outputs, w=w, x=x, norm=weight, ids=ids)
    np.testing.assert_array_equal(got["y"], want["y"])


@pytest.mark.nightly
def test_no_barrier_can_go(kernels: CudaKernels) -> None:
    w = pack_formatted(normal(N, K), "i4g32").view(np.uint32)
    given = {"w": w, "x": normal(2, K), "norm": normal(K), "y": np.full((2, N), np.nan, np.float32)}
    # Between the rows that are staged one after another TVM puts one that it cannot see to be needless.
    assert unseen_barriers(kernels, "norm_i4g32_q8g32", 2, **given) == 1
