"""Printing and parsing are inverse, for every kind of attribute; bad text is refused by its line."""

import math
import re

import pytest

from q35c.errors import VerifyError
from q35c.ir import Attrs, Builder, Graph, SymDim, TensorType
from q35c.ir.ops import OPS, OpSpec
from q35c.ir.text import parse_attrs, parse_graph, print_attr, print_graph

T = SymDim("T")
GOOD = """graph forward traced {
  input %tokens: i32[T]
  weight @layers.0.mlp.up_proj.weight: f32[16, 8]
  %0: f32[T, 8] = embedding(%tokens, @layers.0.mlp.up_proj.weight)
  %1: f32[T, 2] , %2: i32[T, 2] = topk(%0) {k = 2}
  return %1, %2
}
""".replace(" ,", ",")

ATTRIBUTES = [
    *(0, 7, -3, 2**40, 0.0, -0.5, 1.0, 1e-08, -1e-08, 1e22, 1.5e300, 5e-324, 0.1, 1 / 3),
    *(math.inf, -math.inf, True, False, "f32", "", "a b", "x = (1, 2)", "}", "-1"),
    *((), (1,), (1, 2), ((),), ((1, 2), (3,)), (1.5, -math.inf, "s", True, ())),
    *(T, T * 4, (T, 8), (T * 12, 1), SymDim("CTX"), SymDim("seq_len2", 3)),
]


@pytest.mark.parametrize("value", ATTRIBUTES, ids=repr)
def test_attributes_round_trip(value):
    for attrs in (Attrs.of({"a": value}), Attrs.of({"first": 1, "value": value, "z_last": (2.0,)})):
        text = ", ".join(f"{name} = {print_attr(attr)}" for name, attr in attrs)
        parsed = parse_attrs(text)
        assert parsed == attrs
        assert [*map(repr, parsed)] == [*map(repr, attrs)]  # 1 == 1.0 == True, yet not the same


def test_attributes_round_trip_in_a_graph(monkeypatch: pytest.MonkeyPatch):
    names = tuple(f"a{i}" for i in range(len(ATTRIBUTES)))
    spec = OpSpec("odd", "", ("x",), names, lambda t, a: (t[0],), lambda x: x, ("traced", "traced"))
    monkeypatch.setitem(OPS, "odd", spec)
    builder = Builder("g", "traced")
    x = builder.input("x", TensorType("f32", (T, 8)))
    y = builder.emit("odd", x, **dict(zip(names, ATTRIBUTES, strict=True)))
    graph = builder.finish([builder.emit("exp", y)])
    text = print_graph(graph)
    assert parse_graph(text) == graph
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("shape", [(), (1,), (T,), (T * 4, 128), (3, T), (2, SymDim("B"), T * 2)])
def test_shapes_round_trip(shape):
    builder = Builder("g", "traced")
    x = builder.input("x.y_0", TensorType("f32", shape))
    graph = builder.finish([builder.emit("exp", x)])
    assert parse_graph(print_graph(graph)) == graph


def test_every_kind_of_value_round_trips():
    assert print_graph(parse_graph(GOOD)) == GOOD
    builder = Builder("g", "stateful")
    kinds = [
        getattr(builder, kind)("v", TensorType("f32", (8,)))
        for kind in ("input", "weight", "state")
    ]
    total = builder.emit("add", builder.emit("add", *kinds[:2]), kinds[2])
    graph = builder.finish([total])
    assert "@v: f32[8]" in print_graph(graph) and "$v: f32[8]" in print_graph(graph)
    assert parse_graph(print_graph(graph)) == graph


def test_blank_lines_and_indentation_do_not_matter():
    loose = GOOD.replace("\n", "\n\n \t")
    assert parse_graph(loose) == parse_graph(GOOD)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GOOD, "", "cannot parse a graph header"),
        ("graph forward traced {", "graph forward {", "cannot parse a graph header"),
        ("}\n", "", "cannot parse a graph header"),
        ("i32[T]", "i32", "cannot parse a typed value"),
        ("topk(%0)", "topk(%0", "cannot parse an op"),
        ("topk(%0)", "topk(%9)", "undefined values"),
        ("return %1", "return %9", "undefined values"),
        ("k = 2", "k =", "cannot parse attributes"),
        ("k = 2", "k = (2", "cannot parse attributes"),
        ("k = 2", "j = 2", "wrong attributes"),
        (" traced", " polished", "unknown stage"),
        ("embedding(", "lookup(", "unknown op"),
    ],
)
def test_bad_text_is_refused(old: str, new: str, message: str):
    assert old in GOOD
    with pytest.raises(VerifyError, match=re.escape(message)):
        parse_graph(GOOD.replace(old, new))


def test_equal_graphs_print_equally():
    def build(extra: int) -> Graph:
        builder = Builder("g", "traced")
        x = builder.input("x", TensorType("f32", (T, 8)))
        for _ in range(extra):
            builder.emit("exp", x)  # dead
        return builder.finish([builder.emit("neg", x)])

    assert print_graph(build(0)) == print_graph(build(3))
