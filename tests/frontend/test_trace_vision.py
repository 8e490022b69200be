"""The vision tower traced and imported: equal to PyTorch eager, whatever the grid."""

from __future__ import annotations

import numpy as np
import pytest

from q35c.errors import ConfigError, UnsupportedConfig
from q35c.frontend.trace_vision import hf_vision_config, trace_tower, vision_module
from q35c.ir.interpret import run
from q35c.ir.text import parse_graph, print_graph
from q35c.runtime.grid import grid_inputs
from q35c.vision_config import VisionConfig
from tests.pictures import (
    GRIDS,
    eager_rows,
    picture_inputs,
    tower_config,
    tower_graph,
    tower_weights,
)

KINDS = ("plain", "odd")


@pytest.mark.parametrize("kind", KINDS)
def test_imported_tower_equals_eager(kind: str) -> None:
    config = tower_config(kind)
    for grid in GRIDS:
        inputs = picture_inputs(config, grid)
        (rows,) = run(tower_graph(config), inputs, tower_weights(config))
        expected = eager_rows(config, grid, inputs["patches"])
        assert rows.shape == expected.shape == (grid[0] * grid[1] // 4, config.out_hidden_size)
        assert np.abs(rows - expected).max() <= 1e-5 * np.abs(expected).max()


def test_graph_has_one_symbol_and_canonical_weights() -> None:
    config = tower_config()
    graph = tower_graph(config)
    assert {v.name: str(v.type) for v in graph.inputs} == {
        "patches": "u8[4*T, 96]", "taps": "i32[4*T, 4]", "tap_weights": "f32[4*T, 4]", "places": "i32[4*T, 2]",
    }  # fmt: skip
    assert [str(value.type) for value in graph.outputs] == ["f32[T, 48]"]
    weights = {value.name: value.type.shape for value in graph.leaves("weight")}
    assert weights == {name: array.shape for name, array in tower_weights(config).items()}
    assert parse_graph(print_graph(graph)) == graph


def test_transformers_is_left_as_it_was() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = set(ALL_ATTENTION_FUNCTIONS)
    trace_tower(tower_config())
    assert set(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.parametrize("grid", [(2, 2), (48, 48), (2, 94), (94, 4), (34, 46)])
def test_inputs_of_a_grid_are_those_of_transformers(grid: tuple[int, int]) -> None:
    import torch
    from transformers.vision_utils import (
        get_vision_interpolation_indices_and_weights,
        get_vision_position_ids,
    )

    where = torch.tensor([[1, *grid]])
    taps, weights = get_vision_interpolation_indices_and_weights(
        where, num_grid_per_side=48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    made = grid_inputs(*grid, 48)
    np.testing.assert_array_equal(made.places, get_vision_position_ids(where, 2).numpy())
    np.testing.assert_allclose(made.tap_weights, weights.numpy(), atol=1e-6)
    # A tap without weight may be any row.
    np.testing.assert_array_equal(
        np.where(made.tap_weights > 0, made.taps, 0), np.where(weights > 0, taps, 0)
    )
    np.testing.assert_allclose(made.tap_weights.sum(-1), 1, atol=1e-6)


def test_config_round_trips_and_is_what_transformers_takes() -> None:
    config = tower_config("odd")
    assert VisionConfig.from_dict(config.to_dict()) == config
    settings = hf_vision_config(config)
    model = vision_module().Qwen3_5VisionModel(settings)
    assert sum(p.numel() for p in model.parameters()) == sum(
        array.size for array in tower_weights(config).values()
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_heads": 3}, "hidden_size"),
        ({"num_heads": 16}, "num_heads"),
        ({"intermediate_size": 100}, "intermediate_size"),
        ({"num_position_embeddings": 35}, "num_position_embeddings"),
        ({"depth": 0}, "depth"),
        ({"more": 1}, "more"),
    ],
)
def test_a_tower_without_kernels_is_refused_by_name(change: dict[str, int], word: str) -> None:
    with pytest.raises((ConfigError, UnsupportedConfig), match=word):
        tower_config(**change)
