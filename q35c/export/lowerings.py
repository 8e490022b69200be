"""How each op of a fused graph is written in ONNX (opset 18).

One function per op: `lower(nodes, op, inputs) -> outputs`. The meaning is `ir/reference.py`; names of dims
are its. State is empty before the first token. To export a new op, write its function here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from q35c.export.composites import (
    causal_attention,
    causal_conv,
    delta_rule,
    expert_sum,
    head_norm,
    rms_norm,
    rotate,
    route,
)
from q35c.export.nodes import NUMPY_TYPES, Nodes, element_type
from q35c.ir.graph import Op

Lowering = Callable[..., str | tuple[str, ...]]
Function = TypeVar("Function", bound=Lowering)
LOWERINGS: dict[str, Lowering] = {}


def lowers(*kinds: str) -> Callable[[Function], Function]:
    """Make a function the lowering of these ops."""

    def register(function: Function) -> Function:
        LOWERINGS.update(dict.fromkeys(kinds, function))
        return function

    return register


def attr(op: Op, name: str) -> Any:
    return op.attrs[name]


def dims(op: Op, index: int) -> tuple[Any, ...]:
    """Return the shape of an operand; a lowering reads only its static dims."""
    return op.operands[index].type.shape


# --- elementwise, reductions and views -----------------------------------------------------------

DIRECT = {
    **{"add": "Add", "mul": "Mul", "div": "Div", "neg": "Neg", "exp": "Exp", "cos": "Cos"},
    **{"sin": "Sin", "sigmoid": "Sigmoid", "softplus": "Softplus"},
}
SCALAR = {
    "add_scalar": ("Add", "value"),
    "mul_scalar": ("Mul", "value"),
    "pow_scalar": ("Pow", "exponent"),
}


@lowers(*DIRECT)
def lower_direct(n: Nodes, op: Op, *inputs: str) -> str:
    return n.add(DIRECT[op.kind], *inputs)


@lowers(*SCALAR)
def lower_scalar(n: Nodes, op: Op, x: str) -> str:
    op_type, name = SCALAR[op.kind]
    return n.add(op_type, x, n.scalar(attr(op, name), op.operands[0].type.dtype))


@lowers("silu")
def lower_silu(n: Nodes, op: Op, x: str) -> str:
    return n.silu(x)


@lowers("swiglu")
def lower_swiglu(n: Nodes, op: Op, gate: str, up: str) -> str:
    return n.add("Mul", n.silu(gate), up)


@lowers("rsqrt")
def lower_rsqrt(n: Nodes, op: Op, x: str) -> str:
    return n.add("Reciprocal", n.add("Sqrt", x))


@lowers("cast")
def lower_cast(n: Nodes, op: Op, x: str) -> str:
    return n.add("Cast", x, to=element_type(attr(op, "dtype"), "cast"))


@lowers("mean", "sum")
def lower_reduction(n: Nodes, op: Op, x: str) -> str:
    op_type = {"mean": "ReduceMean", "sum": "ReduceSum"}[op.kind]
    return n.add(op_type, x, n.ints(attr(op, "axis")), keepdims=1)


@lowers("softmax")
def lower_softmax(n: Nodes, op: Op, x: str) -> str:
    return n.add("Softmax", x, axis=attr(op, "axis"))


@lowers("topk")
def lower_topk(n: Nodes, op: Op, x: str) -> tuple[str, str]:
    values, ids = n.add_many("TopK", 2, x, n.ints(attr(op, "k")), axis=-1)
    return values, n.add("Cast", ids, to=element_type("i32", "topk"))


@lowers("reshape")
def lower_reshape(n: Nodes, op: Op, x: str) -> str:
    return n.reshape_to(x, op.result.type.shape)


@lowers("transpose")
def lower_transpose(n: Nodes, op: Op, x: str) -> str:
    return n.add("Transpose", x, perm=attr(op, "perm"))


@lowers("slice")
def lower_slice(n: Nodes, op: Op, x: str) -> str:
    return n.add(
        "Slice", x, *(n.ints(attr(op, name)) for name in ("start", "stop", "axis", "step"))
    )


@lowers("slice_update")
def lower_slice_update(n: Nodes, op: Op, x: str, y: str) -> str:
    """Gather each position of the axis from x or, where it is replaced, from y behind it."""
    target, update = (dims(op, i)[attr(op, "axis")] for i in (0, 1))
    picked = np.arange(target)
    picked[attr(op, "start") :: attr(op, "step")][:update] = target + np.arange(update)
    axis = attr(op, "axis") % op.result.type.rank
    return n.add("Gather", n.add("Concat", x, y, axis=axis), n.constant(picked), axis=axis)


@lowers("concat")
def lower_concat(n: Nodes, op: Op, *inputs: str) -> str:
    return n.add("Concat", *inputs, axis=attr(op, "axis"))


@lowers("constant")
def lower_constant(n: Nodes, op: Op) -> str:
    values = np.array(attr(op, "values"), NUMPY_TYPES["f32"])
    return n.constant(values.reshape(attr(op, "shape")))


# --- embedding, linears, norms, rotary -----------------------------------------------------------


@lowers("embedding_or_rows")
def lower_embedding_or_rows(n: Nodes, op: Op, tokens: str, table: str, rows: str) -> str:
    nothing = n.scalar(0, "i32")
    found = n.add("Gather", table, n.add("Max", tokens, nothing), axis=0)
    is_given = n.add("Unsqueeze", n.add("Less", tokens, nothing), n.ints(-1))
    return n.add("Where", is_given, rows, found)


@lowers("embedding")
def lower_embedding(n: Nodes, op: Op, tokens: str, table: str) -> str:
    return n.add("Gather", table, tokens, axis=0)


@lowers("linear")
def lower_linear(n: Nodes, op: Op, x: str, *weights: str) -> str:
    """Weights keep their layout [N, K]: nothing is transposed or copied on the way into the file."""
    source = op.operands[0].type
    if source.rank != 2:
        x = n.reshape(x, -1, dims(op, 0)[-1])
    parts = [n.linear(x, weight) for weight in weights]
    y = parts[0] if len(parts) == 1 else n.add("Concat", *parts, axis=-1)
    return y if source.rank == 2 else n.reshape_to(y, op.result.type.shape)


@lowers("linear_residual")
def lower_linear_residual(n: Nodes, op: Op, x: str, residual: str, weight: str) -> str:
    return n.add("Add", residual, lower_linear(n, op, x, weight))


@lowers("linear_swiglu")
def lower_linear_swiglu(n: Nodes, op: Op, x: str, gate: str, up: str) -> str:
    gated, linear = lower_linear(n, op, x, gate), lower_linear(n, op, x, up)
    return n.add("Mul", n.silu(gated), linear)


@lowers("rms_norm")
def lower_rms_norm(n: Nodes, op: Op, x: str, weight: str) -> str:
    return rms_norm(n, x, weight, attr(op, "eps"), attr(op, "offset"))


@lowers("gated_rms_norm")
def lower_gated_rms_norm(n: Nodes, op: Op, x: str, weight: str, gate: str) -> str:
    return n.add("Mul", rms_norm(n, x, weight, attr(op, "eps"), 0.0), n.silu(gate))


@lowers("rotary_table")
def lower_rotary_table(n: Nodes, op: Op, positions: str) -> str:
    """Pick for each angle the positions of its axis: every third angle of a section is h or w, not t."""
    frequencies = np.array(attr(op, "inv_freq"), np.float32)
    axis_of = np.zeros(len(frequencies), np.int64)
    for axis in (1, 2):
        axis_of[axis : attr(op, "sections")[axis] * 3 : 3] = axis
    rows = n.add("Cast", positions, to=element_type("f32", "rotary_table"))
    columns = n.add("Transpose", n.add("Gather", rows, n.constant(axis_of), axis=0), perm=(1, 0))
    angles = n.add("Mul", columns, n.constant(frequencies), name="angles")  # [T, R/2]
    table = n.add("Concat", n.add("Cos", angles), n.add("Sin", angles), axis=-1)
    return n.add("Mul", table, n.scalar(attr(op, "scaling")), name="table")


@lowers("rotary")
def lower_rotary(n: Nodes, op: Op, x: str, table: str) -> str:
    head_dim, width = (dims(op, i)[-1] for i in (0, 1))
    return rotate(n, x, table, head_dim, width)


# --- mixers and experts --------------------------------------------------------------------------


@lowers("causal_conv")
def lower_causal_conv(n: Nodes, op: Op, x: str, weight: str) -> str:
    channels, taps = dims(op, 1)
    return causal_conv(n, x, n.reshape(weight, channels, 1, taps), channels, taps)


@lowers("delta_rule")
def lower_delta_rule(n: Nodes, op: Op, q: str, k: str, v: str, g: str, beta: str) -> str:
    _, key_heads, key_dim = dims(op, 0)
    _, value_heads, value_dim = dims(op, 2)
    sizes = (key_heads, value_heads, key_dim, value_dim)
    return delta_rule(n, q, k, v, g, beta, *sizes)


@lowers("gated_delta_net")
def lower_gated_delta_net(
    n: Nodes, op: Op, qkv: str, z: str, b: str, a: str, conv_w: str, a_log: str, dt_bias: str, norm_w: str
) -> str:  # fmt: skip
    channels, _, taps = dims(op, 4)
    (value_dim,) = dims(op, 7)
    key_heads, value_heads = attr(op, "key_heads"), attr(op, "value_heads")
    value_width = value_heads * value_dim
    key_width = (channels - value_width) // 2
    key_dim = key_width // key_heads

    rows = n.add("Transpose", qkv, perm=(1, 0))  # [C, T]
    mixed = n.silu(causal_conv(n, rows, conv_w, channels, taps))
    mixed = n.add("Transpose", mixed, perm=(1, 0))
    q, k, v = n.split(mixed, (key_width, key_width, value_width), axis=1)
    q, k = (n.reshape(x, -1, key_heads, key_dim) for x in (q, k))
    v = n.reshape(v, -1, value_heads, value_dim)
    rate = n.add("Neg", n.add("Exp", a_log))
    g = n.add("Mul", rate, n.add("Softplus", n.add("Add", a, dt_bias)), name="decay")
    beta = n.add("Sigmoid", b, name="beta")
    sizes = (key_heads, value_heads, key_dim, value_dim)
    out = delta_rule(n, q, k, v, g, beta, *sizes)  # [T, Hv, Dv]
    gate = n.reshape(z, -1, value_heads, value_dim)
    normed = rms_norm(n, out, norm_w, attr(op, "eps"), 0.0)
    return n.reshape(n.add("Mul", normed, n.silu(gate)), -1, value_width)


@lowers("attention")
def lower_attention(n: Nodes, op: Op, q: str, k: str, v: str) -> str:
    heads, _, head_dim = dims(op, 0)
    kv_heads = dims(op, 1)[0]
    sizes = (heads, kv_heads, head_dim)
    return causal_attention(n, q, k, v, *sizes, attr(op, "scale"))


@lowers("gated_attention")
def lower_gated_attention(
    n: Nodes, op: Op, q_gate: str, k: str, v: str, q_norm: str, k_norm: str, table: str
) -> str:
    (head_dim,), (_, width) = (dims(op, i) for i in (3, 5))
    heads, kv_heads, eps = (attr(op, name) for name in ("heads", "kv_heads", "eps"))
    q, gate = n.split(n.reshape(q_gate, -1, heads, 2 * head_dim), (head_dim, head_dim), axis=2)
    k, v = (n.reshape(x, -1, kv_heads, head_dim) for x in (k, v))
    q = rotate(n, head_norm(n, q, q_norm, eps), table, head_dim, width)
    k = rotate(n, head_norm(n, k, k_norm, eps), table, head_dim, width)
    v = n.add("Transpose", v, perm=(1, 0, 2))
    out = causal_attention(n, q, k, v, heads, kv_heads, head_dim, attr(op, "scale"))
    out, gate = (n.reshape(x, -1, heads * head_dim) for x in (out, gate))
    return n.add("Mul", out, n.add("Sigmoid", gate))


@lowers("experts")
def lower_experts(n: Nodes, op: Op, x: str, ids: str, weights: str, gate_up: str, down: str) -> str:
    return expert_sum(n, x, ids, weights, gate_up, down, dims(op, 3)[0])


@lowers("sparse_moe")
def lower_sparse_moe(
    n: Nodes, op: Op, x: str, router: str, shared: str, shared_gate: str, gate_up: str, down: str
) -> str:
    ids, weights = route(n, router, attr(op, "top_k"))
    experts = dims(op, 4)[0]
    routed = expert_sum(n, x, ids, weights, gate_up, down, experts)
    return n.add("Add", routed, n.add("Mul", n.add("Sigmoid", shared_gate), shared))


@lowers("sparse_moe_residual")
def lower_sparse_moe_residual(n: Nodes, op: Op, *inputs: str) -> str:
    *moe, residual = inputs
    return n.add("Add", residual, lower_sparse_moe(n, op, *moe))
