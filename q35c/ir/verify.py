"""The verifier: rules every op and graph obeys. It runs inside the builder and after every pass."""

from __future__ import annotations

from q35c.errors import VerifyError
from q35c.ir.graph import STAGES, Attrs, Graph, Op, Value
from q35c.ir.ops import OPS, ShapeRuleError
from q35c.ir.types import TensorType


def infer_types(
    kind: str, operands: tuple[Value, ...], attrs: Attrs, stage: str, graph: str
) -> tuple[TensorType, ...]:
    """Return the result types of an op, or raise VerifyError if the op table forbids it."""
    shown = f"{kind}({', '.join(f'{v}: {v.type}' for v in operands)})"
    where = f"graph {graph}, op {shown}"
    spec = OPS.get(kind)
    if spec is None:
        raise VerifyError("unknown op", where=where, expected=sorted(OPS), got=kind)
    first, last = (STAGES.index(s) for s in spec.stages)
    if not first <= STAGES.index(stage) <= last:
        raise VerifyError(
            "op is not allowed at this stage", where=where, expected=spec.stages, got=stage
        )
    least = len(spec.operands)
    if len(operands) < least or (len(operands) > least and not spec.variadic):
        raise VerifyError(
            "wrong number of operands", where=where, expected=spec.operands, got=len(operands)
        )
    if set(dict(attrs)) != set(spec.attrs):
        raise VerifyError(
            "wrong attributes", where=where, expected=spec.attrs, got=tuple(dict(attrs))
        )
    try:
        return spec.infer(tuple(v.type for v in operands), dict(attrs))
    except ShapeRuleError as problem:
        raise VerifyError(str(problem), where=where, got=dict(attrs)) from problem


def verify(graph: Graph) -> Graph:
    """Return the graph unchanged, or raise VerifyError naming the first op that breaks a rule."""
    where = f"graph {graph.name}"
    if graph.stage not in STAGES:
        raise VerifyError("unknown stage", where=where, expected=STAGES, got=graph.stage)
    defined = set(graph.inputs)
    if len({value.name for value in graph.inputs}) != len(graph.inputs):
        raise VerifyError("two inputs share a name", where=where)
    types: dict[tuple[str, str], TensorType] = {}
    for op in graph.ops:
        check_operands(op, defined, types, where)
        check_results(op, graph)
        for result in op.results:
            if result in defined:
                raise VerifyError(f"{result} is defined twice", where=where)
            defined.add(result)
    for value in graph.outputs:
        if value not in defined:
            raise VerifyError(f"output {value} is never defined", where=where)
    return graph


def check_operands(
    op: Op, defined: set[Value], types: dict[tuple[str, str], TensorType], where: str
) -> None:
    """Refuse operands that are not defined yet or that have had another type before."""
    for value in op.operands:
        if value.kind == "value" and value not in defined:
            raise VerifyError(f"{value} is read before it is defined", where=f"{where}, {op.kind}")
        if types.setdefault((value.kind, value.name), value.type) != value.type:
            raise VerifyError(
                f"{value} is used with two types",
                where=f"{where}, {op.kind}",
                expected=types[value.kind, value.name],
                got=value.type,
            )


def check_results(op: Op, graph: Graph) -> None:
    """Refuse results whose declared types are not those of the op table."""
    inferred = infer_types(op.kind, op.operands, op.attrs, graph.stage, graph.name)
    declared = tuple(result.type for result in op.results)
    if inferred != declared:
        raise VerifyError(
            "declared result type does not follow from the operands",
            where=f"graph {graph.name}, {op.kind}",
            expected=tuple(map(str, inferred)),
            got=tuple(map(str, declared)),
        )
