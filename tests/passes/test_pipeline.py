"""The pipeline on graphs traced from Hugging Face's own model code, with tiny random weights."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q35c.config import ModelConfig
from q35c.frontend.hf_config import read_hf_config
from q35c.ir import Graph
from q35c.ir.interpret import Weights, run
from q35c.ir.ops import OPS
from q35c.ir.precision import POLICIES
from q35c.ir.text import parse_graph, print_graph
from q35c.passes import pipeline
from q35c.passes.canonicalize import canonicalize
from q35c.passes.pipeline import Choices
from tests.compiled import graph_of
from tests.models import config_document, random_weights
from tests.passes.arrays import compare
from tests.passes.sequences import Sequences, random_prompt

F32 = POLICIES["f32"]
TOLERANCE = 1e-9  # relative, in f64
TOKENS, VOCABULARY = 7, 307
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 1024, "mrope_section": [4, 3, 1],
    "mrope_interleaved": True,
}  # fmt: skip
LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "moe": ("moe", {}),
    "dense_other_heads": (
        "dense",
        {
            "num_key_value_heads": 4, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 2,
            "tie_word_embeddings": True, "rope_parameters": YARN, "rms_norm_eps": 1e-5,
        },
    ),
}  # fmt: skip
COMMON = {
    "embedding": 1, "rms_norm": 5, "rotary_table": 1, "gated_delta_net": 1, "gated_attention": 1,
}  # fmt: skip
FUSED = {  # slices are views of merged linears; the rest becomes kernels
    "dense": COMMON
    | {"linear": 4, "slice": 7, "linear_residual": 4, "linear_swiglu": 2},
    "moe": COMMON
    | {"linear": 8, "slice": 11, "linear_residual": 2, "linear_swiglu": 2, "sparse_moe_residual": 2},
}  # fmt: skip
FUSED["dense_other_heads"] = FUSED["dense"]


@cache
def config_of(name: str) -> ModelConfig:
    kind, overrides = MODELS[name]
    document = config_document(kind, full_attention_interval=None, **LAYERS, **overrides)
    return read_hf_config(document)


@cache
def traced(name: str) -> Graph:
    return graph_of(config_of(name))


@cache
def fused(name: str) -> Graph:
    return pipeline.fuse(traced(name))


@cache
def weights_of(name: str) -> Weights:
    drawn = random_weights(config_of(name), seed=1)
    return {leaf: tensor.double().numpy() for leaf, tensor in drawn.items()}


def logits(graph: Graph, name: str) -> np.ndarray:
    tokens, positions = random_prompt(0, TOKENS, VOCABULARY)
    return run(graph, {"tokens": tokens, "positions": positions}, weights_of(name))[0]


@cache
def traced_logits(name: str) -> np.ndarray:
    return logits(traced(name), name)


@pytest.mark.parametrize("name", MODELS)
def test_only_fused_ops_remain(name: str) -> None:
    assert Counter(op.kind for op in fused(name).ops) == FUSED[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_op_that_remains_is_allowed_to_the_end(name: str) -> None:
    """Mixers get their stateful form; no other op may need a later rewrite."""
    for entry in pipeline.run_pipeline(traced(name), Choices(F32)):
        late = {op.kind for op in entry.ops if OPS[op.kind].stages[1] != "scheduled"}
        assert not late, entry.name


@pytest.mark.parametrize("name", MODELS)
def test_fusion_keeps_the_logits(name: str) -> None:
    compare([traced_logits(name)], [logits(fused(name), name)], TOLERANCE, name)


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("left_out", range(len(pipeline.FUSION)))
def test_any_pass_may_be_left_out(name: str, left_out: int) -> None:
    missing = pipeline.FUSION[left_out].name
    steps = pipeline.FUSION[:left_out] + pipeline.FUSION[left_out + 1 :]
    graph = pipeline.fuse(traced(name), steps)
    compare([traced_logits(name)], [logits(graph, name)], TOLERANCE, f"{name} without {missing}")


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_every_fusion_has_work(name: str) -> None:
    """Without the work of a pass, leaving it out would prove nothing."""
    idle = {
        "accept_rows",
        "fuse_pixels",
        "fuse_interpolation",
        "fuse_picture_attention",
        "fuse_bias",
    }
    idle |= {"fold_moe"} if name == "dense" else set()
    for missing in {row.name for row in pipeline.FUSION} - {"canonicalize"} - idle:
        kept = [row for row in pipeline.FUSION if row.name != missing]
        assert pipeline.fuse(traced(name), kept) != fused(name), missing


@pytest.mark.parametrize("name", MODELS)
def test_fused_graph_is_canonical_and_round_trips(name: str) -> None:
    graph = fused(name)
    assert canonicalize(graph) == graph
    assert pipeline.fuse(graph) == graph
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize("name", MODELS)
def test_entries_continue_a_sequence(name: str) -> None:
    """Prefill, then decode token by token, beside another sequence: the one-shot logits."""
    module = pipeline.run_pipeline(traced(name), Choices(F32))
    tokens, positions = random_prompt(0, TOKENS, VOCABULARY)
    other, elsewhere = random_prompt(1, TOKENS, VOCABULARY)
    sequences = Sequences(module)
    sequences.weights = weights_of(name)
    scored = sequences.run("score", tokens, positions, [0], [0])
    compare([traced_logits(name)], [scored], TOLERANCE, f"{name}, score")
    sequences.run("prefill", other[:3], elsewhere[:, :3], [1], [0])
    first = sequences.run("prefill", tokens[:2], positions[:, :2], [2], [0])
    compare([scored[1:2]], [first], TOLERANCE, f"{name}, prefill")
    for step in range(2, 6):
        row = np.array([other[step + 1], tokens[step]])
        where = np.stack([elsewhere[:, step + 1], positions[:, step]], 1)
        got = sequences.run("decode", row, where, [1, 2], [step + 1, step])
        compare([scored[step]], [got[1]], TOLERANCE, f"{name}, decode at {step}")


def test_dump_writes_each_stage_that_changed(tmp_path: Path) -> None:
    module = pipeline.run_pipeline(traced("dense"), Choices(POLICIES["w4"]), dump=tmp_path)
    files = sorted(tmp_path.iterdir())
    names = [path.stem.split("_", 1)[1] for path in files]
    assert names == [
        "import", "canonicalize", "fuse_norm", "fuse_rotary", "fuse_gated_delta", "fuse_attention",
        "canonicalize", "fuse_linear", "introduce_state", "split_entries", "quantize",
        "schedule_attention", "fuse_rounding",
    ]  # fmt: skip
    assert parse_graph(files[0].read_text()) == traced("dense")
    entries = [parse_graph(text) for text in files[-1].read_text().split("\n\n")]
    assert tuple(entries) == module.entries
