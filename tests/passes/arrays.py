"""Arrays for any graph, drawn by name: graphs before and after a pass get the same ones."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from q35c.ir import Graph, Value
from q35c.ir.interpret import concrete, run

SIZES = {"T": 5, "B": 2, "CTX": 8}
INDICES = 5  # integers are below this: tables and experts of test graphs have at least as many rows
ZEROS = ("slots", "starts")


@dataclass(frozen=True)
class Arrays:
    """Arrays by name; the state is empty: zeros, but NaN in the key/value cache."""

    inputs: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


def draw(value: Value, seed: int, sizes: dict[str, int], dtype: type) -> np.ndarray:
    """Draw the array of a value; equal names and shapes give equal arrays."""
    shape = concrete(value.type.shape, sizes)
    rng = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
    if value.kind == "state":
        is_cache = value.name.endswith(("keys", "values"))
        return np.full(shape, np.nan if is_cache else 0.0, dtype)
    if value.type.dtype == "u8":
        return rng.integers(0, 256, shape).astype(np.uint8)
    if value.type.dtype in ("i32", "i64"):
        kind = {"i32": np.int32, "i64": np.int64}[value.type.dtype]
        return rng.integers(0, 1 if value.name in ZEROS else INDICES, shape).astype(kind)
    scale = shape[-1] ** -0.5 if value.kind == "weight" and len(shape) > 1 else 1.0
    return (scale * rng.standard_normal(shape)).astype(np.float32).astype(dtype)


def draw_arrays(
    *graphs: Graph, seed: int = 0, sizes: dict[str, int] = SIZES, dtype: type = np.float64
) -> Arrays:
    """Draw inputs, weights and empty state for all of these graphs."""
    made = []
    for kind in ("value", "weight", "state"):
        leaves = [v for g in graphs for v in (g.inputs if kind == "value" else g.leaves(kind))]
        made.append({leaf.name: draw(leaf, seed, sizes, dtype) for leaf in leaves})
    return Arrays(*made)


def is_single(graph: Graph) -> bool:
    """Tell whether the graph rounds to f32 even where it is given f64."""
    return any(
        op.kind == "cast" and op.operands[0].type.dtype == "f32" and op.attrs["dtype"] == "f32"
        for op in graph.ops
    )


def run_on(graph: Graph, arrays: Arrays) -> list[np.ndarray]:
    """Run a graph by the interpreter; the state is updated in place."""
    with np.errstate(all="ignore"):
        return run(graph, arrays.inputs, arrays.weights, arrays.state)


def assert_same_meaning(
    before: Graph, after: Graph, where: str, seed: int = 0, loss: float = 0.0
) -> None:
    """Run both graphs on the same arrays in f64 and compare: 1e-9 (or `loss`) relative to the largest."""
    dtype, tolerance = (np.float32, 1e-5) if is_single(before) else (np.float64, 1e-9)
    tolerance = max(tolerance, loss)
    expected, got = (
        run_on(graph, draw_arrays(before, after, seed=seed, dtype=dtype))
        for graph in (before, after)
    )
    compare(expected, got, tolerance, f"{where}, seed {seed}")


def median_loss(before: Graph, after: Graph, seeds: int = 15) -> float:
    """Return the median, over draws, of the largest difference relative to the largest element."""
    losses = []
    for seed in range(seeds):
        made = (run_on(g, draw_arrays(before, after, seed=seed)) for g in (before, after))
        pairs = zip(*made, strict=True)
        losses.append(max(np.abs(b - a).max() / (np.abs(a).max() + 1e-300) for a, b in pairs))
    return float(np.median(losses))


def compare(
    expected: list[np.ndarray], got: list[np.ndarray], tolerance: float, where: str
) -> None:
    """Compare arrays to a tolerance relative to the largest element of each."""
    assert len(expected) == len(got), where
    for a, b in zip(expected, got, strict=True):
        assert np.isfinite(a).all(), f"{where}: the arrays drawn prove nothing"
        bound = tolerance * (np.abs(a).max() + 1e-300)
        np.testing.assert_allclose(b, a, rtol=0, atol=bound, err_msg=where)
