"""Find shared experts that can run as one more routed expert: same sizes, formats and input as the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from q35c.ir.graph import Graph, Op, Value, producers, use_counts

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
    made_by, uses = producers(graph), use_counts(graph)
    return {
        op.result: shared
        for op in graph.ops
        if op.kind in MOE_KINDS
        and (shared := _match(made_by, op)) is not None
        and all(uses[value] == 1 for value in shared.results)
    }


def _match(made_by: Mapping[Value, Op], moe: Op) -> SharedExpert | None:
    """Match shared = linear(rounded(linear_swiglu(x, gate, up)), down) of the mixture's own x."""
    x, _, shared, _, gate_up, experts_down = moe.operands[:6]
    last = made_by.get(shared)
    if last is None or last.kind != "linear" or len(last.operands) != 2:
        return None
    rows, down = last.operands
    rounding = made_by.get(rows)
    is_rounded = rounding is not None and rounding.kind == "quantize_rows"
    activated = rounding.operands[0] if rounding is not None and is_rounded else rows
    swiglu = made_by.get(activated)
    if swiglu is None or swiglu.kind != "linear_swiglu" or swiglu.operands[0] != x:
        return None
    results = (activated, rows, shared) if is_rounded else (activated, shared)
    _, gate, up = swiglu.operands
    _, double, hidden = gate_up.type.shape
    sizes = (double, hidden) == (2 * gate.type.shape[0], gate.type.shape[1])  # type: ignore[operator]
    formats = (gate.type.dtype, down.type.dtype) == (gate_up.type.dtype, experts_down.type.dtype)
    return SharedExpert(gate, up, down, results) if sizes and formats else None
