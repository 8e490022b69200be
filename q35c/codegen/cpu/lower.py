"""Lowering: every op of an entry becomes kernel calls. One function per op kind, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from q35c.codegen.calls import Int
from q35c.codegen.cpu.lower_tower import TOWER_RULES
from q35c.codegen.requests import Lowering, Shared, row_count, width
from q35c.codegen.rules import (
    lower_last_token,
    lower_ops,
    lower_rotary_table,
    lower_slice,
)
from q35c.codegen.schedule import Schedule, View, WeightRef
from q35c.errors import LoweringError
from q35c.formats.registry import integer_format
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import count
from q35c.layouts.weights import WeightLayout


def lower(graph: Graph, shared: Shared, max_tokens: int) -> Schedule:
    """Return the steps of an entry of up to `max_tokens` rows, or raise LoweringError naming the op that has no kernel."""
    low = Lowering(graph, shared, max_tokens)
    return lower_ops(
        low, RULES, "no lowering for this op", "the fusion passes should have replaced it"
    )


# --- one rule per op ------------------------------------------------------------------------------


def lower_embedding(low: Lowering, op: Op) -> None:
    tokens, table, *given = op.operands
    vocabulary, hidden = table.type.shape
    parameters = {"V": vocabulary, "H": hidden, "dtype": table.type.dtype}
    rows: dict[str, View] = {}
    if given:
        parameters["is_mixed"] = True
        rows["rows"] = replace(low.views[given[0]], stride=hidden)
    w, y = low.shared.weight("linear", table), low.output(op.result)
    low.call("embedding", parameters, w=w, ids=low.views[tokens], **rows, y=y)


def lower_matrix(
    low: Lowering, op: Op, epilogue: str, layout: WeightLayout, weights: tuple[Value, ...]
) -> None:
    x = low.views[op.operands[0]]
    parameters = {
        "N": sum(count(w.type.shape[:1]) for w in weights),
        "K": width(weights[0]),
        "dtype": weights[0].type.dtype,
        "rows": op.operands[0].type.dtype,
        "epilogue": epilogue,
    }
    w = low.shared.weight(layout, *weights)
    if rounded := low.rounded_result(op):
        parameters["group"], q = rounded
        scratch = low.scratch("linear", **parameters)
        arrivals = low.shared.arrivals(width(op.result) // parameters["group"])
        low.call("linear", parameters, w=w, x=x, q=q, scratch=scratch, arrivals=arrivals)
        return
    residual = {"r": low.views[op.operands[1]]} if epilogue == "residual" else {}
    low.call("linear", parameters, w=w, x=x, y=low.output(op.result), **residual)


def lower_linear(low: Lowering, op: Op) -> None:
    lower_matrix(low, op, "none", "linear", op.operands[1:])


def lower_linear_residual(low: Lowering, op: Op) -> None:
    lower_matrix(low, op, "residual", "linear", op.operands[2:])


def lower_linear_swiglu(low: Lowering, op: Op) -> None:
    lower_matrix(low, op, "swiglu", "swiglu", op.operands[1:])


def lower_rms_norm(low: Lowering, op: Op) -> None:
    x, w = low.views[op.operands[0]], low.shared.weight("vector", op.operands[1])
    parameters = {"D": width(op.results[0]), "eps": op.attrs["eps"], "offset": op.attrs["offset"]}
    rounded = low.rounded_result(op)
    if rounded is None:
        low.call("rms_norm", parameters, x=x, w=w, y=low.output(op.result))
        return
    group, q = rounded
    is_kept = op.attrs["is_kept"]
    y = low.output(op.results[0]) if is_kept else q  # or else it is not touched
    parameters |= {"group": group, "is_kept": is_kept}
    low.call("rms_norm", parameters, x=x, w=w, y=y, q=q)


def lower_gated_delta_net(low: Lowering, op: Op) -> None:
    qkv, z, b, a, conv_w, a_log, dt_bias, norm_w, slots, starts, conv, delta = op.operands
    _, value_heads, key_dim, value_dim = delta.type.shape
    shared, view = low.shared, low.views
    shape = {
        "Hk": op.attrs["key_heads"], "Hv": value_heads, "Dk": key_dim, "Dv": value_dim, "K": width(conv_w),
        "eps": op.attrs["eps"], "slot_offset_bytes": 0,
    }  # fmt: skip
    x = overwritten(low, op, qkv)  # by their convolution
    a_log, dt_bias, norm_w = (shared.weight("vector", w) for w in (a_log, dt_bias, norm_w))
    y, rounded = low.exact(op), low.rounded_result(op)
    shape["group"], q = rounded or (0, y)
    arguments = {
        "conv_w": shared.weight("conv", conv_w), "conv_state": shared.state(conv), "state": shared.state(delta),
        "qkv": x, "z": view[z], "b": view[b], "a": view[a], "a_log": a_log, "dt_bias": dt_bias, "norm_w": norm_w,
        "slots": view[slots], "y": y, "rounded": q,
    }  # fmt: skip
    if op.attrs["rows"] == "batch":
        low.call("gated_delta_decode", shape, **arguments)
        return
    scratch = low.scratch("gated_delta", **shape)
    low.call("gated_delta", shape, **arguments, starts=view[starts], scratch=scratch)


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
    place = {"state": shared.state(keys, values), "slots": view[slots], "starts": view[starts]}
    q = low.temporary("q", op.attrs["heads"] * head_dim, row_count(op.results[0]))
    rotation = {"R": width(table), "eps": op.attrs["eps"], "scale": op.attrs["scale"]}
    low.call(
        "attention_prepare", {**heads, **cache, **rotation}, **place,
        qg=view[q_gate], k=view[k], v=view[v], table=view[table], q_out=q,
        q_norm=shared.weight("vector", q_norm), k_norm=shared.weight("vector", k_norm),
    )  # fmt: skip
    if (
        op.results[0] not in low.readers
        and op.results[-1] not in low.readers
        and op.results[0] != low.logits
    ):
        return  # the entry only continues the cache

    is_batch = op.attrs["rows"] == "batch"
    parameters = {**heads, **cache, "splits": splits}
    y, scratch = low.exact(op), low.scratch("attention", **parameters)
    group, rounded = low.rounded_result(op) or (0, y)
    if not is_batch:
        parameters["group"] = group
    rows = {"qg": view[q_gate], "y": y, "rounded": rounded, "scratch": scratch}
    low.call("attention", parameters, **place, **rows, q=q)
    if is_batch:
        parameters = {**heads, "kv_dtype": kv_dtype, "splits": splits, "group": group}
        low.call("attention_combine", parameters, **rows)


def lower_sparse_moe(low: Lowering, op: Op) -> None:
    x, logits, gate, residual = (
        low.views[op[name]] for name in ("x", "router_logits", "shared_gate", "residual")
    )
    shared, top_k = low.shared, op.attrs["top_k"]
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
    groups = {"order": order, "active": active, "offsets": offsets, "count": number}

    parameters = {**router, "has_shared": is_folded}
    low.call("route", parameters, logits=logits, gate=gate, ids=ids, weights=weights)
    low.call("group_by_expert", {"E": experts, "top_k": top_k}, ids=ids, **groups)

    shape = {
        "E": experts,
        "I": inner,
        "H": hidden,
        "top_k": top_k,
        "rows": op["x"].type.dtype,
        "dtype": op["gate_up"].type.dtype,
    }
    activated = lower_gate_up(low, shape, x, shared.weight("experts_swiglu", *ups), groups)
    outputs = low.temporary("outputs", top_k * hidden, rows)
    w, parameters = shared.weight("experts", *downs), {**shape, "dtype": op["down"].type.dtype}
    low.call("expert_down", parameters, w=w, y1=activated.split(top_k), **groups, y2=outputs)

    # Without a shared expert beside the others, combine reads no shared rows: any take their place.
    beside = residual if is_folded else low.views[op["shared"]]
    low.call(
        "combine", {"H": hidden, "top_k": top_k, "has_shared": not is_folded},
        y2=outputs, weights=weights, shared=beside, gate=gate, residual=residual, y=low.output(op.result),
    )  # fmt: skip


def lower_gate_up(
    low: Lowering, shape: dict[str, Any], x: View, weight: WeightRef, groups: dict[str, View]
) -> View:
    """Return the experts' inner rows, one for each pair of token and choice, as the product with `down` reads them."""
    inner, top_k, dtype = shape["I"], shape["top_k"], shape["rows"]
    form = integer_format(dtype)
    if form is None or inner % form.group:
        activated = low.temporary("activated", top_k * inner, x.rows)
        low.call("expert_gate_up", shape, w=weight, x=x, **groups, y=activated)
        # The kernel that rounds sees top_k times as many tokens.
        return activated if dtype == "f32" else low.rounded(activated, inner, dtype, pairs=top_k)
    shape = {**shape, "group": form.group}
    q = low.temporary("rounded", top_k * low.shared.row_words(dtype, inner), x.rows)
    scratch = low.scratch("expert_gate_up", **shape)
    arrivals = low.shared.arrivals(shape["E"] * inner // form.group)
    made = {"q": q.split(top_k), "scratch": scratch, "arrivals": arrivals}
    low.call("expert_gate_up", shape, w=weight, x=x, **groups, **made)
    return q


def lower_quantize_rows(low: Lowering, op: Op) -> None:
    x, q = low.views[op.operands[0]], low.output(op.result)
    low.quantize(x, q, width(op.result), op.attrs["dtype"])


RULES: dict[str, Callable[[Lowering, Op], None]] = {
    "embedding": lower_embedding,
    "embedding_or_rows": lower_embedding,
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
    **TOWER_RULES,
}
