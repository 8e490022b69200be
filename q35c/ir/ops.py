"""The op table. One row declares an op: operands, attributes, type rule, meaning, cost, stages.

Printer, parser, verifier, interpreter, cost report, documentation and op tests come from here.
To add an op: write its row, then one lowering (`codegen/lower.py`) if it survives to the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from q35c.ir import reference as ref
from q35c.ir.types import Dim, SymDim, TensorType

Types = tuple[TensorType, ...]
Attributes = dict[str, Any]


class ShapeRuleError(Exception):
    """An op's operands break its type rule."""


@dataclass(frozen=True)
class OpSpec:
    """One row of the table.

    `infer(types, attrs)` returns the result types or raises ShapeRuleError; `reference(*arrays,
    **attrs)` is the meaning in numpy; `macs(shapes, attrs)` counts multiply-adds with integer shapes.
    """

    kind: str
    summary: str
    operands: tuple[str, ...]
    attrs: tuple[str, ...]
    infer: Callable[[Types, Attributes], Types]
    reference: Callable[..., Any]
    stages: tuple[str, str]
    variadic: bool = False
    writes_state: bool = False
    macs: Callable[[list[tuple[int, ...]], Attributes], int] = lambda shapes, attrs: math.prod(shapes[0])


OPS: dict[str, OpSpec] = {}
ALWAYS, TRACED, FUSED, LATE = (
    ("traced", "scheduled"), ("traced", "fused"), ("fused", "fused"), ("stateful", "scheduled"),
)  # fmt: skip


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeRuleError(message)


def define(kind: str, signature: str, attrs: str, infer, reference, summary: str, **more) -> None:
    """Add a row; a trailing `*` in the signature makes the last operand repeatable."""
    names = tuple(name.rstrip("*") for name in signature.split())
    more.setdefault("stages", ALWAYS)
    OPS[kind] = OpSpec(
        kind, summary, names, tuple(attrs.split()), infer, reference,
        variadic=signature.endswith("*"), **more,
    )  # fmt: skip


# --- type rules ---------------------------------------------------------------------------------


def same(types: Types, attrs: Attributes) -> Types:
    return (types[0],)


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


def reduce_axis(types: Types, attrs: Attributes) -> Types:
    shape = list(types[0].shape)
    need(-len(shape) <= attrs["axis"] < len(shape), "axis is out of range")
    shape[attrs["axis"]] = 1
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
    need(sorted(attrs["perm"]) == list(range(types[0].rank)), "perm is not a permutation")
    return (TensorType(types[0].dtype, tuple(types[0].shape[i] for i in attrs["perm"])),)


