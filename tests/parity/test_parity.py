"""R12: compiled models against eager PyTorch in fp32, which is the oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from q35c.frontend.checkpoint import open_checkpoint
from q35c.ir import Graph, interpret
from q35c.ir.precision import POLICIES
from q35c.passes.pipeline import Choices, run_pipeline
from q35c.verify import row_kl
from tests.compiled import checkpoint, graph_of, model, oracle_logits, random_ids

KINDS = ("dense", "moe")
# Legal but odd: each names what it stretches.
ODD_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "one key head, four value heads": (
        "dense",
        {"linear_num_key_heads": 1, "linear_num_value_heads": 4, "vocab_size": 331},
    ),
    "unequal delta head dims, three to one": (
        "dense",
        {"linear_key_head_dim": 48, "linear_value_head_dim": 80, "linear_num_value_heads": 6},
    ),
    "one kv head, head dim 256, tied head": (
        "dense",
        {"num_key_value_heads": 1, "num_attention_heads": 3, "head_dim": 256,
         "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                             "mrope_section": [11, 11, 10], "mrope_interleaved": True}},
    ),
    "shared expert wider than the routed, full last layer": (
        "moe",
        {"shared_expert_intermediate_size": 176, "moe_intermediate_size": 16, "num_hidden_layers": 2},
    ),
    "512 experts, top 10": ("moe", {"num_experts": 512, "num_experts_per_tok": 10, "hidden_size": 32}),
}  # fmt: skip


def assert_parity(got: np.ndarray, want: np.ndarray) -> None:
    """Max difference within 1e-3 of the range; equal argmax where the oracle has no tie."""
    spread = want.max() - want.min()
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= 1e-3 * spread
    top = np.sort(want, axis=-1)
    clear = top[..., -1] - top[..., -2] > 2e-3 * spread
    assert (got.argmax(-1) == want.argmax(-1))[clear].all()


@cache
def score_graph(kind: str, precision: str) -> Graph:
    """Return what is interpreted: the quantized graph that scores a prompt."""
    config = open_checkpoint(checkpoint(kind, precision)).config
    module = run_pipeline(graph_of(config), Choices(POLICIES[precision]))
    (score,) = (graph for graph in module if graph.name == "score")
    return score


def interpreted(kind: str, precision: str, ids: np.ndarray) -> np.ndarray:
    """Run a whole prompt by the numpy interpreter."""
    opened, score = open_checkpoint(checkpoint(kind, precision)), score_graph(kind, precision)
    sizes = {"B": 1, "CTX": len(ids)}
    state = {v.name: interpret.zeros(v.type, sizes) for v in score.leaves("state")}
    inputs = {
        "tokens": ids.astype(np.int32),
        "positions": np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids))),
        "slots": np.zeros(1, np.int64),
        "starts": np.zeros(1, np.int32),
    }
    weights = lambda name: opened.read(name, 0, opened.shape(name)[0])  # noqa: E731
    return interpret.run(score, inputs, weights, state)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 130, 300])
def test_score_equals_eager(kind: str, length: int) -> None:
    ids = random_ids(length, seed=length)
    assert_parity(model(kind).score(ids), oracle_logits(ids, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_equal_eager(kind: str) -> None:
    ids = random_ids(90, seed=5)
    want = oracle_logits(ids, kind)
    with model(kind).session() as session:
        got = [session.prefill(ids[:70])] + [session.decode(int(token)) for token in ids[70:]]
    assert_parity(np.stack(got), want[69:])


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_odd_shapes_equal_eager(name: str) -> None:
    kind, overrides = ODD_SHAPES[name]
    frozen = {
        key: Frozen(value) if isinstance(value, dict) else value for key, value in overrides.items()
    }
    compiled = model(kind, **frozen)
    ids = random_ids(77, compiled.manifest.model.vocab_size, seed=1)
    want = oracle_logits(ids, kind, **frozen)
    assert_parity(compiled.score(ids), want)
    with compiled.session() as session:
        session.prefill(ids[:40])
        got = np.stack([session.decode(int(token)) for token in ids[40:]])
    assert_parity(got, want[40:])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_stay_close(kind: str) -> None:
    ids = random_ids(256, seed=9)
    got, want = model(kind, "bf16").score(ids), oracle_logits(ids, kind, "bf16")
    assert row_kl(got, want).mean() <= 1e-3


ROUNDED = [
    *(("dense", name, "f32") for name in ("bf16", "w8", "w4-small")),
    *(("moe", name, "f32") for name in ("bf16", "w8", "w4")),
]
# Experts know nothing of the cache, and a shared expert that is apart is an ordinary linear.
INT8_CACHE = [("dense", "f32", "int8")]
APART = [("moe-apart", "bf16", "f32"), ("moe-apart", "w4", "f32")]
# Formats that are among these, in other company.
NIGHTLY = [
    pytest.param(*case, marks=pytest.mark.nightly)
    for case in (
        ("dense", "w4", "f32"),
        ("moe", "w4-small", "f32"),
        ("dense", "w8", "int8"),
        ("moe-apart", "w8", "f32"),
    )
]


@pytest.mark.parametrize(("kind", "precision", "cache"), [*ROUNDED, *INT8_CACHE, *APART, *NIGHTLY])
def test_rounding_equals_the_interpreter(
    kind: str, precision: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is lost is lost by the formats alone: numpy with the same rounding gives the same logits.

    A bf16 cache is left out: the kernels for it round queries and weights too. A value on the border between
    two codes may fall either way, about once in twelve tokens, and the state carries that on: of short prompts
    most rows agree to rounding, the others differ by a code's step.
    """
    name = f"{precision}-{cache}-cache"
    monkeypatch.setitem(POLICIES, name, replace(POLICIES[precision], name=name, cache=cache))
    prompts = [random_ids(8, seed=seed) for seed in range(10)]
    got = np.stack([model(kind, name).score(ids) for ids in prompts])
    want = np.stack([interpreted(kind, name, ids) for ids in prompts])
    error = np.abs(got - want).max(-1) / np.ptp(want)
    assert np.median(error) <= 1e-4
    assert row_kl(np.concatenate(got), np.concatenate(want)).mean() <= 1e-3


class Frozen(dict):  # a config value that can be part of a cache key
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))
