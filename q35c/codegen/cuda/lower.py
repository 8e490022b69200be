"""Lowering for CUDA: every op of an entry becomes launches. One function per op kind, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from q35c.codegen.calls import Int
from q35c.codegen.cuda.kernels.cache import CACHES
from q35c.codegen.cuda.kernels.prologue import MOST_BYTES, Prologue
from q35c.codegen.requests import Lowering, Shared, row_count, width
from q35c.codegen.rules import (
    lower_last_token,
    lower_ops,
    lower_rotary_table,
    lower_slice,
)
from q35c.codegen.schedule import Schedule, View, WeightRef
from q35c.formats.registry import is_row_format
from q35c.ir.graph import Graph, Op, Value
from q35c.ir.types import count
from q35c.layouts.weights import WeightLayout

TILE = 8  # rows for which a product reads its weights once
FEW = 8  # rows for which a product makes its own: more would make them once for many blocks
LINEAR = ("linear", "linear_residual", "linear_swiglu", "rounded_linear_swiglu")
PRODUCTS = (*LINEAR, "sparse_moe_residual", "quantized_moe_residual", "folded_moe_residual")


def lower(graph: Graph, shared: Shared, max_tokens: int) -> Schedule:
    """Return the launches of an entry of up to `max_tokens` rows, or raise LoweringError naming the op that has no kernel."""
    low = CudaLowering(graph, shared, max_tokens)
    return lower_ops(low, RULES, "no CUDA kernel for this op", "compile for a CPU target")


# --- rows that products make themselves -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Made:
    """Rows that no kernel has made yet: what becomes of which f32 rows (kernels/prologue.py)."""

    x: View
    dtype: str
    norm: WeightRef | None = None
    eps: float = 0.0
    offset: float = 0.0
    gate: View | None = None
    head_dim: int = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """Return what a product must know to make them."""
        if self.norm is None:
            return {"prologue": "round"}
        if self.gate is not None:
            return {"prologue": "gated", "eps": self.eps, "head_dim": self.head_dim}
        return {"prologue": "norm", "eps": self.eps, "offset": self.offset}

    @property
    def pointers(self) -> dict[str, View | WeightRef]:
        """Return what a product must be given to make them."""
        given = {"x": self.x, "norm": self.norm, "gate": self.gate}
        return {name: pointer for name, pointer in given.items() if pointer is not None}


class CudaLowering(Lowering):
    """Lower one entry; of few rows norms and rounding are left to the products that read them."""

    def __init__(self, graph: Graph, shared: Shared, max_tokens: int) -> None:
        super().__init__(graph, shared, max_tokens)
        self.made: dict[Value, Made] = {}

    @property
    def tile(self) -> int:
        return min(TILE, self.max_tokens)

    def can_be_made(self, value: Value, dtype: str, is_gated: bool = False) -> bool:
        """Tell whether rows of this dtype are few, and all that read them are products that can make them."""
        readers = self.readers.get(value, [])
        is_few = self.max_tokens <= FEW
        return (
            is_few
            and bool(readers)
            and all(self._makes(op, value, dtype, is_gated) for op in readers)
        )

    def _makes(self, op: Op, value: Value, dtype: str, is_gated: bool) -> bool:
        if op.kind == "quantize_rows":
            return self.can_be_made(op.result, op.attrs["dtype"], is_gated)
        products = LINEAR if is_gated else PRODUCTS
        is_small = 4 * self.tile * Prologue("round", width(value), dtype).words <= MOST_BYTES
        return (
            is_small
            and op.kind in products
            and [name for name, v in op.named() if v == value] == ["x"]
        )

    def product_rows(self, value: Value) -> tuple[dict[str, Any], Mapping[str, View | WeightRef]]:
        """Return the parameters and pointers by which a product reads rows."""
        made = self.made.get(value)
        return ({}, {"x": self.views[value]}) if made is None else (made.parameters, made.pointers)

    def finish(self, op: Op, exact: View) -> None:
        """Round an op's exact rows, if it has rounded ones as well, or leave it to the products that read them."""
        if "is_kept" in op.attrs.to_dict():
            self.round_rows(exact, op.results[-1], op.attrs["dtype"])

    def round_rows(self, x: View, result: Value, dtype: str) -> None:
        """Round rows, or leave it to the products that read them."""
        if self.can_be_made(result, dtype):
            self.made[result] = Made(x, dtype)
        else:
            self.quantize(x, self.output(result), width(result), dtype)


def lower_quantize_rows(low: CudaLowering, op: Op) -> None:
    source = low.made.get(op.operands[0])
    if source is not None:
        low.made[op.result] = replace(source, dtype=op.attrs["dtype"])
    else:
        low.round_rows(low.views[op.operands[0]], op.result, op.attrs["dtype"])