def slice_length(dim: Dim, start: int, stop: int, step: int) -> int:
    need(isinstance(dim, int), "only static axes can be sliced")
    need(0 <= start < stop <= dim and step >= 1, f"slice {start}:{stop}:{step} leaves 0..{dim}")
    return -(-(stop - start) // step)


def sliced(types: Types, attrs: Attributes) -> Types:
    shape, axis = list(types[0].shape), attrs["axis"]
    shape[axis] = slice_length(shape[axis], attrs["start"], attrs["stop"], attrs["step"])
    return (TensorType(types[0].dtype, tuple(shape)),)


def slice_updated(types: Types, attrs: Attributes) -> Types:
    target, update = types
    axis, start, step = attrs["axis"], attrs["start"], attrs["step"]
    length = update.shape[axis]
    need(isinstance(length, int), "only static axes can be updated")
    slice_length(target.shape[axis], start, start + (length - 1) * step + 1, step)
    return (target,)


def concatenated(types: Types, attrs: Attributes) -> Types:
    axis, first = attrs["axis"], types[0]
    sizes = [t.shape[axis] for t in types]
    need(all(isinstance(s, int) for s in sizes), "only static axes can be concatenated")
    for t in types:
        rest = list(t.shape)
        rest[axis] = first.shape[axis]
        need(tuple(rest) == first.shape and t.dtype == first.dtype, f"{t} does not fit {first}")
    shape = list(first.shape)
    shape[axis] = sum(s for s in sizes if isinstance(s, int))
    return (TensorType(first.dtype, tuple(shape)),)


def looked_up(types: Types, attrs: Attributes) -> Types:
    tokens, table = types
    need(tokens.dtype == "i32" and table.rank == 2, "wants i32 tokens and a table [V, H]")
    return (TensorType("f32", (*tokens.shape, table.shape[1])),)


def linear_type(types: Types, attrs: Attributes) -> Types:
    x, *weights = types
    for w in weights:
        need(w.rank == 2 and w.shape[1] == x.shape[-1], f"weight {w} does not fit input {x}")
    return (TensorType("f32", (*x.shape[:-1], sum(w.shape[0] for w in weights))),)  # type: ignore[misc]


def linear_swiglu_type(types: Types, attrs: Attributes) -> Types:
    need(types[1].shape == types[2].shape, "gate and up differ in shape")
    return (TensorType("f32", (*types[0].shape[:-1], types[1].shape[0])),)


def linear_residual_type(types: Types, attrs: Attributes) -> Types:
    out = linear_type((types[0], types[2]), attrs)
    need(out[0] == types[1], f"residual {types[1]} does not fit {out[0]}")
    return out


def normed(types: Types, attrs: Attributes) -> Types:
    need(types[1].shape == types[0].shape[-1:], f"norm weight {types[1]} does not fit {types[0]}")
    need(len(types) < 3 or types[2] == types[0], "gate does not fit")
    return (types[0],)


def topk_type(types: Types, attrs: Attributes) -> Types:
    shape = (*types[0].shape[:-1], attrs["k"])
    return TensorType(types[0].dtype, shape), TensorType("i32", shape)


def conv_type(types: Types, attrs: Attributes) -> Types:
    need(types[0].shape[0] == types[1].shape[0], "channels differ")
    return (types[0],)


def delta_rule_type(types: Types, attrs: Attributes) -> Types:
    q, k, v, g, beta = types
    need(q == k and q.rank == 3 and v.rank == 3, "wants q, k [T, Hk, Dk] and v [T, Hv, Dv]")
    need(v.shape[1] % q.shape[1] == 0, "value heads are no multiple of key heads")  # type: ignore[operator]
    need(g.shape == beta.shape == v.shape[:2], "g and beta must be [T, Hv]")
    return (v,)


def attention_type(types: Types, attrs: Attributes) -> Types:
    q, k, v = types
    need(k == v and q.shape[1:] == k.shape[1:], "wants q [Hq,T,D], k and v [Hkv,T,D]")
    need(q.shape[0] % k.shape[0] == 0, "query heads are no multiple of key heads")  # type: ignore[operator]
    return (TensorType(q.dtype, (q.shape[1], q.shape[0], q.shape[2])),)


def experts_type(types: Types, attrs: Attributes) -> Types:
    x, ids, weights, gate_up, down = types
    need(ids.shape == weights.shape and ids.dtype == "i32", "ids and weights must be [T, k]")
    need(gate_up.shape[1] == 2 * down.shape[2], "gate_up [E,2I,H] does not fit down [E,H,I]")  # type: ignore[operator]
    return (x,)


def moe_type(types: Types, attrs: Attributes) -> Types:
    x, router, shared, gate, gate_up, down = types[:6]
    need(all(t == x for t in (shared, *types[6:])) and gate.shape == (x.shape[0], 1), "shared expert does not fit")
    need(router.shape == (x.shape[0], gate_up.shape[0]), "router logits must be [T, E]")
    need(gate_up.shape[1] == 2 * down.shape[2], "gate_up [E,2I,H] does not fit down [E,H,I]")  # type: ignore[operator]
    return (x,)


def delta_net_type(types: Types, attrs: Attributes) -> Types:
    qkv, z, b, a, conv_w, a_log, dt_bias, norm_w = types[:8]
    heads = attrs["value_heads"]
    need(conv_w.shape[0] == qkv.shape[1], "conv weight does not fit qkv")
    need(b == a and a_log.shape == dt_bias.shape == (heads,) == b.shape[1:], "gates must be [T, Hv]")
    need(z.shape[1] == heads * norm_w.shape[0], "z must be [T, Hv * Dv]")  # type: ignore[operator]
    return (z,)


def gated_attention_type(types: Types, attrs: Attributes) -> Types:
    q_gate, k, v, q_norm = types[:4]
    width = attrs["heads"] * q_norm.shape[0]  # type: ignore[operator]
    need(k == v and q_gate.shape[1] == 2 * width, "q_gate must be [T, Hq*2*D], k = v [T, Hkv*D]")
    return (TensorType("f32", (q_gate.shape[0], width)),)


def rotary_table_type(types: Types, attrs: Attributes) -> Types:
    need(types[0].rank == 2 and types[0].shape[0] == 3, "positions must be [3, T]")
    return (TensorType("f32", (types[0].shape[1], 2 * len(attrs["inv_freq"]))),)


def constant_type(types: Types, attrs: Attributes) -> Types:
    need(math.prod(attrs["shape"]) == len(attrs["values"]), "values do not fill the shape")
    return (TensorType("f32", tuple(attrs["shape"])),)


# --- meanings that need more than a numpy function ------------------------------------------------


def reference_slice(x, *, axis, start, stop, step):
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop, step),)]


