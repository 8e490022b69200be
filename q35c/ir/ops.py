"""The op table. One row declares an op: operands, attributes, type rule, meaning, cost, stages.

Printer, parser, verifier, interpreter, cost report, documentation and op tests come from here.
To add an op: write its row, then one lowering (`codegen/cpu/lower.py`) if it survives to the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from q35c.formats import registry
from q35c.ir import reference as ref
from q35c.ir import tower_rules as tower
from q35c.ir import type_rules as rule
from q35c.ir.type_rules import Attributes, ShapeRuleError, Types, symbolic_product

__all__ = ["OPS", "OpSpec", "ShapeRuleError", "symbolic_product"]


@dataclass(frozen=True)
class OpSpec:
    """One row of the table.

    `infer(types, attrs)` returns the result types or raises ShapeRuleError; `reference(*arrays,
    **attrs)` is the meaning in numpy; `macs(shapes, attrs)` counts multiply-adds with integer shapes.
    Roles of operands, by name: a row of the result needs the same row alone of those that are `row_wise`; rows are
    multiplied by the weights that are `factors`; those `per_sequence` have an element for each sequence.
    """

    kind: str
    summary: str
    operands: tuple[str, ...]
    attrs: tuple[str, ...]
    infer: Callable[[Types, Attributes], Types]
    reference: Callable[..., Any]
    stages: tuple[str, str]
    variadic: bool = False
    row_wise: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    per_sequence: tuple[str, ...] = ()
    writes_state: bool = False
    macs: Callable[[list[tuple[int, ...]], Attributes], int] = lambda shapes, attrs: math.prod(
        shapes[0]
    )


OPS: dict[str, OpSpec] = {}
ALWAYS, TRACED, FUSED, LATE, QUANTIZED = (
    ("traced", "scheduled"), ("traced", "fused"), ("fused", "fused"), ("stateful", "scheduled"),
    ("quantized", "scheduled"),
)  # fmt: skip
SCHEDULED = ("scheduled", "scheduled")


ROLES = ("row_wise", "factors", "per_sequence")


def define(kind: str, signature: str, attrs: str, infer, reference, summary: str, **more) -> None:
    """Add a row; a trailing `*` in the signature makes the last operand repeatable, roles name operands."""
    names = tuple(name.rstrip("*") for name in signature.split())
    more.setdefault("stages", ALWAYS)
    more |= {role: tuple(more[role].split()) for role in ROLES if role in more}
    OPS[kind] = OpSpec(
        kind, summary, names, tuple(attrs.split()), infer, reference,
        variadic=signature.endswith("*"), **more,
    )  # fmt: skip


# --- meanings that need more than a numpy function ------------------------------------------------


def reference_slice(x, *, axis, start, stop, step):
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop, step),)]


def reference_slice_update(x, y, *, axis, start, step):
    out = x.copy()
    axis %= x.ndim
    stop = start + (y.shape[axis] - 1) * step + 1
    out[(slice(None),) * axis + (slice(start, stop, step),)] = y
    return out


def reference_embedding_or_rows(tokens, table, rows):
    return np.where(tokens[..., None] < 0, rows, table[np.maximum(tokens, 0)])


def reference_linear(x, *weights):
    return np.concatenate([x @ w.T.astype(x.dtype) for w in weights], -1)


def reference_swiglu(x, gate, up):
    return ref.silu(x @ gate.T.astype(x.dtype)) * (x @ up.T.astype(x.dtype))


def reference_delta_net(*arrays, **attrs):
    return ref.gated_delta_net(*arrays, **attrs)[0]


def reference_linear_bias(x, weight, bias):
    return x @ weight.T.astype(x.dtype) + bias.astype(x.dtype)


def linear_macs(shapes, attrs):
    return math.prod(shapes[0][:-1]) * sum(math.prod(s) for s in shapes[1:] if len(s) == 2)


# --- the table ------------------------------------------------------------------------------------

define(
    "embedding", "tokens table", "", rule.looked_up, lambda t, w: w[t], "Look up rows of a table."
)
define("embedding_or_rows", "tokens table rows", "", rule.looked_up, reference_embedding_or_rows,
       "Row t of `rows` where token t is negative, else its row of the table.", stages=("fused", "scheduled"))  # fmt: skip
define("linear", "x weight*", "", rule.linear_type, reference_linear,
       "Multiply by one or more weights [N, K]; the outputs are concatenated.", macs=linear_macs,
       row_wise="x", factors="weight")  # fmt: skip
for _name, _rule, _function in (
    ("add", rule.broadcast, np.add), ("mul", rule.broadcast, np.multiply), ("div", rule.divided, np.divide),
):  # fmt: skip
    define(_name, "a b", "", _rule, _function, f"{_name} with numpy broadcasting.")
for _name, _attr, _function in (
    ("add_scalar", "value", lambda x, *, value: x + x.dtype.type(value)),
    ("mul_scalar", "value", lambda x, *, value: x * x.dtype.type(value)),
    ("pow_scalar", "exponent", lambda x, *, exponent: x ** x.dtype.type(exponent)),
):
    define(_name, "x", _attr, rule.same, _function, f"{_name} elementwise.", stages=TRACED)
define("neg", "x", "", rule.same, np.negative, "neg elementwise.", stages=TRACED)
for _name, _function in {
    "exp": np.exp, "sigmoid": ref.sigmoid, "silu": ref.silu,
    "softplus": ref.softplus, "rsqrt": lambda x: 1 / np.sqrt(x), "cos": np.cos, "sin": np.sin,
}.items():  # fmt: skip
    define(_name, "x", "", rule.floating, _function, f"{_name} elementwise.", stages=TRACED)
define("cast", "x", "dtype", rule.cast_type,
       lambda x, *, dtype: x.astype({"f32": np.float32, "i32": np.int32, "i64": np.int64}[dtype]),
       "Convert elements.", stages=TRACED)  # fmt: skip
define("mean", "x", "axis", rule.reduce_axis, lambda x, *, axis: x.mean(axis, keepdims=True),
       "Mean over one axis, kept as 1.", stages=TRACED)  # fmt: skip
define("sum", "x", "axis", rule.reduce_axis, lambda x, *, axis: x.sum(axis, keepdims=True),
       "Sum over one axis, kept as 1.", stages=TRACED)  # fmt: skip
define("softmax", "x", "axis", rule.softmax_type, lambda x, *, axis: ref.softmax(x, axis),
       "Softmax over one axis.", stages=TRACED)  # fmt: skip
define("topk", "x", "k", rule.topk_type, lambda x, *, k: ref.topk(x, k),
       "The k largest of the last axis, sorted, and their indices; ties take the lowest index.",
       stages=TRACED)  # fmt: skip
define(
    "reshape",
    "x",
    "shape",
    rule.reshaped,
    lambda x, *, shape: x.reshape(shape),
    "View in another shape.",
)
define("transpose", "x", "perm", rule.transposed, lambda x, *, perm: x.transpose(perm),
       "Permute axes.", stages=TRACED)  # fmt: skip
define(
    "slice",
    "x",
    "axis start stop step",
    rule.sliced,
    reference_slice,
    "Take part of one static axis.",
    row_wise="x",
)
define("slice_update", "x y", "axis start step", rule.slice_updated, reference_slice_update,
       "Replace part of one static axis.", stages=TRACED)  # fmt: skip
define("concat", "x*", "axis", rule.concatenated, lambda *xs, axis: np.concatenate(xs, axis),
       "Join along one static axis.", stages=TRACED)  # fmt: skip
define("constant", "", "values shape", rule.constant_type,
       lambda *, values, shape: np.array(values, np.float32).reshape(shape),
       "A small literal tensor.", stages=TRACED)  # fmt: skip

define("causal_conv", "x weight", "", rule.conv_type, ref.causal_conv,
       "Depthwise causal convolution of x [C, T] by weight [C, K].", stages=TRACED)  # fmt: skip
define("delta_rule", "q k v g beta", "", rule.delta_rule_type, lambda *xs: ref.delta_rule(*xs)[0],
       "Gated delta rule from an empty state; q and k are l2-normalised inside.", stages=TRACED,
       macs=lambda s, a: 3 * s[2][0] * s[2][1] * s[0][2] * s[2][2])  # fmt: skip
define("attention", "q k v", "scale", rule.attention_type, ref.attention,
       "Causal attention with grouped queries.", stages=TRACED,
       macs=lambda s, a: s[0][0] * s[0][1] ** 2 * s[0][2])  # fmt: skip
define("full_attention", "q k v", "scale", rule.attention_type, ref.full_attention,
       "Attention of every token to all, with grouped queries.", stages=TRACED,
       macs=lambda s, a: 2 * s[0][0] * s[0][1] ** 2 * s[0][2])  # fmt: skip
define("gelu", "x", "form", tower.gelu_type, ref.gelu,
       'x times the normal distribution at x: exactly ("erf"), or as GPT-2 approximated it ("tanh").', stages=TRACED)  # fmt: skip
define("experts", "x ids weights gate_up down", "", rule.experts_type, ref.experts,
       "Weighted sum of each token's experts.", stages=TRACED,
       macs=lambda s, a: math.prod(s[1]) * (math.prod(s[3][1:]) + math.prod(s[4][1:])))  # fmt: skip

define("rms_norm", "x weight", "eps offset", rule.normed, ref.rms_norm,
       "x * rsqrt(mean(x^2) + eps) * (offset + weight) over the last axis.", row_wise="x")  # fmt: skip
define("layer_norm", "x weight bias", "eps", tower.layer_normed, ref.layer_norm,
       "(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias over the last axis.", row_wise="x")  # fmt: skip
define("gated_rms_norm", "x weight gate", "eps", rule.normed, ref.gated_rms_norm,
       "rms_norm(x) * weight * silu(gate).", stages=FUSED)  # fmt: skip
define("rotary_table", "positions", "inv_freq sections scaling", rule.rotary_table_type, ref.rotary_table,
       "Cosines and sines of the interleaved multi-axis rotary angles: [T, R].")  # fmt: skip
define(
    "rotary",
    "x table",
    "",
    rule.rotary_type,
    ref.rotary,
    "Rotate the first R dims of x [H, T, D].",
    stages=FUSED,
)
define("swiglu", "gate up", "", rule.paired, lambda g, u: ref.silu(g) * u,
       "silu(gate) * up.", stages=FUSED)  # fmt: skip
define("linear_swiglu", "x gate up", "", rule.linear_swiglu_type, reference_swiglu,
       "silu(x gate^T) * (x up^T) in one pass over x.", macs=linear_macs, row_wise="x", factors="gate up")  # fmt: skip
define("linear_residual", "x residual weight", "", rule.linear_residual_type,
       lambda x, r, w: r + x @ w.T.astype(x.dtype), "residual + x weight^T.",
       macs=lambda s, a: math.prod(s[0][:-1]) * math.prod(s[2]), row_wise="x residual", factors="weight")  # fmt: skip
define("linear_bias", "x weight bias", "", tower.linear_bias_type, reference_linear_bias,
       "x weight^T + bias.", macs=linear_macs, row_wise="x", factors="weight")  # fmt: skip
define("linear_bias_gelu", "x weight bias", "form", tower.linear_bias_type,
       lambda x, w, b, *, form: ref.gelu(reference_linear_bias(x, w, b), form), "gelu(x weight^T + bias).",
       macs=linear_macs, row_wise="x", factors="weight")  # fmt: skip
define("linear_bias_residual", "x residual weight bias", "", tower.linear_bias_residual_type,
       lambda x, r, w, b: r + reference_linear_bias(x, w, b), "residual + x weight^T + bias.",
       macs=lambda s, a: math.prod(s[0][:-1]) * math.prod(s[2]), row_wise="x residual", factors="weight")  # fmt: skip
define("scale_pixels", "x", "scale shift", tower.pixels_type, ref.scale_pixels,
       "scale * x + shift of bytes, as f32.", row_wise="x")  # fmt: skip
define("interpolate_rows", "table taps weights", "", tower.interpolated_type, ref.interpolate_rows,
       "The weighted sum of some rows of a table, for each token.", row_wise="taps weights")  # fmt: skip
define("axial_rotary_table", "places", "inv_freq", tower.axial_table_type, ref.axial_rotary_table,
       "Cosines and sines for the rows and columns of a picture's patches: [T, R], half of the angles for each.")  # fmt: skip
define("picture_attention", "qkv table", "heads scale", tower.picture_attention_type, ref.picture_attention,
       "Rotary on whole heads and attention of every patch to all of [T, 3 * H * D]; queries, keys and values stand side by side.",
       macs=lambda s, a: 2 * s[0][0] ** 2 * s[0][1] // 3)  # fmt: skip
define("gated_delta_net", "qkv z b a conv_w a_log dt_bias norm_w", "key_heads value_heads eps",
       rule.delta_net_type, reference_delta_net, stages=FUSED,
       summary="Conv, SiLU, gates, delta rule and gated norm, from an empty state.")  # fmt: skip
define("gated_attention", "q_gate k v q_norm k_norm table", "heads kv_heads eps scale",
       rule.gated_attention_type, ref.gated_attention, stages=FUSED,
       summary="q/k norm, rotary, causal attention and output gate, from an empty cache.")  # fmt: skip
define("sparse_moe", "x router_logits shared shared_gate gate_up down", "top_k", rule.moe_type,
       ref.sparse_moe, "Top-k routed experts plus the gated shared expert.",
       macs=lambda s, a: s[0][0] * a["top_k"] * (math.prod(s[4][1:]) + math.prod(s[5][1:])))  # fmt: skip

define("sparse_moe_residual", "x router_logits shared shared_gate gate_up down residual", "top_k",
       rule.moe_type, lambda *xs, top_k: xs[-1] + ref.sparse_moe(*xs[:-1], top_k=top_k),
       "residual + sparse_moe(..).", macs=lambda s, a: OPS["sparse_moe"].macs(s, a),
       row_wise="x router_logits shared shared_gate residual", factors="gate_up down")  # fmt: skip

define("stateful_gated_delta_net", "qkv z b a conv_w a_log dt_bias norm_w slots starts conv delta",
       "key_heads value_heads eps rows", rule.stateful_delta_net_type, ref.stateful_gated_delta_net,
       stages=LATE, writes_state=True, per_sequence="slots starts",
       summary="gated_delta_net that continues the sequences named by slots.",
       macs=lambda s, a: 3 * s[0][0] * math.prod(s[11][1:]))  # fmt: skip
define("stateful_gated_attention", "q_gate k v q_norm k_norm table slots starts keys values",
       "heads kv_heads eps scale rows", rule.stateful_attention_type, ref.stateful_gated_attention,
       stages=("stateful", "quantized"), writes_state=True, per_sequence="slots starts",
       summary="gated_attention over the key/value cache of the sequences named by slots.")  # fmt: skip
define("scheduled_gated_attention", "q_gate k v q_norm k_norm table slots starts keys values",
       "heads kv_heads eps scale rows cache splits", rule.scheduled_attention_type,
       lambda *xs, splits, **attrs: ref.stateful_gated_attention(*xs, **attrs),
       stages=SCHEDULED, writes_state=True, per_sequence="slots starts",
       summary="stateful_gated_attention over keys and values that the cache keeps in f32, bf16 or int8; the cells of a key "
       "head are attended to in `splits` parts.")  # fmt: skip
define("scheduled_picture_attention", "qkv table", "heads scale cache", tower.scheduled_picture_type,
       ref.picture_attention, stages=SCHEDULED,
       summary="picture_attention over keys and values that are kept in f32 or bf16.",
       macs=lambda s, a: OPS["picture_attention"].macs(s, a))  # fmt: skip
define("last_token", "x", "", rule.last_row,
       lambda x: x[-1:], "The last row.", stages=LATE)  # fmt: skip
define("quantize_rows", "x", "dtype", rule.quantized_rows,
       lambda x, *, dtype: registry.round_rows(x, dtype), stages=QUANTIZED,
       summary="Round rows to bf16, or to int8 with a scale for each group of values.")  # fmt: skip
define("quantized_moe_residual", "x router_logits shared shared_gate gate_up down residual", "top_k dtype",
       rule.quantized_moe_type, ref.quantized_moe_residual, stages=QUANTIZED,
       summary="sparse_moe_residual on rounded rows; what the experts activate is rounded like x.",
       row_wise="x router_logits shared shared_gate residual", factors="gate_up down",
       macs=lambda s, a: OPS["sparse_moe"].macs(s, a))  # fmt: skip
define("folded_moe_residual", "x router_logits shared_gate gate_up down residual gate up shared_down", "top_k dtype",
       rule.folded_moe_type, ref.folded_moe_residual, stages=SCHEDULED,
       row_wise="x router_logits shared_gate residual", factors="gate_up down gate up shared_down",
       summary="sparse_moe_residual whose shared expert is one more routed expert; with a dtype, on rounded rows.",
       macs=lambda s, a: s[0][0] * (a["top_k"] + 1) * (math.prod(s[3][1:]) + math.prod(s[4][1:])))  # fmt: skip


def rounded(spec: OpSpec) -> OpSpec:
    """Return the row of an op that rounds its result on the way out: rounded rows, behind the exact ones if those are kept."""

    def infer(types: Types, attrs: Attributes) -> Types:
        exact = spec.infer(types, attrs)
        rows = rule.quantized_rows(exact, attrs)
        return exact + rows if attrs["is_kept"] else rows

    def reference(*arrays, dtype, is_kept, **attrs):
        exact = spec.reference(*arrays, **attrs)
        rows = registry.round_rows(exact, dtype)
        return (exact, rows) if is_kept else rows

    return replace(
        spec, kind=f"rounded_{spec.kind}", attrs=(*spec.attrs, "dtype", "is_kept"), infer=infer,
        reference=reference, stages=SCHEDULED, row_wise=(),
        summary=f"{spec.kind} whose rows are rounded as by quantize_rows; the exact ones come first if they are kept.",
    )  # fmt: skip


ROUNDING = (
    "rms_norm", "linear_swiglu", "stateful_gated_delta_net", "scheduled_gated_attention",
    "scale_pixels", "layer_norm", "linear_bias_gelu", "scheduled_picture_attention",
)  # fmt: skip
OPS |= {row.kind: row for row in (rounded(OPS[kind]) for kind in ROUNDING)}
