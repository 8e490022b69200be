"""Every size of the family goes through the whole pipeline and lowers, for both instruction sets.

Four layers, which is one period of the layer pattern, stand for all: the others only repeat them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from q35c.codegen.cpu.families import FAMILIES
from q35c.codegen.cpu.lower import lower
from q35c.codegen.generate import Limits, barrier_bytes, describe_state, entry_spec
from q35c.codegen.requests import Shared, spread
from q35c.codegen.targets import find_target
from q35c.errors import LoweringError
from q35c.frontend import family
from q35c.frontend.tensors import expected_tensors
from q35c.ir.graph import Attrs, Module, Op, Value, producers
from q35c.ir.precision import POLICIES
from q35c.ir.types import TensorType
from q35c.layouts import blobs
from q35c.passes.pipeline import Choices, run_pipeline
from tests.compiled import graph_of

LAYERS, CONTEXT, BATCH = 4, 4096, 4


@pytest.mark.parametrize("name", family.names())
def test_every_size_lowers(name: str) -> None:
    full = family.load(name)
    config = replace(full, num_hidden_layers=LAYERS, layer_types=full.layer_types[:LAYERS])
    traced = graph_of(config)
    limits = Limits(CONTEXT, CONTEXT, BATCH, config.vocab_size, config.hidden_size)
    for policy in POLICIES.values():
        modules: dict[int, Module] = {}  # by the parts of attention
        for level in ("x86-64-v3", "x86-64-v4-bf16"):
            target = find_target(f"cpu:{level}")
            splits = partial(target.decode_splits, context=CONTEXT)
            parts = splits(config.num_key_value_heads)
            if parts not in modules:
                modules[parts] = run_pipeline(traced, Choices(policy, splits))
            module = modules[parts]
            specs = [entry_spec(graph, target, limits) for graph in module]
            state = blobs.state_layout(describe_state(module, policy, CONTEXT, target))
            offsets = {tensor["name"]: tensor["offset"] for tensor in state["tensors"]}
            tokens = max(spec.rows for spec in specs)
            shared = Shared(target, CONTEXT, tokens, offsets)
            for graph, spec in zip(module, specs, strict=True):
                schedule = lower(graph, shared, spec.rows)
                assert 0 < schedule.plan().bytes < 1 << 30
            assert barrier_bytes(shared) <= blobs.MAX_BARRIER_BYTES
            used = {source for weight in shared.weights.values() for source in weight.sources}
            assert used == set(expected_tensors(config))
            assert {family_name for family_name, _ in shared.kernels} <= set(FAMILIES)
            # All layers of a kind share their kernels, so more layers would not add any.
            assert len(shared.kernels) <= 40
            if config.is_moe:  # the shared expert is one of them
                experts = {
                    dict(parameters)["E"]
                    for name, parameters in shared.kernels
                    if "expert_" in name
                }
                assert experts - {config.num_experts} == {config.num_experts + 1}


def dense_module() -> tuple[Module, Callable[[], Shared]]:
    """Return one period of a dense model in f32, and what makes a new `Shared` for it."""
    full = family.load("qwen3.5-0.8b")
    config = replace(full, num_hidden_layers=LAYERS, layer_types=full.layer_types[:LAYERS])
    module = run_pipeline(graph_of(config), Choices(POLICIES["f32"]))
    target = find_target("cpu:x86-64-v3")
    state = blobs.state_layout(describe_state(module, POLICIES["f32"], CONTEXT, target))
    offsets = {tensor["name"]: tensor["offset"] for tensor in state["tensors"]}
    return module, lambda: Shared(target, CONTEXT, 8, offsets)


@pytest.mark.parametrize("reader", ["the rows", "a slice of them", "the whole linear"])
def test_rows_that_a_convolution_overwrites_have_no_other_reader(reader: str) -> None:
    module, shared = dense_module()
    graph = module.entries[0]
    delta_net = next(op for op in graph.ops if op.kind == "stateful_gated_delta_net")
    qkv = delta_net.operands[0]
    made_by = producers(graph)[qkv]
    read, attrs = {
        "the rows": (qkv, {"start": 0, "stop": 1}),
        "a slice of them": (made_by.operands[0], {"start": 5, "stop": 6}),
        "the whole linear": (made_by.operands[0], None),
    }[reader]
    result = Value("other", TensorType("f32", (qkv.type.shape[0], 1)))
    kind = "slice" if attrs else "last_token"
    other = Op(kind, (read,), Attrs.of({"axis": -1, "step": 1, **(attrs or {})}), (result,))
    lower(graph, shared(), 8)
    with pytest.raises(LoweringError, match="overwrites"):
        lower(replace(graph, ops=(*graph.ops, other)), shared(), 8)


def test_attention_whose_result_nobody_reads_only_continues_the_cache() -> None:
    module, shared = dense_module()
    (extend,) = (graph for graph in module if graph.name == "extend")
    (result,) = extend.ops[-1].results
    for outputs, expected in (((), []), ((result,), ["attention"])):
        made = shared()
        lower(replace(extend, outputs=outputs), made, 8)
        families = [name for name, _ in made.kernels]
        assert families[families.index("attention_prepare") + 1 :] == expected


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 32, 64])
def test_decode_splits_suit_every_thread_count(kv_heads: int) -> None:
    target = find_target("cpu:x86-64-v3")
    tasks = target.decode_splits(kv_heads, 32768) * kv_heads
    for threads in range(1, target.max_threads + 1):
        busiest = -(-tasks // threads)
        assert busiest * threads <= 1.5 * tasks
    assert target.decode_splits(kv_heads, 64) == 1
    assert 4096 // target.decode_splits(kv_heads, 4096) >= target.split_cells // 2


def test_long_rows_take_an_odd_number_of_cache_lines() -> None:
    """Rows at a power of two would meet in a few sets of a cache; short ones and odd ones stay as they are."""
    assert [spread(words) for words in (64, 256, 1024, 8192)] == [64, 256, 1040, 8208]
    assert spread(1040) == 1040 and spread(520) == 520
