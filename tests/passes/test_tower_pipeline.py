"""The fusions on the traced vision tower, with random weights."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest

from q35c.ir import Graph
from q35c.ir.interpret import run
from q35c.ir.ops import OPS
from q35c.ir.text import parse_graph, print_graph
from q35c.passes.pipeline import FUSION, fuse
from tests.pictures import picture_inputs, tower_config, tower_graph, tower_weights

CONFIG = tower_config("odd")
OURS = ("fuse_pixels", "fuse_interpolation", "fuse_picture_attention", "fuse_bias")


@cache
def fused() -> Graph:
    return fuse(tower_graph(CONFIG))


@cache
def traced_rows() -> np.ndarray:
    return rows(tower_graph(CONFIG))


def rows(graph: Graph) -> np.ndarray:
    wide = {name: array.astype(np.float64) for name, array in tower_weights(CONFIG).items()}
    return run(graph, picture_inputs(CONFIG, (4, 6)), wide)[0]


def test_only_fused_ops_remain_that_are_allowed_to_the_end() -> None:
    assert Counter(op.kind for op in fused().ops) == {
        "scale_pixels": 1, "interpolate_rows": 1, "axial_rotary_table": 1, "layer_norm": 3, "reshape": 1,
        "picture_attention": 1, "linear_bias": 2, "linear_bias_gelu": 2, "linear_bias_residual": 3,
    }  # fmt: skip
    assert {OPS[op.kind].stages[1] for op in fused().ops} == {"scheduled"}


@pytest.mark.parametrize("left_out", [None, *OURS])
def test_fusion_keeps_the_rows_whatever_pass_is_left_out(left_out: str | None) -> None:
    graph = fuse(tower_graph(CONFIG), [row for row in FUSION if row.name != left_out])
    assert (graph == fused()) == (left_out is None)
    expected = traced_rows()
    # Angles and pixels are f32 on both sides, but rounded at other places.
    assert np.abs(rows(graph) - expected).max() <= 1e-7 * np.abs(expected).max()


def test_fused_graph_is_canonical_and_round_trips() -> None:
    assert fuse(fused()) == fused()
    assert parse_graph(print_graph(fused())) == fused()
