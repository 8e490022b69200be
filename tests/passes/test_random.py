"""Passes keep the meaning of random graphs, and of graphs that almost look like what they fuse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from q35c.ir import Graph
from q35c.ir.interpret import run
from q35c.ir.text import parse_graph, print_graph
from q35c.passes.pipeline import FUSION, fuse
from tests.ir.random_graphs import random_graph
from tests.passes.arrays import compare, draw_arrays, is_single, run_on
from tests.passes.mutants import mutants
from tests.passes.test_goldens import PASSES

SEEDS = range(320)
MUTANTS = 12  # of each golden
FUSIONS = sorted({row.name for row in FUSION})
GOLDENS = {name: sorted(Path(__file__).parent.glob(f"{name}/*.txt")) for name in FUSIONS}
MATCHING = (
    "canonicalize",
    "fuse_bias",
    "fuse_linear",
    "fuse_norm",
)  # what random graphs hold work for


def random_case(seed: int) -> tuple[Graph, list[np.ndarray], tuple, float]:
    """Return a graph, its outputs, its arrays and a tolerance that rounding stays within."""
    graph, *arrays = random_graph(seed, stage="fused")
    if is_single(graph):
        return graph, run(graph, *arrays), tuple(arrays), 4e-3
    wide = tuple({n: a.astype(np.float64) for n, a in group.items()} for group in arrays)
    return graph, run(graph, *wide), wide, 1e-9


@pytest.fixture(scope="module")
def cases():
    return [random_case(seed) for seed in SEEDS]


@pytest.mark.parametrize("name", MATCHING)
def test_pass_keeps_random_graphs(name: str, cases) -> None:
    for seed, (graph, expected, arrays, tolerance) in zip(SEEDS, cases, strict=True):
        made = PASSES[name](graph)
        where = f"{name}, random_graph({seed}, stage='fused')"
        check(made, expected, arrays, tolerance, where)
        assert PASSES[name](made) == made, f"{where}: a second run changes it again"


def test_pipeline_keeps_random_graphs(cases) -> None:
    for seed, (graph, expected, arrays, tolerance) in zip(SEEDS, cases, strict=True):
        graph = fuse(graph)
        check(graph, expected, arrays, tolerance, f"FUSION, random_graph({seed}, stage='fused')")


def check(graph: Graph, expected, arrays, tolerance: float, where: str) -> None:
    assert parse_graph(print_graph(graph)) == graph, where
    for a, b in zip(expected, run(graph, *arrays), strict=True):
        assert a.shape == b.shape, where
        assert np.abs(a - b).max() <= tolerance * (1 + np.abs(a).max()), where


def test_random_graphs_are_fused_often_enough(cases) -> None:
    """Graphs without anything to fuse would prove nothing."""
    counts: Counter[str] = Counter()
    for graph, *_ in cases:
        for name in MATCHING:
            counts[name] += PASSES[name](graph) != graph
    assert min(counts.values()) >= 40 and len(counts) == len(MATCHING), counts


@pytest.mark.parametrize("name", FUSIONS)
def test_pass_keeps_mutants(name: str) -> None:
    """Small changes to goldens: the pass must see them or leave the graph alone, and never fail."""
    tested = fused = 0
    for path in GOLDENS[name]:
        graph = parse_graph(path.read_text().partition("---\n")[0])
        for seed in range(3):
            for mutant in mutants(graph, np.random.default_rng(seed), MUTANTS // 3):
                outcome = keeps_meaning(name, mutant, f"{path.stem}, seed {seed}")
                tested += outcome is not None
                fused += outcome is True
    assert tested >= 2 * len(GOLDENS[name]) and fused >= 3, (tested, fused)


def keeps_meaning(name: str, graph: Graph, where: str) -> bool | None:
    """Compare before and after; return whether the pass changed the graph, None if it overflows."""
    text = print_graph(graph)
    try:
        made = PASSES[name](graph)
    except Exception as problem:
        raise AssertionError(f"{name} fails on {where}:\n{text}") from problem
    dtype, tolerance = (np.float32, 1e-3) if is_single(graph) else (np.float64, 1e-8)
    expected, got = (
        run_on(g, draw_arrays(graph, made, seed=7, dtype=dtype)) for g in (graph, made)
    )
    if not all(np.isfinite(a).all() for a in expected):
        return None
    compare(expected, got, tolerance, f"{name} changes the meaning of {where}:\n{text}")
    return made != graph