# --- one rule per op ------------------------------------------------------------------------------


def lower_embedding(low: CudaLowering, op: Op) -> None:
    tokens, table = op.operands
    vocabulary, hidden = table.type.shape
    parameters = {"V": vocabulary, "H": hidden, "dtype": table.type.dtype}
    w = low.shared.weight("linear", table)
    low.call("embedding", parameters, w=w, ids=low.views[tokens], y=low.output(op.result))


def lower_matrix(
    low: CudaLowering, op: Op, epilogue: str, layout: WeightLayout, weights: tuple[Value, ...]
) -> None:
    first, rows = low.product_rows(op.operands[0])
    parameters: dict[str, Any] = {
        **first,
        "N": sum(count(w.type.shape[:1]) for w in weights),
        "K": width(weights[0]),
        "dtype": weights[0].type.dtype,
        "rows": op.operands[0].type.dtype,
        "epilogue": epilogue,
    }
    family = "linear"
    is_one_row = isinstance(row_count(op.result), Int)
    if is_row_format(parameters["rows"]) and low.max_tokens > FEW and not is_one_row:
        family = "linear_tiles"
    else:
        parameters["tile"] = 1 if is_one_row else low.tile
    residual = {"r": low.views[op.operands[1]]} if epilogue == "residual" else {}
    y = low.exact(op)
    low.call(family, parameters, w=low.shared.weight(layout, *weights), y=y, **rows, **residual)
    low.finish(op, y)


def lower_linear(low: CudaLowering, op: Op) -> None:
    lower_matrix(low, op, "none", "linear", op.operands[1:])


def lower_linear_residual(low: CudaLowering, op: Op) -> None:
    lower_matrix(low, op, "residual", "linear", op.operands[2:])


def lower_linear_swiglu(low: CudaLowering, op: Op) -> None:
    lower_matrix(low, op, "swiglu", "swiglu", op.operands[1:])


def lower_rms_norm(low: CudaLowering, op: Op) -> None:
    x, w = low.views[op.operands[0]], low.shared.weight("vector", op.operands[1])
    shape = {"eps": op.attrs["eps"], "offset": op.attrs["offset"]}
    read = [value for value in op.results if value in low.readers]
    if all(low.can_be_made(value, value.type.dtype) for value in read):
        low.made |= {value: Made(x, value.type.dtype, w, **shape) for value in read}
        return
    y = low.exact(op)
    low.call("rms_norm", {"D": width(op.results[0]), **shape}, x=x, w=w, y=y)
    low.finish(op, y)


def lower_gated_delta_net(low: CudaLowering, op: Op) -> None:
    qkv, z, b, a, conv_w, a_log, dt_bias, norm_w, slots, _, conv, delta = op.operands
    _, value_heads, key_dim, value_dim = delta.type.shape
    shared, view, rows = low.shared, low.views, row_count(op.results[0])
    heads = {"Hk": op.attrs["key_heads"], "Hv": value_heads, "Dk": key_dim, "Dv": value_dim}
    shape = {**heads, "K": width(conv_w), "rows": op.attrs["rows"]}
    mixed = low.temporary("mixed", width(qkv), rows)
    gates = low.temporary("gates", 2 * op["b"].type.shape[-1], rows)  # type: ignore[operator]
    o = low.temporary("o", width(op.results[0]), rows)
    a_log, dt_bias, norm_w = (shared.weight("vector", w) for w in (a_log, dt_bias, norm_w))
    low.call(
        "delta_inputs", shape, conv_w=shared.weight("conv", conv_w), conv_state=shared.state(conv), qkv=view[qkv],
        b=view[b], a=view[a], a_log=a_log, dt_bias=dt_bias, slots=view[slots], mixed=mixed, gates=gates,
    )  # fmt: skip
    low.call(
        "delta_scan", shape, conv_state=shared.state(conv), state=shared.state(delta), qkv=view[qkv],
        mixed=mixed, gates=gates, slots=view[slots], o=o,
    )  # fmt: skip
    if is_unread(low, op):
        return  # the entry only continues the state
    read = [value for value in op.results if value in low.readers]
    if all(low.can_be_made(value, value.type.dtype, is_gated=True) for value in read):
        made = Made(o, "", norm_w, op.attrs["eps"], gate=view[z], head_dim=value_dim)  # type: ignore[arg-type]
        low.made |= {value: replace(made, dtype=value.type.dtype) for value in read}
        return
    y = low.exact(op)
    parameters = {"Hv": value_heads, "Dv": value_dim, "eps": op.attrs["eps"]}
    low.call("delta_output", parameters, o=o, z=view[z], norm_w=norm_w, y=y)
    low.finish(op, y)


