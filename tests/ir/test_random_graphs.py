"""Random graphs: they round-trip through text, run, and are varied enough to test passes with."""

import numpy as np
import pytest

from q35c.ir.interpret import concrete, run
from q35c.ir.ops import OPS
from q35c.ir.text import parse_graph, print_graph
from q35c.ir.verify import verify
from tests.ir.random_graphs import random_graph

SEEDS = range(200)


@pytest.fixture(scope="module")
def drawn():
    return [random_graph(seed) for seed in SEEDS]


def test_text_round_trips(drawn):
    for graph, _, _ in drawn:
        text = print_graph(graph)
        assert parse_graph(text) == graph, graph.name
        assert print_graph(parse_graph(text)) == text, graph.name


def test_interpreter_returns_the_declared_types(drawn):
    for graph, inputs, weights in drawn:
        verify(graph)
        arrays = run(graph, inputs, weights)
        for value, array in zip(graph.outputs, arrays, strict=True):
            assert array.shape == concrete(value.type.shape, {"T": len(inputs["x"])}), graph.name
            assert array.dtype == np.float32, graph.name
            assert np.isfinite(array).all(), graph.name


def test_float32_is_close_to_float64(drawn):
    """Ill-conditioned graphs would make comparisons before and after a pass meaningless."""
    for graph, inputs, weights in drawn:
        single = run(graph, inputs, weights)
        wide = [{n: a.astype(np.float64) for n, a in group.items()} for group in (inputs, weights)]
        for a, b in zip(single, run(graph, *wide), strict=True):
            assert np.abs(a - b).max() <= 2e-3 * (1 + np.abs(b).max()), graph.name


def test_equal_seeds_give_equal_graphs(drawn):
    for seed in (0, 17):
        graph, inputs, weights = random_graph(seed)
        assert graph == drawn[seed][0]
        for old, new in zip(drawn[seed][1:], (inputs, weights), strict=True):
            assert all(np.array_equal(old[name], new[name]) for name in old)
    assert len({print_graph(graph) for graph, _, _ in drawn}) == len(drawn)


def test_graphs_use_every_op_they_may(drawn):
    used = {op.kind for graph, _, _ in drawn for op in graph.ops}
    composites = {"embedding", "topk", "constant", "causal_conv", "delta_rule", "attention"}
    composites |= {"experts", "rotary_table", "linear_swiglu", "linear_residual"}
    composites |= {"full_attention", "picture_attention", "axial_rotary_table", "scale_pixels"}
    composites |= {"interpolate_rows", "linear_bias", "linear_bias_gelu", "linear_bias_residual"}
    traced = {kind for kind, spec in OPS.items() if spec.stages[0] == "traced"}
    assert traced - composites - {"sparse_moe", "sparse_moe_residual"} == used
