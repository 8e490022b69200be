"""The stateful ops continue what the stateless ones compute at once, for every split of the tokens."""

import numpy as np
import pytest

from q35c.ir import reference as ref

TOKENS, SEQUENCES, CONTEXT = 7, 2, 9
DELTA = {"key_heads": 2, "value_heads": 4, "eps": 1e-6}
HEADS = {"heads": 4, "kv_heads": 2, "eps": 1e-6, "scale": 0.5}
DELTA_SHAPES = {"qkv": 32, "z": 16, "b": 4, "a": 4}  # Hk 2, Dk 4, Hv 4, Dv 4
DELTA_WEIGHTS = {"conv_w": (32, 1, 4), "a_log": (4,), "dt_bias": (4,), "norm_w": (4,)}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


class DeltaNet:
    """Two sequences' inputs and one layer's weights."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rows = [
            [normal(rng, TOKENS, n) for n in DELTA_SHAPES.values()] for _ in range(SEQUENCES)
        ]
        self.weights = [normal(rng, *shape) for shape in DELTA_WEIGHTS.values()]
        self.state = np.zeros((SEQUENCES, 3, 32)), np.zeros((SEQUENCES, 4, 4, 4))

    def whole(self, sequence: int) -> np.ndarray:
        return ref.gated_delta_net(*self.rows[sequence], *self.weights, **DELTA)[0]

    def step(self, slots: list[int], part: slice, rows: str) -> np.ndarray:
        inputs = [
            np.concatenate(xs)
            for xs in zip(*([x[part] for x in self.rows[s]] for s in slots), strict=True)
        ]
        starts = np.full(len(slots), part.start)
        return ref.stateful_gated_delta_net(
            *inputs, *self.weights, np.array(slots), starts, *self.state, rows=rows, **DELTA
        )


class Attention:
    """The same for one attention layer; unwritten cache cells hold NaN."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rows = [[normal(rng, TOKENS, n) for n in (64, 16, 16)] for _ in range(SEQUENCES)]
        self.norms = [normal(rng, 8), normal(rng, 8)]
        self.table = ref.rotary_table(
            np.tile(np.arange(TOKENS), (3, 1)), (1.0, 0.1), (1, 1, 0), 1.0
        )
        self.state = [np.full((SEQUENCES, CONTEXT, 2, 8), np.nan) for _ in range(2)]

    def whole(self, sequence: int) -> np.ndarray:
        return ref.gated_attention(*self.rows[sequence], *self.norms, self.table, **HEADS)

    def step(self, slots: list[int], part: slice, rows: str) -> np.ndarray:
        inputs = [
            np.concatenate(xs)
            for xs in zip(*([x[part] for x in self.rows[s]] for s in slots), strict=True)
        ]
        table = np.concatenate([self.table[part]] * len(slots))
        starts = np.full(len(slots), part.start)
        return ref.stateful_gated_attention(
            *inputs, *self.norms, table, np.array(slots), starts, *self.state, rows=rows, **HEADS
        )


@pytest.mark.parametrize("layer", [DeltaNet, Attention])
@pytest.mark.parametrize("split", range(1, TOKENS))
def test_two_chunks_equal_one(layer, split: int):
    net = layer(split)
    parts = [net.step([1], part, "sequence") for part in (slice(0, split), slice(split, TOKENS))]
    np.testing.assert_allclose(np.concatenate(parts), net.whole(1), rtol=1e-9, atol=1e-12)
    untouched = net.state[0][0]
    assert (np.isnan(untouched) | (untouched == 0)).all()


@pytest.mark.parametrize("layer", [DeltaNet, Attention])
def test_rows_of_a_batch_are_independent_sequences(layer):
    net = layer(0)
    order = [1, 0]
    steps = [net.step(order, slice(t, t + 1), "batch") for t in range(TOKENS)]
    for row, sequence in enumerate(order):
        got = np.stack([step[row] for step in steps])
        np.testing.assert_allclose(got, net.whole(sequence), rtol=1e-9, atol=1e-12)
