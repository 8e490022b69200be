"""Building and rewriting: dead code, numbering, attributes, dimensions, the interpreter's checks."""

import numpy as np
import pytest

from q35c.errors import VerifyError
from q35c.ir import Attrs, Builder, Graph, Rewriter, SymDim, TensorType
from q35c.ir.graph import producers, use_counts
from q35c.ir.interpret import run, zeros
from q35c.ir.types import count, extent, size_bytes
from tests.ir.examples import FITS, build

T = SymDim("T")
ROWS = TensorType("f32", (T, 8))


def chain(*kinds: str) -> Graph:
    builder = Builder("g", "traced")
    value = builder.input("x", ROWS)
    for kind in kinds:
        value = builder.emit(kind, value)
    return builder.finish([value])


def test_dead_ops_are_dropped_and_the_rest_is_numbered():
    builder = Builder("g", "traced")
    x = builder.input("x", ROWS)
    dead = builder.emit("exp", x)
    builder.emit("neg", dead)
    _, ids = builder.emit("topk", builder.emit("neg", x), k=2)
    graph = builder.finish([ids])
    assert [op.kind for op in graph.ops] == ["neg", "topk"]
    assert [v.name for op in graph.ops for v in op.results] == ["0", "1", "2"]


def test_ops_that_write_state_are_kept():
    text = build("stateful_gated_delta_net", FITS["stateful_gated_delta_net"])
    rewriter = Rewriter(text)
    for op in text.ops:
        rewriter.copy(op)
    graph = rewriter.finish([text.inputs[0]])
    assert [op.kind for op in graph.ops] == ["stateful_gated_delta_net"]
    assert {v.name for v in graph.leaves("state")} == {"conv", "delta"}


def test_a_rewriter_without_changes_gives_an_equal_graph():
    graph = chain("exp", "neg", "silu")
    rewriter = Rewriter(graph)
    for op in graph.ops:
        rewriter.copy(op)
    assert rewriter.done() == graph


def test_a_rewriter_redirects_later_readers():
    graph = chain("exp", "neg")
    rewriter = Rewriter(graph)
    rewriter.replace(graph.ops[0].result, graph.inputs[0])
    rewriter.copy(graph.ops[1])
    assert rewriter.done() == chain("neg")


def test_producers_and_use_counts():
    builder = Builder("g", "traced")
    x = builder.input("x", ROWS)
    y = builder.emit("exp", x)
    graph = builder.finish([builder.emit("mul", y, y), y])
    exp, mul = graph.ops
    assert producers(graph) == {exp.result: exp, mul.result: mul}
    assert use_counts(graph) == {x: 1, exp.result: 3, mul.result: 1}


def test_attributes_are_an_immutable_sorted_mapping():
    attrs = Attrs.of({"b": 2, "a": 1})
    assert attrs == Attrs.of({"a": 1, "b": 2}) and hash(attrs) == hash(Attrs.of({"a": 1, "b": 2}))
    assert attrs.to_dict() == {"a": 1, "b": 2} and [*attrs.to_dict()] == ["a", "b"]
    assert attrs["b"] == 2 and attrs.get("c", 3) == 3
    with pytest.raises(KeyError):
        attrs["c"]
    with pytest.raises(TypeError):
        attrs["a"] = 2  # type: ignore[index]


def test_dimensions():
    assert T * 4 == 4 * T == SymDim("T", 4) and (T * 4) // 2 == T * 2
    assert (
        str(T) == "T"
        and str(T * 4) == "4*T"
        and str(TensorType("f32", (T * 4, 8))) == "f32[4*T, 8]"
    )
    with pytest.raises(ValueError, match="not a multiple"):
        (T * 3) // 2
    assert extent(T * 4, {"T": 3}) == 12 and count((T, 8), {"T": 3}) == 24
    assert size_bytes(TensorType("bf16", (T, 8)), {"T": 3}) == 48
    with pytest.raises(KeyError):
        extent(T)
    assert zeros(TensorType("f32", (2, T * 2)), {"T": 3}).shape == (2, 6)


@pytest.mark.parametrize(
    "x", [np.zeros((3, 7)), np.zeros(8), np.zeros((1, 3, 8))], ids=["dim", "rank-1", "rank+1"]
)
def test_the_interpreter_refuses_arrays_that_do_not_fit(x: np.ndarray):
    with pytest.raises(VerifyError, match="%x"):
        run(chain("exp"), {"x": x}, {})


def test_the_interpreter_refuses_two_sizes_of_one_symbol():
    builder = Builder("g", "traced")
    x, y = (builder.input(name, ROWS) for name in ("x", "y"))
    graph = builder.finish([builder.emit("add", x, y)])
    with pytest.raises(VerifyError, match="%y"):
        run(graph, {"x": np.zeros((3, 8)), "y": np.zeros((4, 8))}, {})


def test_the_interpreter_reads_each_weight_once():
    builder = Builder("g", "traced")
    x, w = builder.input("x", ROWS), builder.weight("w", TensorType("f32", (8, 8)))
    graph = builder.finish([builder.emit("linear", builder.emit("linear", x, w), w)])
    read: list[str] = []

    def lookup(name: str) -> np.ndarray:
        read.append(name)
        return np.eye(8, dtype=np.float32) * 2

    (y,) = run(graph, {"x": np.ones((1, 8), np.float32)}, lookup)
    assert read == ["w"] and (y == 4).all()
