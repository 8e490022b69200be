"""Which rows each weight meets, by policy, on the golden graph that has every role."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from q35c.errors import InternalError
from q35c.ir import Graph, Module
from q35c.ir.precision import POLICIES
from q35c.ir.text import parse_graph
from q35c.passes.introduce_state import introduce_state
from q35c.passes.quantize import module_roles, quantize, weight_roles
from q35c.passes.split_entries import split_entries
from tests.passes.arrays import assert_same_meaning
from tests.passes.tiny import tiny_model

GOLDEN = Path(__file__).parent / "quantize" / "every_role_and_a_tied_head.txt"
PICKED = GOLDEN.with_name("rows_are_rounded_before_one_is_picked.txt")
GATES = {"0.ba.0", "0.mlp.router.0"}


def before() -> Graph:
    return parse_graph(GOLDEN.read_text().partition("---\n")[0])


def quantized(precision: str) -> Graph:
    (made,) = quantize(Module((before(),)), POLICIES[precision])
    return made


def rows_by_weight(graph: Graph) -> dict[str, str]:
    """Return the dtype of the rows that each product's first weight meets."""
    products = [op for op in graph.ops if op.playing("factors")]
    return {op.playing("factors")[0].name: op.source.type.dtype for op in products}


@pytest.mark.parametrize(
    ("precision", "rows"),
    [("bf16", "bf16"), ("w8", "q8g32"), ("w4", "q8g64"), ("w4-small", "q8g128")],
)
def test_all_but_the_gates_read_rounded_rows(precision: str, rows: str) -> None:
    found = rows_by_weight(quantized(precision))
    assert len(found) == 12
    expected = dict.fromkeys(found, rows) | dict.fromkeys(GATES, "f32")
    assert found == expected


def test_the_reference_rounds_nothing() -> None:
    assert set(rows_by_weight(quantized("f32")).values()) == {"f32"}
    assert [op.kind for op in quantized("f32").ops] == [op.kind for op in before().ops]


def test_who_reads_the_same_rows_shares_them() -> None:
    rounded = [op.operands[0] for op in quantized("bf16").ops if op.kind == "quantize_rows"]
    assert len(rounded) == len(set(rounded)) == 9


def test_bf16_keeps_the_meaning() -> None:
    assert_same_meaning(before(), quantized("bf16"), "quantize", loss=0.02)


@pytest.mark.parametrize("layers", ["da", "ad"])
def test_roles_do_not_depend_on_how_a_graph_is_split(layers: str) -> None:
    """Some entries have no head, in some the last token's row is picked before a projection."""
    graph = introduce_state(tiny_model(layers))
    entries = split_entries(graph).entries
    assert module_roles(Module((graph,))) == weight_roles(graph)
    for order in permutations(entries):
        assert module_roles(Module(order)) == weight_roles(graph)


def test_one_weight_in_two_roles_is_refused() -> None:
    graph = introduce_state(tiny_model("a"))
    gate = next(op for op in graph.ops if op.kind == "linear_swiglu").operands[1]
    other = parse_graph(
        f"graph other stateful {{\ninput %x: f32[T, 6]\nweight {gate}: {gate.type}\n"
        f"%0: f32[T, 5] = linear(%x, {gate})\nreturn %0\n}}"
    )
    with pytest.raises(InternalError, match="two roles"):
        module_roles(Module((graph, other)))


def test_to_bf16_only_the_picked_row_is_rounded() -> None:
    graph = parse_graph(PICKED.read_text().partition("---\n")[0])
    (made,) = quantize(Module((graph,)), POLICIES["bf16"])
    kinds = [op.kind for op in made.ops]
    assert kinds[:3] == ["last_token", "last_token", "quantize_rows"]
