"""A fused model in miniature: both mixers, dense and sparse feed-forward, a tied head."""

from __future__ import annotations

from q35c.ir import Builder, Graph, SymDim, TensorType, Value

T = SymDim("T")
HIDDEN, VOCABULARY = 6, 11
NORM = {"eps": 1e-6, "offset": 1.0}


def tiny_model(layers: str = "da") -> Graph:
    """Return a fused graph; each letter is a mixer: d for delta net, a for attention."""
    b = Builder("forward", "fused")
    tokens = b.input("tokens", TensorType("i32", (T,)))
    positions = b.input("positions", TensorType("i32", (3, T)))
    table = weight(b, "embed_tokens", VOCABULARY, HIDDEN)
    x = b.emit("embedding", tokens, table)
    angles = b.emit(
        "rotary_table", positions, inv_freq=(1.0, 0.3, 0.1), sections=(1, 1, 1), scaling=1.1
    )
    for number, letter in enumerate(layers):
        normed = norm(b, x, f"{number}.norm")
        if letter == "d":
            mixed, width = delta_net(b, normed, f"{number}"), 8
        else:
            mixed, width = attention(b, normed, angles, f"{number}"), 16
        x = b.emit("linear_residual", mixed, x, weight(b, f"{number}.out", HIDDEN, width))
        feed_forward = sparse if letter == "d" else dense
        x = feed_forward(b, norm(b, x, f"{number}.post_norm"), x, f"{number}.mlp")
    return b.finish([b.emit("linear", norm(b, x, "norm"), table)])


def weight(b: Builder, name: str, *shape: int) -> Value:
    return b.weight(name, TensorType("f32", shape))


def norm(b: Builder, x: Value, name: str) -> Value:
    return b.emit("rms_norm", x, weight(b, name, HIDDEN), **NORM)


def project(b: Builder, x: Value, name: str, *rows: int) -> list[Value]:
    """Return slices of one linear with a weight for each."""
    weights = [weight(b, f"{name}.{number}", count, HIDDEN) for number, count in enumerate(rows)]
    merged = b.emit("linear", x, *weights)
    stops = [sum(rows[: i + 1]) for i in range(len(rows))]
    return [
        b.emit("slice", merged, axis=-1, start=stop - count, stop=stop, step=1)
        for count, stop in zip(rows, stops, strict=True)
    ]


def delta_net(b: Builder, x: Value, name: str) -> Value:
    """2 key heads of 3, 4 value heads of 2, a convolution of 3 taps."""
    qkv, z = project(b, x, f"{name}.qkvz", 20, 8)
    gates = project(b, x, f"{name}.ba", 4, 4)
    shapes = {"conv": (20, 1, 3), "A_log": (4,), "dt_bias": (4,), "gated_norm": (2,)}
    weights = [weight(b, f"{name}.{leaf}", *shape) for leaf, shape in shapes.items()]
    return b.emit("gated_delta_net", qkv, z, *gates, *weights, key_heads=2, value_heads=4, eps=1e-6)


def attention(b: Builder, x: Value, angles: Value, name: str) -> Value:
    """2 query heads of 8 to 1 key head, of which 6 dims rotate."""
    parts = project(b, x, f"{name}.qkv", 32, 8, 8)
    norms = [weight(b, f"{name}.{leaf}", 8) for leaf in ("q_norm", "k_norm")]
    return b.emit(
        "gated_attention", *parts, *norms, angles, heads=2, kv_heads=1, eps=1e-6, scale=0.4
    )


def dense(b: Builder, x: Value, residual: Value, name: str) -> Value:
    pair = [weight(b, f"{name}.{leaf}", 5, HIDDEN) for leaf in ("gate", "up")]
    inner = b.emit("linear_swiglu", x, *pair)
    return b.emit("linear_residual", inner, residual, weight(b, f"{name}.down", HIDDEN, 5))


def sparse(b: Builder, x: Value, residual: Value, name: str) -> Value:
    """5 experts, 2 of which each token takes."""
    pair = [weight(b, f"{name}.shared_{leaf}", 4, HIDDEN) for leaf in ("gate", "up")]
    shared = b.emit("linear_swiglu", x, *pair)
    shared = b.emit("linear", shared, weight(b, f"{name}.shared_down", HIDDEN, 4))
    logits, gate = project(b, x, f"{name}.router", 5, 1)
    experts = [
        weight(b, f"{name}.gate_up", 5, 6, HIDDEN),
        weight(b, f"{name}.down", 5, HIDDEN, 3),
    ]
    return b.emit("sparse_moe_residual", x, logits, shared, gate, *experts, residual, top_k=2)
