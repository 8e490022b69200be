"""ONNX of hand-built fused graphs, run by onnxruntime, against the numpy interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from q35c.errors import InternalError, LoweringError, OptionError
from q35c.export.lowerings import LOWERINGS
from q35c.export.onnx import export_onnx
from q35c.ir import Builder, Graph, SymDim, TensorType
from q35c.ir.interpret import concrete, run
from q35c.ir.ops import OPS
from q35c.ir.verify import STAGES
from tests.ir.examples import FITS, Case, build, case, draw_arrays
from tests.ir.random_graphs import random_graph

T = SymDim("T")
FUSED = STAGES.index("fused")
EXPORTED = [
    kind
    for kind, spec in OPS.items()
    if STAGES.index(spec.stages[0]) <= FUSED <= STAGES.index(spec.stages[1])
]


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(
    graph: Graph,
    path: Path,
    inputs: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    tolerance: float = 1e-4,
) -> None:
    """Export, run, and compare every output with the interpreter's, relative to its largest value."""
    made = session(export_onnx(graph, weights.__getitem__, path)).run(None, inputs)
    for got, expected in zip(made, run(graph, inputs, weights), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        largest = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


def draw_normal(
    graph: Graph, tokens: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    inputs, weights = (
        {
            v.name: rng.standard_normal(concrete(v.type.shape, {"T": tokens})).astype(np.float32)
            for v in group
        }
        for group in (graph.inputs, graph.leaves("weight"))
    )
    return inputs, weights


def test_every_op_of_a_fused_graph_has_a_form():
    assert sorted(EXPORTED) == sorted(LOWERINGS)


@pytest.mark.parametrize("kind", EXPORTED)
def test_op_table_examples(kind: str, tmp_path: Path):
    example = FITS[kind]
    graph = build(kind, Case(example.operands, example.attrs, "fused"))
    inputs, weights, _ = draw_arrays(graph, np.random.default_rng(1))
    compare(graph, tmp_path / "op.onnx", inputs, weights)


def test_rows_in_place_of_negative_tokens(tmp_path: Path):
    graph = build("embedding_or_rows", FITS["embedding_or_rows"])
    inputs, weights = draw_normal(graph, 5)
    inputs["tokens"] = np.array([3, -1, 0, -(2**31), 10], np.int32)
    compare(graph, tmp_path / "rows.onnx", inputs, weights)


def delta_net(key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int) -> Case:
    values = value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    gates = f"f32[T,{value_heads}] f32[T,{value_heads}]"
    constants = (
        f"@f32[{channels},1,{taps}] @f32[{value_heads}] @f32[{value_heads}] @f32[{value_dim}]"
    )
    operands = f"f32[T,{channels}] f32[T,{values}] {gates} {constants}"
    return case(operands, "fused", key_heads=key_heads, value_heads=value_heads, eps=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 4, 4, 2), (2, 4, 4, 6, 4), (2, 6, 8, 4, 3), (1, 4, 6, 5, 4)], ids=str
)
def test_gated_delta_net(sizes: tuple[int, ...], tokens: int, tmp_path: Path):
    graph = build("gated_delta_net", delta_net(*sizes))
    compare(graph, tmp_path / "net.onnx", *draw_normal(graph, tokens))


def attention(heads: int, kv_heads: int, head_dim: int, width: int) -> Case:
    keys = f"f32[T,{kv_heads * head_dim}]"
    norms = f"@f32[{head_dim}] @f32[{head_dim}]"
    operands = f"f32[T,{heads * 2 * head_dim}] {keys} {keys} {norms} f32[T,{width}]"
    return case(operands, "fused", heads=heads, kv_heads=kv_heads, eps=1e-6, scale=head_dim**-0.5)


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("sizes", [(1, 1, 4, 2), (4, 4, 6, 6), (6, 2, 8, 4), (4, 1, 8, 2)], ids=str)
def test_gated_attention(sizes: tuple[int, ...], tokens: int, tmp_path: Path):
    graph = build("gated_attention", attention(*sizes))
    compare(graph, tmp_path / "attention.onnx", *draw_normal(graph, tokens))


@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 2), (4, 4), (16, 3)])
def test_sparse_moe(experts: int, top_k: int, tokens: int, tmp_path: Path):
    """With 16 experts and one token most experts get no row at all."""
    operands = (
        f"f32[T,6] f32[T,{experts}] f32[T,6] f32[T,1] @f32[{experts},10,6] @f32[{experts},6,5]"
    )
    graph = build("sparse_moe", case(operands, "fused", top_k=top_k))
    compare(graph, tmp_path / "moe.onnx", *draw_normal(graph, tokens))


