"""Parts of the composite ops in ONNX. Arguments that are not values are static sizes.

The delta rule and the experts are `Scan` loops: over tokens with the state [Hv, Dk, Dv] of all heads as
the carried value, and over experts with the output as the carried value. An expert computes only the
rows routed to it (`NonZero` finds them), so the work is that of the sparse layer and weights are
never gathered per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper

from q35c.export.nodes import Nodes

L2_EPS = 1e-6


def rms_norm(n: Nodes, x: str, weight: str, eps: float, offset: float) -> str:
    """Normalise the last axis and scale it by offset + weight."""
    mean = n.add("ReduceMean", n.add("Mul", x, x), n.ints(-1), keepdims=1)
    root = n.add("Sqrt", n.add("Add", mean, n.scalar(eps)))
    factor = n.add("Add", weight, n.scalar(offset)) if offset else weight
    return n.add("Mul", n.add("Div", x, root), factor, name="normed")


def l2_norm(n: Nodes, x: str) -> str:
    squares = n.add("ReduceSumSquare", x, n.ints(-1), keepdims=1)
    return n.add("Div", x, n.add("Sqrt", n.add("Add", squares, n.scalar(L2_EPS))))


def causal_conv(n: Nodes, x: str, weight: str, channels: int, taps: int) -> str:
    """Convolve each channel of x [C, T] with weight [C, 1, K], zeros before the first token."""
    batch = n.add("Unsqueeze", x, n.ints(0))
    padding = (taps - 1, 0)
    out = n.add("Conv", batch, weight, group=channels, kernel_shape=(taps,), pads=padding)
    return n.add("Squeeze", out, n.ints(0), name="conv")


def delta_rule(
    n: Nodes, q: str, k: str, v: str, g: str, beta: str,
    key_heads: int, value_heads: int, key_dim: int, value_dim: int,
) -> str:  # fmt: skip
    """Run the gated delta rule over q, k [T, Hk, Dk], v [T, Hv, Dv], g and beta [T, Hv]; [T, Hv, Dv]."""
    q = n.add("Mul", l2_norm(n, q), n.scalar(key_dim**-0.5))
    k = l2_norm(n, k)
    if value_heads != key_heads:
        q, k = (repeat_heads(n, x, key_heads, value_heads // key_heads, key_dim) for x in (q, k))
    rows = [
        n.reshape(q, -1, value_heads, 1, key_dim),
        n.reshape(k, -1, value_heads, 1, key_dim),
        n.reshape(v, -1, value_heads, 1, value_dim),
        n.reshape(n.add("Exp", g), -1, value_heads, 1, 1),
        n.reshape(beta, -1, value_heads, 1, 1),
    ]
    empty = zeros(n, n.ints(value_heads, key_dim, value_dim))
    body = delta_step(n)
    _, out = n.add_many("Scan", 2, empty, *rows, body=body, num_scan_inputs=len(rows), name="scan")
    return n.reshape(out, -1, value_heads, value_dim)


def delta_step(n: Nodes):
    """Return the loop body: S <- decay S; S <- S + k^T (beta (v - k S)); out = q S, for each head."""
    step = n.body()
    names = ("state", "q", "k", "v", "decay", "beta")
    inputs = [step.unique(f"step/{name}") for name in names]
    state, q, k, v, decay, beta = inputs
    faded = step.add("Mul", state, decay, name="step/faded")  # [Hv, Dk, Dv]
    known = step.add("MatMul", k, faded, name="step/known")  # [Hv, 1, Dv]
    change = step.add("Mul", step.add("Sub", v, known, name="step/error"), beta, name="step/change")
    column = step.add("Transpose", k, perm=(0, 2, 1), name="step/key_column")
    update = step.add("Mul", column, change, name="step/update")
    new_state = step.add("Add", faded, update, name="step/new_state")
    out = step.add("MatMul", q, new_state, name="step/out")
    return step.as_graph("delta_step", dict.fromkeys(inputs, 3), {new_state: 3, out: 3})


def repeat_heads(n: Nodes, x: str, heads: int, repeats: int, dim: int) -> str:
    """Repeat each head of x [T, H, D] so that head h of the result is head h // repeats."""
    x = n.reshape(x, -1, heads, 1, dim)
    x = n.add("Expand", x, n.ints(1, 1, repeats, 1))
    return n.reshape(x, -1, heads * repeats, dim)


def head_norm(n: Nodes, x: str, weight: str, eps: float) -> str:
    """Normalise the heads of x [T, H, D] with 1 + weight; [H, T, D]."""
    return n.add("Transpose", rms_norm(n, x, weight, eps, 1.0), perm=(1, 0, 2))


