"""Choose each weight's storage format by policy and let linears read rounded activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from q35c.errors import InternalError
from q35c.formats.registry import integer_format
from q35c.ir.graph import Graph, Module, Op, Rewriter, Value
from q35c.ir.precision import Policy

# Which operands of an op are the weights that its operand 0 is multiplied by.
LINEARS = {"linear": slice(1, None), "linear_residual": slice(2, None), "linear_swiglu": slice(1, None)}  # fmt: skip
PRODUCTS = {**LINEARS, "sparse_moe_residual": slice(4, 6)}
MIXER_ROLES = {
    "stateful_gated_delta_net": ("delta_in", "delta_in", "delta_gates", "delta_gates"),
    "stateful_gated_attention": ("attention_in", "attention_in", "attention_in"),
    "sparse_moe_residual": ("", "router", "mlp_out", "router"),
}
OUTPUT_ROLES = {"stateful_gated_delta_net": "delta_out", "stateful_gated_attention": "attention_out"}  # fmt: skip


def quantize(module: Module, policy: Policy) -> Module:
    """Give every weight its format and insert the rounding of the rows that it is multiplied by.

    Before:
        graph g stateful {
          input %x: f32[T, 64]
          input %r: f32[T, 32]
          weight @gate: f32[96, 64]
          weight @up: f32[96, 64]
          weight @down: f32[32, 96]
          %0: f32[T, 96] = linear_swiglu(%x, @gate, @up)
          %1: f32[T, 32] = linear_residual(%0, %r, @down)
          return %1
        }
    After:
        graph g quantized {
          input %x: f32[T, 64]
          input %r: f32[T, 32]
          weight @gate: i4g64[96, 64]
          weight @up: i4g64[96, 64]
          weight @down: i4g64[32, 96]
          %0: q8g64[T, 64] = quantize_rows(%x) {dtype = "q8g64"}
          %1: f32[T, 96] = linear_swiglu(%0, @gate, @up)
          %2: q8g64[T, 96] = quantize_rows(%1) {dtype = "q8g64"}
          %3: f32[T, 32] = linear_residual(%2, %r, @down)
          return %3
        }

    A weight's role follows from what its product becomes, never from its name. Gates keep f32 rows, and so does
    everything of the policy f32; norms, conv and the delta net's vectors keep their type.
    """
    roles = module_roles(module)
    types = {w: replace(w, type=replace(w.type, dtype=policy.formats[r])) for w, r in roles.items()}
    rows = {weight: policy.rows(role) for weight, role in roles.items()}
    return Module(tuple(quantize_entry(graph, types, rows) for graph in module))


def quantize_entry(graph: Graph, types: dict[Value, Value], rows: dict[Value, str]) -> Graph:
    """Rewrite one entry; `types` holds every weight with its format, `rows` the dtype of the rows it meets."""
    out = Rewriter(graph, stage="quantized")
    rounded: dict[tuple[Value, str], Value] = {}
    picked: dict[Value, Value] = {}  # last rows -> all rows

    def round_rows(value: Value, dtype: str) -> Value:
        """Return the rounded rows of a value; who reads the same rows shares them.

        To int8 rows are rounded before the last one is picked: the kernel that makes them can do it on its way.
        """
        if (value, dtype) not in rounded:
            rounded[value, dtype] = (
                out.emit("last_token", round_rows(picked[value], dtype))
                if value in picked and integer_format(dtype)
                else out.emit("quantize_rows", value, dtype=dtype)
            )
        return rounded[value, dtype]

    for weight, typed in types.items():
        out.replace(weight, typed)
    for op in graph.ops:
        operands = [out.new(v) for v in op.operands]
        kind, attrs = op.kind, op.attrs.to_dict()
        dtype = rows[op.operands[PRODUCTS[kind]][0]] if kind in PRODUCTS else "f32"
        if dtype == "f32":
            results = out.copy(op)
            if kind == "last_token":
                picked[results[0]] = operands[0]
            continue
        operands[0] = round_rows(operands[0], dtype)
        if kind == "sparse_moe_residual":
            kind, attrs = "quantized_moe_residual", {**attrs, "dtype": dtype}
        out.replace(op.result, out.emit(kind, *operands, **attrs))
    return out.done()


def module_roles(module: Module) -> dict[Value, str]:
    """Return the role of every weight that has one in any entry; not all entries have a head."""
    roles: dict[Value, str] = {}
    for graph in module:
        for weight, role in weight_roles(graph).items():
            known = roles.setdefault(weight, role)
            if {known, role} == {"embedding", "head"}:
                roles[weight] = "head"
            elif known != role:
                raise InternalError(
                    "entries use a weight in two roles", where=weight.name, got=(known, role)
                )
    return roles


def weight_roles(graph: Graph) -> dict[Value, str]:
    """Return the role of every weight that has one. The head comes last: a tied table has its role."""
    readers: dict[Value, list[tuple[Op, int]]] = {}
    producers: dict[Value, Op] = {}
    for op in graph.ops:
        producers.update(dict.fromkeys(op.results, op))
        for place, value in enumerate(op.operands):
            readers.setdefault(value, []).append((op, place))
    roles: dict[Value, str] = {}
    for op in graph.ops:
        if op.kind == "embedding":
            roles[op.operands[1]] = "embedding"
        elif op.kind == "sparse_moe_residual":
            roles[op.operands[4]], roles[op.operands[5]] = "experts_in", "experts_out"
        elif op.kind in LINEARS:
            role = linear_role(op, readers, producers, graph.outputs)
            roles.update(dict.fromkeys(op.operands[LINEARS[op.kind]], role))
    return roles


def linear_role(
    op: Op,
    readers: dict[Value, list[tuple[Op, int]]],
    producers: dict[Value, Op],
    outputs: Iterable[Value],
) -> str:
    """Return what a linear is for: from who reads it, else from what it reads."""
    if op.kind == "linear" and op.result in outputs:
        return "head"
    if op.kind == "linear_swiglu":
        return "mlp_in"
    for reader, place in through_slices(op.result, readers):
        places = MIXER_ROLES.get(reader.kind, ())
        if place < len(places):
            return places[place]
    made_by = producers.get(op.operands[0])
    if made_by is not None and made_by.kind == "last_token":
        made_by = producers.get(made_by.operands[0])
    return OUTPUT_ROLES.get(made_by.kind, "mlp_out") if made_by is not None else "mlp_out"


def through_slices(
    value: Value, readers: dict[Value, list[tuple[Op, int]]]
) -> Iterable[tuple[Op, int]]:
    """Yield who reads a value or a slice of it, and as which operand."""
    for reader, place in readers.get(value, ()):
        if reader.kind == "slice":
            yield from through_slices(reader.result, readers)
        else:
            yield reader, place
