"""Find shared experts that can run as one more routed expert: same sizes, formats and input as the others."""

from __future__ import annotations

from dataclasses import dataclass

from q35c.ir.graph import Graph, Op, Value
from q35c.passes.match import Matcher

MOE_KINDS = ("sparse_moe_residual", "quantized_moe_residual")


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The weights of a shared expert, and the results of the ops that it consists of."""

    gate: Value
    up: Value
    down: Value
    results: tuple[Value, ...]


def find_shared_experts(graph: Graph) -> dict[Value, SharedExpert]:
    """Return the shared expert of each mixture whose experts it can join, by the mixture's result."""
    find = Matcher(graph)
    found = {op.result: _match(find, op) for op in graph.ops if op.kind in MOE_KINDS}
    return {result: shared for result, shared in found.items() if shared is not None}


def _match(find: Matcher, moe: Op) -> SharedExpert | None:
    """Match shared = linear(rounded(linear_swiglu(x, gate, up)), down) of the mixture's own x, read only there."""
    x, _, shared, _, gate_up, experts_down = moe.operands[:6]
    last = find.op(shared, "linear")
    if last is None or len(last.operands) != 2:
        return None
    rows, down = last.operands
    rounding = find.op(rows, "quantize_rows", dtype=x.type.dtype)
    activated = rounding.operands[0] if rounding else rows
    swiglu = find.op(activated, "linear_swiglu")
    if swiglu is None or swiglu.operands[0] != x:
        return None
    results = (activated, rows, shared) if rounding else (activated, shared)
    if any(find.uses[result] != 1 for result in results):
        return None
    _, gate, up = swiglu.operands
    _, double, hidden = gate_up.type.shape
    sizes = (double, hidden) == (2 * gate.type.shape[0], gate.type.shape[1])  # type: ignore[operator]
    formats = (gate.type.dtype, down.type.dtype) == (gate_up.type.dtype, experts_down.type.dtype)
    return SharedExpert(gate, up, down, results) if sizes and formats else None
