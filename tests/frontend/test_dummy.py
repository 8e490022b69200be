"""Dummy weights: the same values however rows are asked for, and spreads that fit the role."""

import numpy as np
import pytest

from q35c.frontend import family
from q35c.frontend.dummy import DummyWeights
from q35c.frontend.hf_config import read_hf_config
from tests.models import config_document

BIG = DummyWeights(family.load("qwen3.5-35b-a3b"), seed=3)
SMALL = DummyWeights(read_hf_config(config_document("moe")), seed=3)


@pytest.mark.parametrize(
    ("weights", "name", "start", "stop"),
    [
        (BIG, "embed_tokens.weight", 0, 100),
        (BIG, "layers.0.linear_attn.in_proj_qkv.weight", 0, 70),
        (BIG, "layers.0.mlp.experts.down_proj", 254, 256),
        (SMALL, "layers.0.mlp.experts.gate_up_proj", 0, 8),
        (SMALL, "layers.0.linear_attn.A_log", 0, 4),
        (SMALL, "layers.0.linear_attn.conv1d.weight", 0, 256),
        (SMALL, "norm.weight", 0, 64),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_slicing_gives_equal_rows(
    weights: DummyWeights, name: str, start: int, stop: int
) -> None:
    whole = weights.rows(name, start, stop)
    assert whole.shape == (stop - start, *weights.shapes[name][1:])
    random = np.random.default_rng(0)
    for _ in range(8):
        low, high = sorted(random.integers(start, stop + 1, 2))
        part = weights.rows(name, low, high)
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, whole[low - start : high - start])
    joined = [weights.rows(name, row, row + 1) for row in range(start, stop)]
    np.testing.assert_array_equal(np.concatenate(joined), whole)


def test_seed_name_and_row_decide() -> None:
    config = read_hf_config(config_document())
    first, again, other = (DummyWeights(config, seed) for seed in (1, 1, 2))
    name, sibling = "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"
    rows = first.rows(name, 0, 112)
    np.testing.assert_array_equal(rows, again.rows(name, 0, 112))
    assert np.abs(rows - other.rows(name, 0, 112)).min() > 0
    assert np.abs(rows - first.rows(sibling, 0, 112)).min() > 0
    assert np.unique(rows).size == rows.size


def test_blocks_differ() -> None:
    rows = BIG.rows("embed_tokens.weight", 0, 96)
    for block in range(1, 3):
        assert np.abs(rows[:32] - rows[32 * block : 32 * (block + 1)]).min() >= 0
        assert not np.array_equal(rows[:32], rows[32 * block : 32 * (block + 1)])


@pytest.mark.parametrize(
    ("name", "mean", "spread"),
    [
        ("embed_tokens.weight", 0.0, 0.02),
        ("layers.0.linear_attn.in_proj_qkv.weight", 0.0, 0.02),
        ("layers.0.linear_attn.conv1d.weight", 0.0, 0.3),
        ("layers.0.linear_attn.norm.weight", 1.0, 0.02),
        ("layers.0.input_layernorm.weight", 0.0, 0.02),
        ("layers.3.self_attn.q_norm.weight", 0.0, 0.02),
        ("layers.0.linear_attn.dt_bias", 1.0, 0.0),
        ("layers.0.mlp.shared_expert_gate.weight", 0.0, 0.02),
    ],
)
def test_spread_fits_the_role(name: str, mean: float, spread: float) -> None:
    rows = BIG.rows(name, 0, min(BIG.shapes[name][0], 500))
    assert rows.mean() == pytest.approx(mean, abs=4 * spread / rows.size**0.5 + 1e-6)
    assert rows.std() == pytest.approx(spread, rel=0.3)


def test_decay_rates_cover_their_range() -> None:
    decays = np.concatenate([BIG.rows(f"layers.{i}.linear_attn.A_log", 0, 32) for i in (0, 1, 2)])
    assert np.log(0.01) <= decays.min() and decays.max() <= np.log(16)
    assert decays.max() > np.log(8)