def is_unread(low: CudaLowering, op: Op) -> bool:
    """Tell whether no result of an op is read."""
    return not any(result in low.readers or result == low.logits for result in op.results)


def lower_gated_attention(low: CudaLowering, op: Op) -> None:
    q_gate, k, v, q_norm, k_norm, table, slots, starts, keys, values = op.operands
    shared, view, rows = low.shared, low.views, row_count(op.results[0])
    head_dim, splits = width(q_norm), op.attrs["splits"] if op.attrs["rows"] == "batch" else 1
    heads = {"Hq": op.attrs["heads"], "D": head_dim}
    # Offsets relative to the keys are the same in every layer, so all layers share one kernel.
    cache = {
        **heads, "Hkv": op.attrs["kv_heads"], "kv_dtype": op.attrs["cache"], "context": shared.context, "rows": op.attrs["rows"],
        "v_offset_bytes": shared.state_offsets[values.name] - shared.state_offsets[keys.name],
    }  # fmt: skip
    state = shared.state(keys, values)
    place = dict.fromkeys(CACHES[op.attrs["cache"]].pointers.split(), state)
    place |= {"slots": view[slots], "starts": view[starts]}
    q = low.temporary("q", op.attrs["heads"] * head_dim, rows)
    rotation = {"R": width(table), "eps": op.attrs["eps"], "scale": op.attrs["scale"]}
    low.call(
        "attention_prepare", cache | rotation, **place,
        qg=view[q_gate], k=view[k], v=view[v], table=view[table], q_out=q,
        q_norm=shared.weight("vector", q_norm), k_norm=shared.weight("vector", k_norm),
    )  # fmt: skip
    if is_unread(low, op):
        return  # the entry only continues the cache
    y = low.exact(op)
    parameters = {**cache, "splits": splits}
    if splits == 1:
        low.call("attention", parameters, **place, q=q, qg=view[q_gate], y=y)
    else:
        size = op.attrs["heads"] * splits * (head_dim + 2)
        parts = low.temporary("parts", size, rows)
        low.call("attention", parameters, **place, q=q, parts=parts)
        combine = {**heads, "splits": splits}
        low.call("attention_combine", combine, parts=parts, qg=view[q_gate], y=y)
    low.finish(op, y)


def lower_sparse_moe(low: CudaLowering, op: Op) -> None:
    logits, gate, residual = (
        low.views[op[name]] for name in ("router_logits", "shared_gate", "residual")
    )
    shared, top_k, rows = low.shared, op.attrs["top_k"], row_count(op.result)
    experts, hidden, inner = (int(d) for d in op["down"].type.shape)  # type: ignore[arg-type]
    ups, downs = [op["gate_up"]], [op["down"]]
    router = {"E": experts, "top_k": top_k}
    is_folded = op.kind == "folded_moe_residual"
    if is_folded:  # the shared expert is the last one, and every token's last choice
        ups, downs = [*ups, op["gate"], op["up"]], [*downs, op["shared_down"]]
        experts, top_k = experts + 1, top_k + 1
    ids, weights = (low.temporary(name, top_k, rows) for name in ("ids", "weights"))
    router |= {"has_shared": is_folded}
    low.call("route", router, logits=logits, gate=gate, ids=ids, weights=weights)

    dtype = op["x"].type.dtype
    shape: dict[str, Any] = {"E": experts, "I": inner, "H": hidden, "top_k": top_k, "rows": dtype}
    activated = low.temporary("activated", top_k * inner, rows)
    first, x = low.product_rows(op["x"])
    parameters = {**shape, **first, "dtype": op["gate_up"].type.dtype}
    up = shared.weight("experts_swiglu", *ups)
    low.call("expert_gate_up", parameters, w=up, **x, ids=ids, y=activated)
    outputs = low.temporary("outputs", top_k * hidden, rows)
    read, first = activated, {}
    if dtype != "f32" and low.max_tokens <= FEW:
        first = Made(activated, dtype).parameters
    elif dtype != "f32":
        read = low.rounded(activated, inner, dtype, pairs=top_k)
    parameters = {**shape, **first, "dtype": op["down"].type.dtype}
    down = shared.weight("experts", *downs)
    low.call("expert_down", parameters, w=down, x=read.split(top_k), ids=ids, y=outputs)

    # Without a shared expert beside the others, combine reads no shared rows: any take their place.
    beside = residual if is_folded else low.views[op["shared"]]
    low.call(
        "combine", {"H": hidden, "top_k": top_k, "has_shared": not is_folded},
        y2=outputs, weights=weights, shared=beside, gate=gate, residual=residual, y=low.output(op.result),
    )  # fmt: skip


RULES: dict[str, Callable[[CudaLowering, Op], None]] = {
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