def reference_slice_update(x, y, *, axis, start, step):
    out = x.copy()
    axis %= x.ndim
    stop = start + (y.shape[axis] - 1) * step + 1
    out[(slice(None),) * axis + (slice(start, stop, step),)] = y
    return out


def reference_linear(x, *weights):
    return np.concatenate([x @ w.T.astype(x.dtype) for w in weights], -1)


def reference_swiglu(x, gate, up):
    return ref.silu(x @ gate.T.astype(x.dtype)) * (x @ up.T.astype(x.dtype))


def reference_delta_net(*arrays, **attrs):
    return ref.gated_delta_net(*arrays, **attrs)[0]


def linear_macs(shapes, attrs):
    return math.prod(shapes[0][:-1]) * sum(math.prod(s) for s in shapes[1:] if len(s) == 2)


# --- the table ------------------------------------------------------------------------------------

define("embedding", "tokens table", "", looked_up, lambda t, w: w[t], "Look up rows of a table.")
define("linear", "x weight*", "", linear_type, reference_linear,
       "Multiply by one or more weights [N, K]; the outputs are concatenated.", macs=linear_macs)  # fmt: skip
for _name, _function in {"add": np.add, "mul": np.multiply, "div": np.divide}.items():
    define(_name, "a b", "", broadcast, _function, f"{_name} with numpy broadcasting.")
for _name, _attr, _function in (
    ("add_scalar", "value", lambda x, *, value: x + x.dtype.type(value)),
    ("mul_scalar", "value", lambda x, *, value: x * x.dtype.type(value)),
    ("pow_scalar", "exponent", lambda x, *, exponent: x ** x.dtype.type(exponent)),
):
    define(_name, "x", _attr, same, _function, f"{_name} elementwise.", stages=TRACED)
for _name, _function in {
    "neg": np.negative, "exp": np.exp, "sigmoid": ref.sigmoid, "silu": ref.silu,
    "softplus": ref.softplus, "rsqrt": lambda x: 1 / np.sqrt(x), "cos": np.cos, "sin": np.sin,
}.items():  # fmt: skip
    define(_name, "x", "", same, _function, f"{_name} elementwise.", stages=TRACED)
define("cast", "x", "dtype", lambda t, a: (TensorType(a["dtype"], t[0].shape),),
       lambda x, *, dtype: x.astype({"f32": np.float32, "i32": np.int32, "i64": np.int64}[dtype]),
       "Convert elements.", stages=TRACED)  # fmt: skip
define("mean", "x", "axis", reduce_axis, lambda x, *, axis: x.mean(axis, keepdims=True),
       "Mean over one axis, kept as 1.", stages=TRACED)  # fmt: skip
define("sum", "x", "axis", reduce_axis, lambda x, *, axis: x.sum(axis, keepdims=True),
       "Sum over one axis, kept as 1.", stages=TRACED)  # fmt: skip
define("softmax", "x", "axis", same, lambda x, *, axis: ref.softmax(x, axis),
       "Softmax over one axis.", stages=TRACED)  # fmt: skip
define("topk", "x", "k", topk_type, lambda x, *, k: ref.topk(x, k),
       "The k largest of the last axis, sorted, and their indices; ties take the lowest index.",
       stages=TRACED)  # fmt: skip
define("reshape", "x", "shape", reshaped, lambda x, *, shape: x.reshape(shape), "View in another shape.")
define("transpose", "x", "perm", transposed, lambda x, *, perm: x.transpose(perm),
       "Permute axes.", stages=TRACED)  # fmt: skip
define("slice", "x", "axis start stop step", sliced, reference_slice, "Take part of one static axis.")
define("slice_update", "x y", "axis start step", slice_updated, reference_slice_update,
       "Replace part of one static axis.", stages=TRACED)  # fmt: skip
define("concat", "x*", "axis", concatenated, lambda *xs, axis: np.concatenate(xs, axis),
       "Join along one static axis.", stages=TRACED)  # fmt: skip
define("constant", "", "values shape", constant_type,
       lambda *, values, shape: np.array(values, np.float32).reshape(shape),
       "A small literal tensor.", stages=TRACED)  # fmt: skip

define("causal_conv", "x weight", "", conv_type, ref.causal_conv,
       "Depthwise causal convolution of x [C, T] by weight [C, K].", stages=TRACED)  # fmt: skip
