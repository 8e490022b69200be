"""Choose each weight's storage format by policy and let linears read rounded activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from q35c.errors import InternalError
from q35c.formats.registry import integer_format
from q35c.ir.build import Rewriter
from q35c.ir.graph import Graph, Module, Op, Value, producers
from q35c.ir.precision import Policy

# What a linear is for whose rows a mixer reads, and of a linear that reads a mixer's rows.
MIXER_ROLES = {
    "stateful_gated_delta_net": {"qkv": "delta_in", "z": "delta_in", "b": "delta_gates", "a": "delta_gates"},
    "stateful_gated_attention": {"q_gate": "attention_in", "k": "attention_in", "v": "attention_in"},
    "sparse_moe_residual": {"router_logits": "router", "shared": "mlp_out", "shared_gate": "router"},
}  # fmt: skip
OUTPUT_ROLES = {"stateful_gated_delta_net": "delta_out", "stateful_gated_attention": "attention_out"}  # fmt: skip
EXPERT_ROLES = {"gate_up": "experts_in", "down": "experts_out"}


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
        kind, attrs = op.kind, op.attrs.to_dict()
        factors = op.playing("factors")
        dtype = rows[factors[0]] if factors else "f32"
        if dtype == "f32":
            results = out.copy(op)
            if kind == "last_token":
                picked[results[0]] = out.new(op.source)
            continue
        x, *others = map(out.new, op.operands)
        operands = [round_rows(x, dtype), *others]
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
    readers: dict[Value, list[tuple[Op, str]]] = {}
    for op in graph.ops:
        for name, value in op.named():
            readers.setdefault(value, []).append((op, name))
    roles: dict[Value, str] = {}
    for op in graph.ops:
        if op.kind in ("embedding", "embedding_or_rows"):
            roles[op["table"]] = "embedding"
        elif op.kind == "sparse_moe_residual":
            roles.update((op[name], role) for name, role in EXPERT_ROLES.items())
        elif factors := op.playing("factors"):
            role = linear_role(op, readers, producers(graph), graph.outputs)
            roles.update(dict.fromkeys(factors, role))
    return roles


def linear_role(
    op: Op,
    readers: dict[Value, list[tuple[Op, str]]],
    made_by: dict[Value, Op],
    outputs: Iterable[Value],
) -> str:
    """Return what a linear is for: from who reads it, else from what it reads."""
    if op.kind.startswith("linear_bias"):  # only towers have biases
        maker = made_by.get(op.source)
        return "patches" if maker is not None and maker.kind == "scale_pixels" else "tower"
    if op.kind == "linear" and op.result in outputs:
        return "head"
    if op.kind == "linear_swiglu":
        return "mlp_in"
    for reader, name in through_slices(op.result, readers):
        if role := MIXER_ROLES.get(reader.kind, {}).get(name):
            return role
    maker = made_by.get(op.source)
    if maker is not None and maker.kind == "last_token":
        maker = made_by.get(maker.source)
    return OUTPUT_ROLES.get(maker.kind, "mlp_out") if maker is not None else "mlp_out"


def through_slices(
    value: Value, readers: dict[Value, list[tuple[Op, str]]]
) -> Iterable[tuple[Op, str]]:
    """Yield who reads a value or a slice of it, and as which operand."""
    for reader, name in readers.get(value, ()):
        if reader.kind == "slice":
            yield from through_slices(reader.result, readers)
        else:
            yield reader, name