def test_experts_chosen_twice_count_twice(tmp_path: Path):
    graph = build("experts", Case(FITS["experts"].operands, {}, "fused"))
    inputs, weights = draw_normal(graph, 3)
    inputs["ids"] = np.array([[2, 2], [0, 3], [3, 3]], np.int32)
    compare(graph, tmp_path / "experts.onnx", inputs, weights)


def test_ties_between_experts_take_the_lowest_index(tmp_path: Path):
    graph = build("sparse_moe", Case(FITS["sparse_moe"].operands, {"top_k": 2}, "fused"))
    inputs, weights = draw_normal(graph, 4)
    inputs["router_logits"][:] = 0.5
    compare(graph, tmp_path / "moe.onnx", inputs, weights)


@pytest.mark.parametrize("sections", [(2, 1, 1), (4, 0, 0), (3, 3, 2), (11, 11, 10)], ids=str)
def test_rotary_table_keeps_the_axes_apart(sections: tuple[int, int, int], tmp_path: Path):
    frequencies = tuple(
        float(f) for f in np.float32(1e4) ** -np.linspace(0, 1, sum(sections), False)
    )
    example = case("i32[3,T]", "fused", inv_freq=frequencies, sections=sections, scaling=1.25)
    graph = build("rotary_table", example)
    positions = np.random.default_rng(0).integers(0, 5000, (3, 9)).astype(np.int32)
    compare(graph, tmp_path / "table.onnx", {"positions": positions}, {})


def test_decay_and_gates_of_extreme_size_stay_finite(tmp_path: Path):
    graph = build("gated_delta_net", delta_net(2, 4, 4, 4, 4))
    inputs, weights = draw_normal(graph, 9)
    inputs["a"] *= 60
    inputs["b"] *= 60
    weights["a_log"] = np.array([3.0, -8.0, 0.0, 2.0], np.float32)
    compare(graph, tmp_path / "net.onnx", inputs, weights)


def test_two_layers_share_mask_and_constants(tmp_path: Path):
    """The mask is made once; a second Scan in one graph needs names of its own."""
    b = Builder("two", "fused")
    x, positions = (
        b.input("x", TensorType("f32", (T, 24))),
        b.input("positions", TensorType("i32", (3, T))),
    )
    table = b.emit("rotary_table", positions, inv_freq=(1.0, 0.1), sections=(1, 1, 0), scaling=1.0)
    for layer in range(2):
        norm = b.weight(f"layers.{layer}.self_attn.q_norm.weight", TensorType("f32", (4,)))
        q, k, v = (
            b.emit("slice", x, axis=1, start=a, stop=z, step=1)
            for a, z in ((0, 16), (16, 20), (20, 24))
        )
        sizes = {"heads": 2, "kv_heads": 1, "eps": 1e-6, "scale": 0.5}
        y = b.emit("gated_attention", q, k, v, norm, norm, table, **sizes)
        w = b.weight(f"layers.{layer}.self_attn.o_proj.weight", TensorType("f32", (24, 8)))
        x = b.emit("linear_residual", y, x, w)
        mixer = [
            b.emit("slice", x, axis=1, start=a, stop=z, step=1)
            for a, z in ((0, 12), (12, 16), (16, 18), (18, 20))
        ]
        shapes = {"conv1d": (12, 1, 4), "A_log": (2,), "dt_bias": (2,), "norm": (2,)}
        leaves = [
            b.weight(f"layers.{layer}.linear_attn.{n}", TensorType("f32", s))
            for n, s in shapes.items()
        ]
        mixed = b.emit("gated_delta_net", *mixer, *leaves, key_heads=2, value_heads=2, eps=1e-6)
        w = b.weight(f"layers.{layer}.linear_attn.out_proj.weight", TensorType("f32", (24, 4)))
        x = b.emit("linear_residual", mixed, x, w)
    graph = b.finish([x])
    inputs, weights = draw_normal(graph, 5)
    inputs["positions"] = np.tile(np.arange(5, dtype=np.int32), (3, 1))
    path = tmp_path / "two.onnx"
    compare(graph, path, inputs, weights)
    nodes = onnx.load(path).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Range") == 1 and kinds.count("Scan") == 2
    names = {name for node in nodes for name in node.output}
    assert any(name.startswith("layers.1.linear_attn/gated_delta_net_") for name in names)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int, tmp_path: Path):
    graph, inputs, weights = random_graph(seed, stage="fused")
    compare(
        graph,
        tmp_path / "random.onnx",
        {v.name: inputs[v.name] for v in graph.inputs},
        weights,
        1e-3,
    )


