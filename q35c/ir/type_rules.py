"""Type rules of the op table: from operand types and attributes to result types.

A rule raises ShapeRuleError for operands that do not fit; the verifier adds graph and op to it.
"""

from __future__ import annotations

import math
from typing import Any

from q35c.formats.registry import integer_format, is_row_format
from q35c.ir.types import Dim, SymDim, TensorType

Types = tuple[TensorType, ...]
Attributes = dict[str, Any]
FLOATS = ("f32", "bf16")


class ShapeRuleError(Exception):
    """An op's operands break its type rule."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeRuleError(message)


def static(dim: Dim, what: str) -> int:
    """Return a dimension that must be an integer."""
    if isinstance(dim, SymDim):
        raise ShapeRuleError(f"{what} must be static, not {dim}")
    return dim


def checked_axis(tensor: TensorType, axis: int) -> int:
    """Return the axis counted from the front."""
    need(-tensor.rank <= axis < tensor.rank, f"axis {axis} is out of range of {tensor}")
    return axis % tensor.rank


def fits(name: str, tensor: TensorType, *shape: Dim) -> None:
    """Check the shape of one operand of a composite op."""
    shown = ", ".join(map(str, shape))
    need(tensor.shape == shape, f"{name} {tensor} must have the shape [{shown}]")


# --- elementwise, reductions and views -----------------------------------------------------------


def same(types: Types, attrs: Attributes) -> Types:
    return (types[0],)


def floating(types: Types, attrs: Attributes) -> Types:
    need(types[0].dtype in FLOATS, f"wants a float tensor, not {types[0]}")
    return (types[0],)


def paired(types: Types, attrs: Attributes) -> Types:
    need(types[0] == types[1], f"types differ: {types[0]} and {types[1]}")
    return (types[0],)


def softmax_type(types: Types, attrs: Attributes) -> Types:
    checked_axis(types[0], attrs["axis"])
    return floating(types, attrs)


def cast_type(types: Types, attrs: Attributes) -> Types:
    known = ("f32", "i32", "i64")
    need(attrs["dtype"] in known, f"cannot cast to {attrs['dtype']!r}, only to {known}")
    return (TensorType(attrs["dtype"], types[0].shape),)


def broadcast(types: Types, attrs: Attributes) -> Types:
    a, b = types
    need(a.dtype == b.dtype, f"dtypes differ: {a} and {b}")
    rank = max(a.rank, b.rank)
    left, right = ((1,) * (rank - t.rank) + t.shape for t in types)
    dims: list[Dim] = []
    for x, y in zip(left, right, strict=True):
        need(x == y or x == 1 or y == 1, f"shapes do not broadcast: {a} and {b}")
        dims.append(y if x == 1 else x)
    return (TensorType(a.dtype, tuple(dims)),)


def divided(types: Types, attrs: Attributes) -> Types:
    floating(types, attrs)
    return broadcast(types, attrs)


def reduce_axis(types: Types, attrs: Attributes) -> Types:
    floating(types, attrs)
    shape = list(types[0].shape)
    shape[checked_axis(types[0], attrs["axis"])] = 1
    return (TensorType(types[0].dtype, tuple(shape)),)


def symbolic_product(shape: tuple[Dim, ...]) -> tuple[int, tuple[str, ...]]:
    numbers = [d if isinstance(d, int) else d.factor for d in shape]
    return math.prod(numbers), tuple(sorted(d.name for d in shape if isinstance(d, SymDim)))


def reshaped(types: Types, attrs: Attributes) -> Types:
    need(
        symbolic_product(types[0].shape) == symbolic_product(attrs["shape"]),
        f"reshape changes the number of elements of {types[0]}",
    )
    return (TensorType(types[0].dtype, tuple(attrs["shape"])),)


def transposed(types: Types, attrs: Attributes) -> Types:
    perm: tuple[int, ...] = attrs["perm"]
    need(sorted(perm) == list(range(types[0].rank)), "perm is not a permutation")
    return (TensorType(types[0].dtype, tuple(types[0].shape[i] for i in perm)),)


def slice_length(dim: Dim, start: int, stop: int, step: int) -> int:
    size = static(dim, "a sliced axis")
    need(0 <= start < stop <= size and step >= 1, f"slice {start}:{stop}:{step} leaves 0..{size}")
    return -(-(stop - start) // step)


def sliced(types: Types, attrs: Attributes) -> Types:
    shape, axis = list(types[0].shape), checked_axis(types[0], attrs["axis"])
    shape[axis] = slice_length(shape[axis], attrs["start"], attrs["stop"], attrs["step"])
    return (TensorType(types[0].dtype, tuple(shape)),)


def slice_updated(types: Types, attrs: Attributes) -> Types:
    target, update = types
    axis, start, step = checked_axis(target, attrs["axis"]), attrs["start"], attrs["step"]
    need(update.rank == target.rank, f"ranks differ: {target} and {update}")
    length = static(update.shape[axis], "an updated axis")
    slice_length(target.shape[axis], start, start + (length - 1) * step + 1, step)
    shape = (*target.shape[:axis], length, *target.shape[axis + 1 :])
    need(update == TensorType(target.dtype, shape), f"update {update} does not fit {target}")
    return (target,)


def concatenated(types: Types, attrs: Attributes) -> Types:
    first, axis = types[0], checked_axis(types[0], attrs["axis"])
    need(all(t.rank == first.rank for t in types), "ranks differ")
    total = sum(static(t.shape[axis], "a concatenated axis") for t in types)
    for t in types:
        rest = (*t.shape[:axis], first.shape[axis], *t.shape[axis + 1 :])
        need(rest == first.shape and t.dtype == first.dtype, f"{t} does not fit {first}")
    return (TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :])),)


def constant_type(types: Types, attrs: Attributes) -> Types:
    need(math.prod(attrs["shape"]) == len(attrs["values"]), "values do not fill the shape")
    return (TensorType("f32", tuple(attrs["shape"])),)


def topk_type(types: Types, attrs: Attributes) -> Types:
    floating(types, attrs)
    need(types[0].rank >= 1, "wants at least one axis")
    size, k = static(types[0].shape[-1], "the last axis"), attrs["k"]
    need(1 <= k <= size, f"k = {k} is not within 1..{size}")
    shape = (*types[0].shape[:-1], k)
    return TensorType(types[0].dtype, shape), TensorType("i32", shape)


def last_row(types: Types, attrs: Attributes) -> Types:
    need(types[0].rank >= 1, "a scalar has no rows")
    return (TensorType(types[0].dtype, (1, *types[0].shape[1:])),)


# --- embedding, linear and norms -----------------------------------------------------------------


def looked_up(types: Types, attrs: Attributes) -> Types:
    tokens, table, *rows = types
    need(tokens.dtype == "i32" and table.rank == 2, "wants i32 tokens and a table [V, H]")
    result = TensorType("f32", (*tokens.shape, table.shape[1]))
    need(rows in ([], [result]), f"rows must be {result}")
    return (result,)


def linear_type(types: Types, attrs: Attributes) -> Types:
    x, *weights = types
    need(x.rank >= 1, "wants an input [.., K]")
    for w in weights:
        need(w.rank == 2 and w.shape[1] == x.shape[-1], f"weight {w} does not fit input {x}")
        need(w.dtype == weights[0].dtype, "the weights have several formats")
        check_rows(x, w)
    total = sum(static(w.shape[0], "a weight's rows") for w in weights)
    return (TensorType("f32", (*x.shape[:-1], total)),)


def check_rows(x: TensorType, weight: TensorType) -> None:
    """Check that integer weights meet rows rounded in the same groups, bf16 rows bf16 weights."""
    activations, stored = integer_format(x.dtype), integer_format(weight.dtype)
    if activations is None:
        need(stored is None, f"integer weight {weight} needs rounded rows, not {x}")
        need(
            x.dtype != "bf16" or weight.dtype == "bf16",
            f"bf16 rows {x} need a bf16 weight, not {weight}",
        )
    else:
        need(
            stored is not None and stored.group == activations.group,
            f"rounded rows {x} need an integer weight of the same group, not {weight}",
        )


def quantized_rows(types: Types, attrs: Attributes) -> Types:
    (x,) = types
    need(is_row_format(attrs["dtype"]), f"{attrs['dtype']!r} is no format of rows")
    need(x.dtype == "f32" and x.rank == 2, f"wants rows f32 [T, K], not {x}")
    return (TensorType(attrs["dtype"], x.shape),)


def linear_swiglu_type(types: Types, attrs: Attributes) -> Types:
    need(types[1] == types[2], "gate and up differ")
    return linear_type(types[:2], attrs)


def linear_residual_type(types: Types, attrs: Attributes) -> Types:
    out = linear_type((types[0], types[2]), attrs)
    need(out[0] == types[1], f"residual {types[1]} does not fit {out[0]}")
    return out


def normed(types: Types, attrs: Attributes) -> Types:
    x, weight, *gate = types
    need(weight.shape == x.shape[-1:] != (), f"norm weight {weight} does not fit {x}")
    need(gate in ([], [x]), f"gate does not fit {x}")
    return (x,)


# --- composites ----------------------------------------------------------------------------------


def conv_type(types: Types, attrs: Attributes) -> Types:
    x, weight = types
    need(x.rank == 2 and weight.rank == 2, "wants x [C, T] and a weight [C, K]")
    need(x.shape[0] == weight.shape[0], f"channels differ: {x} and {weight}")
    return (x,)


def delta_rule_type(types: Types, attrs: Attributes) -> Types:
    q, k, v, g, beta = types
    need(q == k and q.rank == 3 and v.rank == 3, "wants q, k [T, Hk, Dk] and v [T, Hv, Dv]")
    key_heads, value_heads = (static(t.shape[1], "the number of heads") for t in (q, v))
    need(key_heads >= 1, "there must be a key head")
    need(value_heads % key_heads == 0, "value heads are no multiple of key heads")
    need(g.shape == beta.shape == v.shape[:2], "g and beta must be [T, Hv]")
    need(q.shape[0] == v.shape[0], "q and v differ in tokens")
    return (v,)


def attention_type(types: Types, attrs: Attributes) -> Types:
    q, k, v = types
    need(q.rank == 3 and k == v and q.shape[1:] == k.shape[1:], "wants q [Hq,T,D], k, v [Hkv,T,D]")
    heads, kv_heads = (static(t.shape[0], "the number of heads") for t in (q, k))
    need(kv_heads >= 1, "there must be a key head")
    need(heads % kv_heads == 0, "query heads are no multiple of key heads")
    return (TensorType(q.dtype, (q.shape[1], q.shape[0], q.shape[2])),)


def check_experts(x: TensorType, gate_up: TensorType, down: TensorType) -> int:
    """Check the weights gate_up [E, 2I, H] and down [E, H, I] and return E."""
    need((x.rank, gate_up.rank, down.rank) == (2, 3, 3), "wants x [T,H] and weights [E,..,..]")
    count, double, inner = gate_up.shape[0], gate_up.shape[1], static(down.shape[2], "I")
    need(double == 2 * inner, f"gate_up [E,2I,H] {gate_up} does not fit down [E,H,I] {down}")
    fits("gate_up [E,2I,H]", gate_up, count, double, x.shape[1])
    fits("down [E,H,I]", down, count, x.shape[1], inner)
    return static(count, "the number of experts")


def experts_type(types: Types, attrs: Attributes) -> Types:
    x, ids, weights, gate_up, down = types
    need(ids.dtype == "i32" and ids.rank == 2, "ids must be i32[T, k]")
    fits("weights [T,k]", weights, x.shape[0], ids.shape[1])
    fits("ids [T,k]", ids, x.shape[0], ids.shape[1])
    check_experts(x, gate_up, down)
    return (x,)


def moe_type(types: Types, attrs: Attributes) -> Types:
    x, router, shared, gate, gate_up, down = types[:6]
    experts = check_experts(x, gate_up, down)
    fits("router logits [T,E]", router, x.shape[0], experts)
    fits("the shared gate [T,1]", gate, x.shape[0], 1)
    need(all(t == x for t in (shared, *types[6:])), f"the shared expert does not fit {x}")
    need(1 <= attrs["top_k"] <= experts, f"top_k is not within 1..{experts}")
    return (x,)


def quantized_moe_type(types: Types, attrs: Attributes) -> Types:
    x, residual = types[0], types[6]
    need(is_row_format(x.dtype) and x.dtype == attrs["dtype"], f"x must be {attrs['dtype']} rows")
    for weight in types[4:6]:
        check_rows(x, weight)
    plain = TensorType("f32", x.shape)
    need(residual == plain, f"the residual does not fit {x}")
    return moe_type((plain, *types[1:]), attrs)


def folded_moe_type(types: Types, attrs: Attributes) -> Types:
    x, logits, shared_gate, gate_up, down, residual, gate, up, shared_down = types
    _, double, hidden = gate_up.shape
    inner = static(double, "2I") // 2
    expert = (TensorType(gate_up.dtype, (inner, hidden)),) * 2
    expert += (TensorType(down.dtype, (hidden, inner)),)
    need((gate, up, shared_down) == expert, f"the shared expert is none of {gate_up}, {down}")
    shared = TensorType("f32", x.shape)
    whole = (x, logits, shared, shared_gate, gate_up, down, residual)
    return moe_type(whole, attrs) if attrs["dtype"] == "f32" else quantized_moe_type(whole, attrs)


def delta_net_type(types: Types, attrs: Attributes) -> Types:
    qkv, z, b, a, conv_w, a_log, dt_bias, norm_w = types[:8]
    need(qkv.rank == 2 and conv_w.rank == 3, "wants qkv [T, C] and a conv weight [C, 1, K]")
    tokens, channels, heads = qkv.shape[0], static(qkv.shape[1], "C"), attrs["value_heads"]
    need(conv_w.shape[:2] == (channels, 1), f"conv weight {conv_w} does not fit qkv {qkv}")
    value_dim = static(norm_w.shape[0], "Dv")
    keys = channels - heads * value_dim
    need(attrs["key_heads"] >= 1, "there must be a key head")
    need(heads % attrs["key_heads"] == 0, "value heads are no multiple of key heads")
    need(keys > 0 and keys % (2 * attrs["key_heads"]) == 0, "qkv must be [T, 2*Hk*Dk + Hv*Dv]")
    fits("z [T,Hv*Dv]", z, tokens, heads * value_dim)
    for name, gate in (("a [T,Hv]", a), ("b [T,Hv]", b)):
        fits(name, gate, tokens, heads)
    need(a_log.shape == dt_bias.shape == (heads,), "A_log and dt_bias must be [Hv]")
    return (z,)


def stateful_delta_net_type(types: Types, attrs: Attributes) -> Types:
    (result,) = delta_net_type(types, attrs)
    qkv, conv_w, norm_w, slots, starts, conv, delta = (types[i] for i in (0, 4, 7, 8, 9, 10, 11))
    channels, taps = static(qkv.shape[1], "C"), static(conv_w.shape[2], "K")
    heads, value_dim = attrs["value_heads"], static(norm_w.shape[0], "Dv")
    key_dim = (channels - heads * value_dim) // (2 * attrs["key_heads"])
    check_slots(attrs, slots)
    fits("starts", starts, *slots.shape)
    fits("the conv state [B,K-1,C]", conv, conv.shape[0], taps - 1, channels)
    fits("the delta state [B,Hv,Dk,Dv]", delta, conv.shape[0], heads, key_dim, value_dim)
    return (result,)


def gated_attention_type(types: Types, attrs: Attributes) -> Types:
    q_gate, k, v, q_norm, k_norm, table = types[:6]
    heads, kv_heads = attrs["heads"], attrs["kv_heads"]
    need(q_norm.rank == 1 and q_norm == k_norm, "the norm weights of q and k must be [D]")
    need(table.rank == 2 and q_gate.rank == 2, "wants q_gate [T, Hq*2*D] and a table [T, R]")
    tokens, dim = q_gate.shape[0], static(q_norm.shape[0], "D")
    need(kv_heads >= 1, "there must be a key head")
    need(heads % kv_heads == 0, "query heads are no multiple of key heads")
    fits("q_gate [T,Hq*2*D]", q_gate, tokens, heads * 2 * dim)
    for name, tensor in (("k [T,Hkv*D]", k), ("v [T,Hkv*D]", v)):
        fits(name, tensor, tokens, kv_heads * dim)
    check_table(table, tokens, dim)
    return (TensorType("f32", (tokens, heads * dim)),)


def stateful_attention_type(types: Types, attrs: Attributes) -> Types:
    (result,) = gated_attention_type(types, attrs)
    q_norm, slots, starts, keys, values = (types[i] for i in (3, 6, 7, 8, 9))
    check_slots(attrs, slots)
    fits("starts", starts, *slots.shape)
    need(keys == values and keys.rank == 4, "keys and values must be [B, CTX, Hkv, D]")
    fits("keys", keys, *keys.shape[:2], attrs["kv_heads"], q_norm.shape[0])
    return (result,)


def scheduled_attention_type(types: Types, attrs: Attributes) -> Types:
    need(attrs["cache"] in ("f32", "bf16", "int8"), 'cache must be "f32", "bf16" or "int8"')
    need(attrs["splits"] >= 1, "there must be a part")
    return stateful_attention_type(types, attrs)


def check_slots(attrs: Attributes, slots: TensorType) -> None:
    need(attrs["rows"] in ("sequence", "batch"), 'rows must be "sequence" or "batch"')
    need(slots.rank == 1, f"slots {slots} must have one axis")


def check_table(table: TensorType, tokens: Dim, dim: int) -> None:
    """Check a rotary table [T, R] against heads of `dim`."""
    width = static(table.shape[1], "R")
    fits("the rotary table [T,R]", table, tokens, width)
    need(width % 2 == 0 and width <= dim, f"R = {width} must be even and at most {dim}")


def rotary_type(types: Types, attrs: Attributes) -> Types:
    x, table = types
    need(x.rank == 3 and table.rank == 2, "wants x [H, T, D] and a table [T, R]")
    check_table(table, x.shape[1], static(x.shape[2], "D"))
    return (x,)


def rotary_table_type(types: Types, attrs: Attributes) -> Types:
    (positions,) = types
    need(positions.rank == 2 and positions.shape[0] == 3, "positions must be [3, T]")
    need(len(attrs["sections"]) == 3, "sections must name three axes")
    return (TensorType("f32", (positions.shape[1], 2 * len(attrs["inv_freq"]))),)
