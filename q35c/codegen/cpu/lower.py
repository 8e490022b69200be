"""Lowering: every op of an entry becomes kernel calls. One function per op kind, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from q35c.codegen.calls import Int, Tid
from q35c.codegen.requests import Lowering, Shared, row_count, stride, width
from q35c.codegen.schedule import Schedule, View, WeightRef
from q35c.errors import LoweringError
from q35c.formats.registry import integer_format
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import count


def lower(graph: Graph, shared: Shared, max_tokens: int) -> Schedule:
    """Return the steps of an entry of up to `max_tokens` rows, or raise LoweringError naming the op that has no kernel."""
    low = Lowering(graph, shared, max_tokens)
    for op in graph.ops:
        rule = RULES.get(op.kind)
        if rule is None:
            raise LoweringError(
                "no lowering for this op", where=f"entry {graph.name}, {op.kind}",
                expected=sorted(RULES), hint="the fusion passes should have replaced it",
            )  # fmt: skip
        rule(low, op)
    return low.schedule


# --- one rule per op ------------------------------------------------------------------------------


def lower_embedding(low: Lowering, op: Op) -> None:
    tokens, table = op.operands
    vocabulary, hidden = table.type.shape
    y = low.output(op.result)
    parameters = {"V": vocabulary, "H": hidden, "dtype": table.type.dtype}
    args = [low.shared.weight("linear", table), low.views[tokens], y, y.rows, stride(y)]
    low.call(("embedding", parameters), args, [y])


def lower_matrix(
    low: Lowering, op: Op, epilogue: str, layout: str, weights: tuple[Value, ...]
) -> None:
    x = low.views[op.operands[0]]
    parameters = {
        "N": sum(count(w.type.shape[:1]) for w in weights),
        "K": width(weights[0]),
        "dtype": weights[0].type.dtype,
        "rows": op.operands[0].type.dtype,
        "epilogue": epilogue,
    }
    residual = [low.views[op.operands[1]]] if epilogue == "residual" else []
    weight = low.shared.weight(layout, *weights)
    if rounded := low.rounded_result(op):
        parameters["group"], q = rounded
        scratch = low.scratch("linear", **parameters)
        arrivals = low.shared.arrivals(width(op.result) // parameters["group"])
        args = [weight, x, q, scratch, arrivals, q.rows, stride(x), stride(q), Tid()]
        low.call(("linear", parameters), args, [q, scratch])
        return
    y = low.output(op.result)
    strides = [stride(view) for view in (x, y, *residual)]
    low.call(("linear", parameters), [weight, x, y, *residual, y.rows, *strides], [y])


def lower_linear(low: Lowering, op: Op) -> None:
    lower_matrix(low, op, "none", "linear", op.operands[1:])


def lower_linear_residual(low: Lowering, op: Op) -> None:
    lower_matrix(low, op, "residual", "linear", op.operands[2:])


def lower_linear_swiglu(low: Lowering, op: Op) -> None:
    lower_matrix(low, op, "swiglu", "swiglu", op.operands[1:])


def lower_slice(low: Lowering, op: Op) -> None:
    """A slice of the last axis is a view: no kernel."""
    source = low.views[op.operands[0]]
    if op.attrs["axis"] % op.result.type.rank != op.result.type.rank - 1 or op.attrs["step"] != 1:
        raise LoweringError(
            "only last-axis slices are views", where=f"entry {low.graph.name}", got=op.attrs
        )
    offset = source.offset + 4 * op.attrs["start"]
    low.views[op.result] = View(source.home, source.stride, source.rows, offset, source.last_row)


def lower_last_token(low: Lowering, op: Op) -> None:
    source = low.views[op.operands[0]]
    low.views[op.result] = View(source.home, source.stride, Int(1), source.offset, last_row=True)


def lower_rms_norm(low: Lowering, op: Op) -> None:
    x, weight = low.views[op.operands[0]], low.shared.weight("vector", op.operands[1])
    parameters = {"D": width(op.results[0]), "eps": op.attrs["eps"], "offset": op.attrs["offset"]}
    rounded = low.rounded_result(op)
    if rounded is None:
        y = low.output(op.result)
        low.call(("rms_norm", parameters), [x, weight, y, y.rows, stride(x), stride(y)], [y])
        return
    group, q = rounded
    is_kept = op.attrs["is_kept"]
    parameters |= {"group": group, "is_kept": is_kept}
    y = low.output(op.results[0]) if is_kept else q  # or else it is not touched
    args = [x, weight, y, q, q.rows, *(stride(view) for view in (x, y, q))]
    low.call(("rms_norm", parameters), args, [y, q] if is_kept else [q])


def lower_rotary_table(low: Lowering, op: Op) -> None:
    positions = low.views[op.operands[0]]
    table = low.output(op.result)
    parameters = {name: op.attrs[name] for name in ("inv_freq", "sections", "scaling")}
    most = Int(low.shared.io_tokens)
    low.call(("rotary_table", parameters), [positions, table, table.rows, most], [table])


def lower_gated_delta_net(low: Lowering, op: Op) -> None:
    qkv, z, b, a, conv_w, a_log, dt_bias, norm_w, slots, starts, conv, delta = op.operands
    _, value_heads, key_dim, value_dim = delta.type.shape
    shared, view = low.shared, low.views
    x = overwritten(low, op, qkv)  # by their convolution
    shape = {
        "Hk": op.attrs["key_heads"], "Hv": value_heads, "Dk": key_dim, "Dv": value_dim, "K": width(conv_w),
        "eps": op.attrs["eps"], "slot_offset_bytes": 0,
    }  # fmt: skip
    vectors = [shared.weight("vector", w) for w in (a_log, dt_bias, norm_w)]
    y, rounded = low.exact(op), low.rounded_result(op)
    shape["group"], q = rounded or (0, y)
    inputs = [x, view[z], view[b], view[a]]
    convolution = [shared.weight("conv", conv_w), shared.state(conv)]
    args = [*convolution, *inputs, *vectors, shared.state(delta), view[slots]]
    written = [x, y, q] if rounded else [x, y]
    strides = [stride(v) for v in (*inputs, y, q)]
    if op.attrs["rows"] == "batch":
        args += [y, q, y.rows, *strides]
        low.call(("gated_delta_decode", shape), args, written, [conv, delta])
        return
    scratch = low.scratch("gated_delta", **shape)
    args += [view[starts], y, q, scratch, y.rows, *strides, Tid()]
    low.call(("gated_delta", shape), args, [*written, scratch], [conv, delta])


def overwritten(low: Lowering, op: Op, value: Value) -> View:
    """Return the rows of an operand that a kernel overwrites, or raise LoweringError if another op reads them too."""
    others = list(low.readers[value])
    others.remove(op)
    made_by = low.made_by.get(value)
    if made_by is not None and made_by.kind == "slice":
        first, stop = made_by.attrs["start"], made_by.attrs["stop"]
        for other in low.readers[made_by.operands[0]]:
            is_apart = other.kind == "slice" and (
                other.attrs["stop"] <= first or stop <= other.attrs["start"]
            )
            if other is not made_by and not is_apart:
                others.append(other)
    if others:
        raise LoweringError(
            "another op reads rows that this one overwrites",
            where=f"entry {low.graph.name}, {op.kind}", got=[other.kind for other in others],
            hint="give each reader a value of its own",
        )  # fmt: skip
    return low.views[value]


def lower_gated_attention(low: Lowering, op: Op) -> None:
    q_gate, k, v, q_norm, k_norm, table, slots, starts, keys, values = op.operands
    shared, view = low.shared, low.views
    head_dim = width(q_norm)
    heads = {"Hq": op.attrs["heads"], "Hkv": op.attrs["kv_heads"], "D": head_dim}
    kv_dtype, splits = op.attrs["cache"], op.attrs["splits"]
    # Offsets relative to the keys are the same in every layer, so all layers share one kernel.
    cache = {
        "kv_dtype": kv_dtype, "context": shared.context, "rows": op.attrs["rows"],
        "k_offset_bytes": 0,
        "v_offset_bytes": shared.state_offsets[values.name] - shared.state_offsets[keys.name],
    }  # fmt: skip
    q = low.temporary("q", op.attrs["heads"] * head_dim, row_count(op.results[0]))
    parameters = {
        **heads,
        **cache,
        "R": width(table),
        "eps": op.attrs["eps"],
        "scale": op.attrs["scale"],
    }
    inputs = [view[q_gate], view[k], view[v]]
    norms = [shared.weight("vector", w) for w in (q_norm, k_norm)]
    where = [shared.state(keys), view[slots], view[starts]]
    args = [*inputs, *norms, view[table], q, *where, q.rows, *(stride(x) for x in inputs)]
    low.call(("attention_prepare", parameters), args, [q], [keys, values])
    if (
        op.results[0] not in low.readers
        and op.results[-1] not in low.readers
        and op.results[0] != low.logits
    ):
        return  # the entry only continues the cache

    is_batch = op.attrs["rows"] == "batch"
    parameters = {**heads, **cache, "splits": splits}
    y, scratch = low.exact(op), low.scratch("attention", **parameters)
    made = low.rounded_result(op)
    group, rounded = made or (0, y)
    written = [y, rounded] if made else [y]
    strides = [stride(v) for v in (view[q_gate], y, rounded)]
    if not is_batch:
        parameters["group"] = group
    args = [q, view[q_gate], *where, y, rounded, scratch, y.rows, *strides, Tid()]
    low.call(("attention", parameters), args, [scratch, *written], [keys, values])
    if is_batch:
        parameters = {**heads, "kv_dtype": kv_dtype, "splits": splits, "group": group}
        args = [scratch, view[q_gate], y, rounded, y.rows, *strides]
        low.call(("attention_combine", parameters), args, written)


def lower_sparse_moe(low: Lowering, op: Op) -> None:
    x, logits, gate, residual = (
        op[name] for name in ("x", "router_logits", "shared_gate", "residual")
    )
    shared, view, top_k = low.shared, low.views, op.attrs["top_k"]
    experts, hidden, inner = (int(d) for d in op["down"].type.shape)  # type: ignore[arg-type]
    rows = row_count(op.result)
    ups, downs = [op["gate_up"]], [op["down"]]
    router = {"E": experts, "top_k": top_k}
    is_folded = op.kind == "folded_moe_residual"
    if is_folded:  # the shared expert is the last one, and every token's last choice
        ups, downs = [*ups, op["gate"], op["up"]], [*downs, op["shared_down"]]
        experts, top_k = experts + 1, top_k + 1
    ids, weights, order = (low.temporary(name, top_k, rows) for name in ("ids", "weights", "order"))
    active, offsets, number = (low.temporary(n, s, Int(1)) for n, s in (("active", experts), ("offsets", experts + 1), ("count", 1)))  # fmt: skip
    groups = [order, active, offsets, number]

    args = [view[logits], view[gate], ids, weights, rows, stride(view[logits]), stride(view[gate])]
    low.call(("route", {**router, "has_shared": is_folded}), args, [ids, weights])
    low.call(("group_by_expert", {"E": experts, "top_k": top_k}), [ids, *groups, rows], groups)

    shape = {
        "E": experts,
        "I": inner,
        "H": hidden,
        "top_k": top_k,
        "rows": x.type.dtype,
        "dtype": op["gate_up"].type.dtype,
    }
    activated = lower_gate_up(low, shape, view[x], shared.weight("experts_swiglu", *ups), groups)
    outputs = low.temporary("outputs", top_k * hidden, rows)
    args = [
        shared.weight("experts", *downs),
        activated,
        *groups,
        outputs,
        rows,
        Int(activated.stride // top_k),
    ]
    low.call(("expert_down", {**shape, "dtype": op["down"].type.dtype}), args, [outputs])

    y = low.output(op.result)
    # Without a shared expert beside the others, combine reads no shared rows: any take their place.
    inputs = [view[residual if is_folded else op["shared"]], view[gate], view[residual]]
    args = [outputs, weights, *inputs, y, rows, *(stride(v) for v in (*inputs, y))]
    parameters = {"H": hidden, "top_k": top_k, "has_shared": not is_folded}
    low.call(("combine", parameters), args, [y])


def lower_gate_up(
    low: Lowering, shape: dict[str, Any], x: View, weight: WeightRef, groups: list[View]
) -> View:
    """Return the experts' inner rows, one for each pair of token and choice, as the product with `down` reads them."""
    inner, top_k, dtype = shape["I"], shape["top_k"], shape["rows"]
    args = [weight, x, *groups]
    form = integer_format(dtype)
    if form is None or inner % form.group:
        activated = low.temporary("activated", top_k * inner, x.rows)
        low.call(("expert_gate_up", shape), [*args, activated, x.rows, stride(x)], [activated])
        # The kernel that rounds sees top_k times as many tokens.
        return activated if dtype == "f32" else low.rounded(activated, inner, dtype, pairs=top_k)
    shape = {**shape, "group": form.group}
    q = low.temporary("rounded", top_k * low.shared.backend.row_words(dtype, inner), x.rows)
    scratch = low.scratch("expert_gate_up", **shape)
    arrivals = low.shared.arrivals(shape["E"] * inner // form.group)
    args += [q, scratch, arrivals, x.rows, stride(x), Int(q.stride // top_k), Tid()]
    low.call(("expert_gate_up", shape), args, [q, scratch])
    return q


def lower_quantize_rows(low: Lowering, op: Op) -> None:
    x, q = low.views[op.operands[0]], low.output(op.result)
    low.quantize(x, q, width(op.result), op.attrs["dtype"])


RULES: dict[str, Callable[[Lowering, Op], None]] = {
    "embedding": lower_embedding,
    "linear": lower_linear,
    "linear_residual": lower_linear_residual,
    "linear_swiglu": lower_linear_swiglu,
    "rounded_linear_swiglu": lower_linear_swiglu,
    "slice": lower_slice,
    "last_token": lower_last_token,
    "rms_norm": lower_rms_norm,
    "rounded_rms_norm": lower_rms_norm,
    "rotary_table": lower_rotary_table,
    "stateful_gated_delta_net": lower_gated_delta_net,
    "rounded_stateful_gated_delta_net": lower_gated_delta_net,
    "scheduled_gated_attention": lower_gated_attention,
    "rounded_scheduled_gated_attention": lower_gated_attention,
    "sparse_moe_residual": lower_sparse_moe,
    "quantized_moe_residual": lower_sparse_moe,
    "folded_moe_residual": lower_sparse_moe,
    "quantize_rows": lower_quantize_rows,
}