# --- the file -------------------------------------------------------------------------------------


def linear_graph(rows: int = 64) -> Graph:
    b = Builder("linear", "fused")
    tokens, table = b.input("tokens", TensorType("i32", (T,))), TensorType("f32", (rows, 48))
    x = b.emit("embedding", tokens, b.weight("embed_tokens.weight", table))
    return b.finish([b.emit("linear", x, b.weight("embed_tokens.weight", table))])  # tied


def test_names_and_dynamic_dims_are_readable(tmp_path: Path):
    graph = linear_graph()
    weights = draw_normal(graph, 1)[1]
    model = onnx.load(export_onnx(graph, weights.__getitem__, tmp_path / "m.onnx"))
    onnx.checker.check_model(model, full_check=True)
    (tokens,), (logits,) = model.graph.input, model.graph.output
    assert (tokens.name, tokens.type.tensor_type.shape.dim[0].dim_param) == ("tokens", "T")
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["T", 64]
    assert logits.name == "logits"
    assert [i.name for i in model.graph.initializer].count("embed_tokens.weight") == 1
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]


def test_large_weights_go_to_a_second_file(tmp_path: Path):
    graph = linear_graph()
    weights = draw_normal(graph, 1)[1]
    path = export_onnx(graph, weights.__getitem__, tmp_path / "m.onnx", inline_bytes=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 5000
    assert (tmp_path / "m.onnx.data").read_bytes() == weights["embed_tokens.weight"].tobytes()
    tokens = {"tokens": np.array([3, 1, 63], np.int32)}
    (got,) = session(path).run(None, tokens)
    np.testing.assert_allclose(got, run(graph, tokens, weights)[0], atol=1e-4)
    with pytest.raises(OptionError, match="too large for one ONNX file"):
        export_onnx(graph, weights.__getitem__, path, external_data=False, inline_bytes=1000)


def test_each_weight_is_read_once(tmp_path: Path):
    graph = linear_graph()
    weights = draw_normal(graph, 1)[1]
    read: list[str] = []
    told: list[float] = []

    def lookup(name: str) -> np.ndarray:
        read.append(name)
        return weights[name]

    export_onnx(graph, lookup, tmp_path / "m.onnx", progress=lambda stage, done: told.append(done))
    assert read == ["embed_tokens.weight"] and told == [1.0]


def test_equal_models_are_equal_bytes(tmp_path: Path):
    graph, _, weights = random_graph(5, stage="fused")
    first, second = (
        export_onnx(graph, weights.__getitem__, tmp_path / name).read_bytes() for name in "ab"
    )
    assert first == second


def test_ops_without_a_form_are_refused_by_name(tmp_path: Path):
    graph = build("stateful_gated_attention", FITS["stateful_gated_attention"])
    with pytest.raises(LoweringError, match="'stateful_gated_attention' has no ONNX form"):
        export_onnx(graph, {}.__getitem__, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_element_types_without_a_form_are_refused(tmp_path: Path):
    b = Builder("g", "fused")
    graph = b.finish([b.emit("exp", b.input("x", TensorType("bf16", (T, 8))))])
    with pytest.raises(LoweringError, match="no such element type"):
        export_onnx(graph, {}.__getitem__, tmp_path / "m.onnx")


def test_reshapes_to_two_dynamic_dims_are_refused(tmp_path: Path):
    b = Builder("g", "fused")
    x = b.input("x", TensorType("f32", (T, T, 8)))
    graph = b.finish([b.emit("reshape", x, shape=(T, T * 2, 4))])
    with pytest.raises(LoweringError, match="several dynamic dims"):
        export_onnx(graph, {}.__getitem__, tmp_path / "m.onnx")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    graph = linear_graph()
    with pytest.raises(InternalError, match="a weight does not fit the graph"):
        export_onnx(graph, lambda name: np.zeros((2, 2), np.float32), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", ["missing/m.onnx", "."])
def test_unusable_outputs_are_refused(name: str, tmp_path: Path):
    with pytest.raises(OptionError):
        export_onnx(linear_graph(), {}.__getitem__, tmp_path / name)