define("delta_rule", "q k v g beta", "", delta_rule_type, lambda *xs: ref.delta_rule(*xs)[0],
       "Gated delta rule from an empty state; q and k are l2-normalised inside.", stages=TRACED,
       macs=lambda s, a: 3 * s[2][0] * s[2][1] * s[0][2] * s[2][2])  # fmt: skip
define("attention", "q k v", "scale", attention_type, ref.attention,
       "Causal attention with grouped queries.", stages=TRACED,
       macs=lambda s, a: s[0][0] * s[0][1] ** 2 * s[0][2])  # fmt: skip
define("experts", "x ids weights gate_up down", "", experts_type, ref.experts,
       "Weighted sum of each token's experts.", stages=TRACED,
       macs=lambda s, a: math.prod(s[1]) * (math.prod(s[3][1:]) + math.prod(s[4][1:])))  # fmt: skip

define("rms_norm", "x weight", "eps offset", normed, ref.rms_norm,
       "x * rsqrt(mean(x^2) + eps) * (offset + weight) over the last axis.")  # fmt: skip
define("gated_rms_norm", "x weight gate", "eps", normed, ref.gated_rms_norm,
       "rms_norm(x) * weight * silu(gate).", stages=FUSED)  # fmt: skip
define("rotary_table", "positions", "inv_freq sections scaling", rotary_table_type, ref.rotary_table,
       "Cosines and sines of the interleaved multi-axis rotary angles: [T, R].")  # fmt: skip
define("rotary", "x table", "", same, ref.rotary, "Rotate the first R dims of x [H, T, D].", stages=FUSED)
define("swiglu", "gate up", "", lambda t, a: (t[0],), lambda g, u: ref.silu(g) * u,
       "silu(gate) * up.", stages=FUSED)  # fmt: skip
define("linear_swiglu", "x gate up", "", linear_swiglu_type, reference_swiglu,
       "silu(x gate^T) * (x up^T) in one pass over x.", macs=linear_macs)  # fmt: skip
define("linear_residual", "x residual weight", "", linear_residual_type,
       lambda x, r, w: r + x @ w.T.astype(x.dtype), "residual + x weight^T.",
       macs=lambda s, a: math.prod(s[0][:-1]) * math.prod(s[2]))  # fmt: skip
define("gated_delta_net", "qkv z b a conv_w a_log dt_bias norm_w", "key_heads value_heads eps",
       delta_net_type, reference_delta_net, stages=FUSED,
       summary="Conv, SiLU, gates, delta rule and gated norm, from an empty state.")  # fmt: skip
define("gated_attention", "q_gate k v q_norm k_norm table", "heads kv_heads eps scale",
       gated_attention_type, ref.gated_attention, stages=FUSED,
       summary="q/k norm, rotary, causal attention and output gate, from an empty cache.")  # fmt: skip
define("sparse_moe", "x router_logits shared shared_gate gate_up down", "top_k", moe_type,
       ref.sparse_moe, "Top-k routed experts plus the gated shared expert.",
       macs=lambda s, a: s[0][0] * a["top_k"] * (math.prod(s[4][1:]) + math.prod(s[5][1:])))  # fmt: skip

define("sparse_moe_residual", "x router_logits shared shared_gate gate_up down residual", "top_k",
       moe_type, lambda *xs, top_k: xs[-1] + ref.sparse_moe(*xs[:-1], top_k),
       "residual + sparse_moe(..).", macs=lambda s, a: OPS["sparse_moe"].macs(s, a))  # fmt: skip

define("stateful_gated_delta_net", "qkv z b a conv_w a_log dt_bias norm_w slots conv delta",
       "key_heads value_heads eps rows", delta_net_type, ref.stateful_gated_delta_net,
       stages=LATE, writes_state=True,
       summary="gated_delta_net that continues the sequences named by slots.",
       macs=lambda s, a: 3 * s[0][0] * math.prod(s[10][1:]))  # fmt: skip
define("stateful_gated_attention", "q_gate k v q_norm k_norm table slots starts keys values",
       "heads kv_heads eps scale rows", gated_attention_type, ref.stateful_gated_attention,
       stages=LATE, writes_state=True,
       summary="gated_attention over the key/value cache of the sequences named by slots.")  # fmt: skip
define("last_token", "x", "", lambda t, a: (TensorType(t[0].dtype, (1, *t[0].shape[1:])),),
       lambda x: x[-1:], "The last row.", stages=LATE)  # fmt: skip
