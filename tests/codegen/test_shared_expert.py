"""Which shared experts join the routed ones: those of their size, formats and input."""

from __future__ import annotations

import pytest

from q35c.codegen.shared_expert import find_shared_experts
from q35c.ir.text import parse_graph

# Three routed experts of 4 inner values, and a shared one.
GRAPH = """\
graph g quantized {
  input %h: f32[T, 6]
  input %logits: f32[T, 3]
  input %sigma: f32[T, 1]
  weight @gate_up: i4g64[3, 8, 6]
  weight @down: i4g64[3, 6, 4]
  weight @gate: i4g64[4, 6]
  weight @up: i4g64[4, 6]
  weight @shared_down: i4g64[6, 4]
  %0: q8g64[T, 6] = quantize_rows(%h) {dtype = "q8g64"}
  %1: f32[T, 4] = linear_swiglu(%0, @gate, @up)
  %2: q8g64[T, 4] = quantize_rows(%1) {dtype = "q8g64"}
  %3: f32[T, 6] = linear(%2, @shared_down)
  %4: f32[T, 6] = quantized_moe_residual(%0, %logits, %3, %sigma, @gate_up, @down, %h) {dtype = "q8g64", top_k = 2}
  return %4
}
"""


def test_it_joins_experts_of_its_size() -> None:
    graph = parse_graph(GRAPH)
    ((result, shared),) = find_shared_experts(graph).items()
    assert result == graph.outputs[0]
    assert [w.name for w in (shared.gate, shared.up, shared.down)] == ["gate", "up", "shared_down"]
    assert shared.results == tuple(op.result for op in graph.ops[1:4])


def test_it_joins_experts_that_read_exact_rows() -> None:
    lines = [line for line in GRAPH.splitlines() if "quantize_rows" not in line]
    text = "\n".join(lines).replace("i4g64", "f32").replace(', {dtype = "q8g64", top_k', ", {top_k")
    for old, new in (
        ("%0, @gate", "%h, @gate"),
        ("linear(%2", "linear(%1"),
        ("quantized_moe_residual(%0", "sparse_moe_residual(%h"),
        ('dtype = "q8g64", ', ""),
    ):
        text = text.replace(old, new)
    (shared,) = find_shared_experts(parse_graph(text + "\n")).values()
    assert len(shared.results) == 2


APART = {
    "another size": [
        ("@gate: i4g64[4", "@gate: i4g64[5"), ("@up: i4g64[4", "@up: i4g64[5"),
        ("@shared_down: i4g64[6, 4]", "@shared_down: i4g64[6, 5]"),
        ("%1: f32[T, 4]", "%1: f32[T, 5]"), ("%2: q8g64[T, 4]", "%2: q8g64[T, 5]"),
    ],
    "another format, first": [("@gate: i4", "@gate: i5"), ("@up: i4", "@up: i5")],
    "another format, last": [("@shared_down: i4", "@shared_down: i8")],
    "another input": [
        ("  %1:", '  %9: q8g64[T, 6] = quantize_rows(%h) {dtype = "q8g64"}\n  %1:'),
        ("linear_swiglu(%0", "linear_swiglu(%9"),
    ],
    "a second reader": [("@down, %h)", "@down, %3)")],
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_it_stays_apart(name: str) -> None:
    text = GRAPH
    for old, new in APART[name]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert find_shared_experts(parse_graph(text)) == {}