def rotate(n: Nodes, x: str, table: str, head_dim: int, width: int) -> str:
    """Rotate the first `width` dims of x [H, T, D] by a table [T, width] of cosines and sines."""
    half = width // 2
    cos, sin = n.once(("rotary", table), lambda: n.split(table, (half, half), axis=1))
    sizes = [half, half, head_dim - width] if head_dim > width else [half, half]
    a, b, *rest = n.split(x, sizes, axis=2)
    first = n.add("Sub", n.add("Mul", a, cos), n.add("Mul", b, sin))
    second = n.add("Add", n.add("Mul", b, cos), n.add("Mul", a, sin))
    return n.add("Concat", first, second, *rest, axis=2, name="rotated")


def causal_mask(n: Nodes, rows: str) -> str:
    """Return which key each query may see, bool [T, T], from a value whose axis 1 is the tokens."""
    count = n.add("Squeeze", n.add("Shape", rows, start=1, end=2), n.ints(0))
    place = n.add("Range", n.scalar(0, "i64"), count, n.scalar(1, "i64"), name="positions")
    queries = n.add("Unsqueeze", place, n.ints(1))
    return n.add("LessOrEqual", place, queries, name="causal_mask")


def causal_attention(n: Nodes, q: str, k: str, v: str, *sizes: Any) -> str:
    """Attend causally, as `attend` does to all."""
    return attend(n, q, k, v, *sizes, mask=n.once("causal_mask", lambda: causal_mask(n, k)))


def attend(
    n: Nodes, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int, scale: float, mask: str = ""
) -> str:  # fmt: skip
    """Attend, q [Hq, T, D] to k and v [Hkv, T, D], where a mask [T, T] is true if there is one; [T, Hq, D]."""
    grouped = n.reshape(q, kv_heads, heads // kv_heads, -1, head_dim)
    keys = n.add("Unsqueeze", n.add("Transpose", k, perm=(0, 2, 1)), n.ints(1))  # [Hkv, 1, D, T]
    scores = n.add("Mul", n.add("MatMul", grouped, keys), n.scalar(scale), name="scores")
    if mask:
        scores = n.add("Where", mask, scores, n.scalar(-np.inf))  # [Hkv, G, T, T]
    weights = n.add("Softmax", scores, axis=-1)
    out = n.add("MatMul", weights, n.add("Unsqueeze", v, n.ints(1)), name="attended")
    out = n.add("Transpose", out, perm=(2, 0, 1, 3))
    return n.reshape(out, -1, heads, head_dim)


def route(n: Nodes, logits: str, top_k: int) -> tuple[str, str]:
    """Return the ids and renormalised weights [T, k] of each token's experts."""
    chosen, ids = n.add_many("TopK", 2, n.add("Softmax", logits, axis=-1), n.ints(top_k), axis=-1)
    total = n.add("ReduceSum", chosen, n.ints(-1), keepdims=1)
    return ids, n.add("Div", chosen, total, name="weights")


def expert_sum(
    n: Nodes, x: str, ids: str, weights: str, gate_up: str, down: str, experts: int
) -> str:
    """Sum the routed experts of x [T, H]; weights [T, k] belong to ids [T, k]; [T, H]."""
    tokens = n.add("Shape", x, start=0, end=1)
    empty = zeros(n, n.add("Concat", tokens, n.ints(experts), axis=0))
    dense = n.add("ScatterElements", empty, ids, weights, axis=1, reduction="add")
    by_expert = n.add("Transpose", dense, perm=(1, 0), name="weights_by_expert")  # [E, T]
    start = zeros(n, n.add("Shape", x))
    body = expert_step(n, x)
    inputs = (start, gate_up, down, by_expert)
    return n.add("Scan", *inputs, body=body, num_scan_inputs=3, name="experts")


def expert_step(n: Nodes, x: str):
    """Return the loop body: add one expert's output to the rows that are routed to it."""
    step = n.body()
    names = ("sum", "gate_up", "down", "weights")
    inputs = [step.unique(f"expert/{name}") for name in names]
    total, gate_up, down, weights = inputs
    # A NaN is not zero: it stays visible in the sum.
    is_routed = step.add("Not", step.add("Equal", weights, n.scalar(0.0)))
    rows = step.add("Squeeze", step.add("NonZero", is_routed), n.ints(0), name="expert/rows")
    hidden = step.linear(step.add("Gather", x, rows, axis=0), gate_up)  # [rows, 2I]
    gate, up = step.add_many("Split", 2, hidden, axis=1, num_outputs=2)
    out = step.linear(step.add("Mul", step.silu(gate), up), down)  # [rows, H]
    factor = step.add("Unsqueeze", step.add("Gather", weights, rows, axis=0), n.ints(1))
    places = step.add("Unsqueeze", rows, n.ints(1))
    scaled = step.add("Mul", out, factor)
    new_total = step.add("ScatterND", total, places, scaled, reduction="add", name="expert/new_sum")
    ranks: dict[str, int] = dict(zip(inputs, (2, 2, 2, 1), strict=True))
    return step.as_graph("expert_step", ranks, {new_total: 2})


def zeros(n: Nodes, shape: str) -> str:
    zero = numpy_helper.from_array(np.zeros(1, np.float32))
    return n.add("ConstantOfShape", shape, value=zero)
