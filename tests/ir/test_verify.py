"""The verifier refuses what the builder could not have made, and names the place."""

import re

import pytest

from q35c.errors import VerifyError
from q35c.ir import Attrs, Builder, Graph, Op, SymDim, TensorType, Value
from q35c.ir.text import parse_graph
from q35c.ir.verify import verify

T = SymDim("T")
ROWS = TensorType("f32", (T, 8))
X = Value("x", ROWS)
Y = Value("0", ROWS)


def op(kind: str, *operands: Value, results: tuple[Value, ...] = (Y,), **attrs) -> Op:
    return Op(kind, operands, Attrs.of(attrs), results)


def graph(*ops: Op, outputs: tuple[Value, ...] = (Y,), stage: str = "traced") -> Graph:
    return Graph("g", stage, (X,), ops, outputs)


def test_a_good_graph_is_returned_unchanged():
    good = graph(op("exp", X))
    assert verify(good) is good


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (graph(op("explode", X)), "unknown op"),
        (graph(op("rotary", X, X)), "op is not allowed at this stage"),
        (graph(op("exp", X, X)), "wrong number of operands"),
        (graph(op("concat", axis=0)), "wrong number of operands"),
        (graph(op("exp", X, axis=1)), "wrong attributes"),
        (graph(op("mean", X)), "wrong attributes"),
        (graph(op("mean", X, axis=5)), "axis 5 is out of range"),
        (graph(op("mean", X, axis=0)), "declared result type does not follow"),
        (graph(op("topk", X, k=2)), "declared result type does not follow"),
        (graph(op("exp", Y)), "%0 is read before it is defined"),
        (graph(op("exp", X), op("neg", X)), "%0 is defined twice"),
        (graph(op("exp", X, results=(X,)), outputs=(X,)), "%x is defined twice"),
        (graph(op("exp", X), outputs=(Value("9", ROWS),)), "output %9 is never defined"),
        (graph(op("exp", X), stage="polished"), "unknown stage"),
    ],
)
def test_bad_graphs_are_refused(bad: Graph, message: str):
    with pytest.raises(VerifyError, match=re.escape(message)) as caught:
        verify(bad)
    assert "graph g" in str(caught.value)


def test_a_weight_may_not_change_its_type():
    wide, narrow = (Value("w", TensorType("f32", (n, 8)), "weight") for n in (8, 4))
    half = Value("1", TensorType("f32", (T, 4)))
    bad = graph(op("linear", X, wide), op("linear", X, narrow, results=(half,)))
    with pytest.raises(VerifyError, match="@w is used with two types"):
        verify(bad)


def test_inputs_may_not_share_a_name():
    twins = (X, Value("x", TensorType("i32", (T,))))
    with pytest.raises(VerifyError, match="two inputs share a name"):
        verify(Graph("g", "traced", twins, (op("exp", X),), (Y,)))


def test_the_builder_checks_every_op_when_it_is_emitted():
    builder = Builder("g", "traced")
    x = builder.input("x", ROWS)
    with pytest.raises(
        VerifyError, match=r"graph g, op linear\(%x: f32\[T, 8\], @w: f32\[3, 7\]\)"
    ):
        builder.emit("linear", x, builder.weight("w", TensorType("f32", (3, 7))))


def test_the_builder_refuses_values_of_another_graph():
    builder = Builder("g", "traced")
    foreign = Value("7", ROWS)
    with pytest.raises(VerifyError, match="%7 is read before it is defined"):
        builder.finish([builder.emit("exp", foreign)])


def test_parsed_text_is_verified():
    text = "graph g traced {\n  input %x: f32[T, 8]\n  %0: f32[T, 7] = exp(%x)\n  return %0\n}\n"
    with pytest.raises(VerifyError, match="declared result type"):
        parse_graph(text)
