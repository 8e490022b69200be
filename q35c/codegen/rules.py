"""Lowering that is the same for every machine: the walk over an entry's ops, and the ops that are views or plain calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from q35c.codegen.calls import Int
from q35c.codegen.requests import Lowering
from q35c.codegen.schedule import Schedule
from q35c.errors import LoweringError
from q35c.ir.graph import Op

L = TypeVar("L", bound=Lowering)


def lower_ops(
    low: L, rules: Mapping[str, Callable[[L, Op], None]], what: str, hint: str
) -> Schedule:
    """Lower every op by its rule, or raise LoweringError naming the op that has none: `what` it lacks, and what to do."""
    for op in low.graph.ops:
        rule = rules.get(op.kind)
        if rule is None:
            where = f"entry {low.graph.name}, {op.kind}"
            raise LoweringError(what, where=where, expected=sorted(rules), hint=hint)
        rule(low, op)
    return low.schedule


def lower_slice(low: Lowering, op: Op) -> None:
    """A slice of the last axis is a view: no kernel."""
    source = low.views[op.operands[0]]
    if op.attrs["axis"] % op.result.type.rank != op.result.type.rank - 1 or op.attrs["step"] != 1:
        raise LoweringError(
            "only last-axis slices are views", where=f"entry {low.graph.name}", got=op.attrs
        )
    low.views[op.result] = replace(source, offset=source.offset + 4 * op.attrs["start"])


def lower_last_token(low: Lowering, op: Op) -> None:
    low.views[op.result] = replace(low.views[op.operands[0]], rows=Int(1), last_row=True)


def lower_rotary_table(low: Lowering, op: Op) -> None:
    parameters = {name: op.attrs[name] for name in ("inv_freq", "sections", "scaling")}
    # One row for each axis, as long as the field in io.
    positions = replace(low.views[op.operands[0]], stride=low.shared.io_tokens)
    low.call("rotary_table", parameters, positions=positions, table=low.output(op.result))
