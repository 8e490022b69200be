"""Numpy definitions of the composite ops: the meaning that passes and kernels must keep.

Every function works in the precision of its inputs (float32 or float64). Shapes use T tokens, D head
dim, Hk/Hv key/value heads, Hq query heads. Equations: modeling files of transformers 5.23.
"""

from __future__ import annotations

import math

import numpy as np

from q35c.formats.registry import round_rows

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def topk(x: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest of the last axis, sorted; on ties the lowest index first."""
    order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(x, order, -1), order.astype(np.int32)


def rms_norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    scale = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True, dtype=x.dtype) + x.dtype.type(eps))
    return x * scale * (weight.astype(x.dtype) + x.dtype.type(offset))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True, dtype=x.dtype)
    variance = np.mean(centred * centred, -1, keepdims=True, dtype=x.dtype)
    scaled = centred / np.sqrt(variance + x.dtype.type(eps))
    return scaled * weight.astype(x.dtype) + bias.astype(x.dtype)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Array, form: str) -> Array:
    """Return x times the normal distribution at x: by "erf", or the approximation by "tanh"."""
    if form == "erf":
        return (x * 0.5 * (1 + _erf(x / math.sqrt(2)))).astype(x.dtype)
    inner = x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x**3)
    return x * (1 + np.tanh(inner)) / 2


def gated_rms_norm(x: Array, weight: Array, gate: Array, eps: float) -> Array:
    return rms_norm(x, weight, eps, 0.0) * silu(gate)


def causal_conv(x: Array, weight: Array, state: Array | None = None) -> Array:
    """Convolve each channel of x [C, T] with weight [C, K]; state [C, K-1] holds earlier inputs."""
    channels, taps = weight.shape
    before = np.zeros((channels, taps - 1), x.dtype) if state is None else state
    padded = np.concatenate([before, x], axis=1)
    tokens = x.shape[1]
    products = [padded[:, i : i + tokens] * weight[:, i : i + 1] for i in range(taps)]
    return np.sum(products, axis=0, dtype=x.dtype)


def l2_norm(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + x.dtype.type(1e-6))


def delta_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array | None = None
) -> tuple[Array, Array]:
    """Run the gated delta rule token by token; return out [T, Hv, Dv] and state [Hv, Dk, Dv].

    S <- exp(g) S;  S <- S + k (beta (v - k S));  o = (q / sqrt(Dk)) S, with l2-normalised q and k.
    """
    tokens, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[1:]
    repeats = value_heads // key_heads
    q = np.repeat(l2_norm(q), repeats, 1) * q.dtype.type(key_dim**-0.5)
    k = np.repeat(l2_norm(k), repeats, 1)
    s = np.zeros((value_heads, key_dim, value_dim), q.dtype) if state is None else state.copy()
    out = np.empty((tokens, value_heads, value_dim), q.dtype)
    for t in range(tokens):
        s *= np.exp(g[t])[:, None, None]
        delta = (v[t] - np.einsum("hk,hkv->hv", k[t], s)) * beta[t][:, None]
        s += k[t][:, :, None] * delta[:, None, :]
        out[t] = np.einsum("hk,hkv->hv", q[t], s)
    return out, s


def attention(q: Array, k: Array, v: Array, scale: float, start: int = 0) -> Array:
    """Attend causally: q [Hq, T, D] at positions start.., k and v [Hkv, S, D]; return [T, Hq, D]."""
    group = q.shape[0] // k.shape[0]
    keys, values = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scores = np.einsum("htd,hsd->hts", q, keys) * q.dtype.type(scale)
    visible = np.arange(k.shape[1])[None] <= start + np.arange(q.shape[1])[:, None]
    scores = np.where(visible, scores, -np.inf)
    return np.einsum("hts,hsd->thd", softmax(scores, -1).astype(q.dtype), values)


def full_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Attend to everything: q [Hq, T, D], k and v [Hkv, S, D]; return [T, Hq, D]."""
    return attention(q, k, v, scale, start=k.shape[1])


def experts(
    x: Array, ids: Array, weights: Array, gate_up: Array, down: Array, dtype: str = "f32"
) -> Array:
    """Sum each token's routed experts: down(silu(gate x) * up x) times its routing weight.

    With another `dtype` than f32, the input of `down` is rounded to such rows.
    """
    out = np.zeros_like(x)
    inner = gate_up.shape[1] // 2
    for expert in np.unique(ids):
        rows, slots = np.nonzero(ids == expert)
        hidden = x[rows] @ gate_up[expert].T.astype(x.dtype)
        hidden = silu(hidden[:, :inner]) * hidden[:, inner:]
        hidden = hidden if dtype == "f32" else round_rows(hidden, dtype)
        np.add.at(out, rows, hidden @ down[expert].T.astype(x.dtype) * weights[rows, slots, None])
    return out


def sparse_moe(
    x, router_logits, shared, shared_gate, gate_up, down, top_k: int, dtype: str = "f32"
) -> Array:
    """Route by softmax over all experts, take the top k, renormalise, add the gated shared expert."""
    weights, ids = topk(softmax(router_logits, -1), top_k)
    weights = weights / weights.sum(-1, keepdims=True)
    return experts(x, ids, weights, gate_up, down, dtype) + sigmoid(shared_gate) * shared


def quantized_moe_residual(*operands: Array, top_k: int, dtype: str) -> Array:
    """Return residual + sparse_moe(..) where the experts' inner activations are rounded too."""
    return operands[-1] + sparse_moe(*operands[:-1], top_k=top_k, dtype=dtype)


def folded_moe_residual(
    x, logits, shared_gate, gate_up, down, residual, gate, up, shared_down, *, top_k: int, dtype: str
) -> Array:  # fmt: skip
    """Return residual + sparse_moe(..) with the shared expert's three weights in place of its output."""
    hidden = silu(x @ gate.T.astype(x.dtype)) * (x @ up.T.astype(x.dtype))
    hidden = hidden if dtype == "f32" else round_rows(hidden, dtype)
    shared = hidden @ shared_down.T.astype(x.dtype)
    return residual + sparse_moe(x, logits, shared, shared_gate, gate_up, down, top_k, dtype)


def rotary_table(positions: Array, inv_freq, sections, scaling: float) -> Array:
    """Return [T, R]: cos then sin of R/2 angles; axis 1 and 2 own every third angle of their section."""
    angles = positions.astype(np.float32)[:, :, None] * np.asarray(
        inv_freq, np.float32
    )  # [3, T, R/2]
    mixed = angles[0].copy()
    for axis in (1, 2):
        owned = slice(axis, sections[axis] * 3, 3)
        mixed[:, owned] = angles[axis, :, owned]
    return np.concatenate([np.cos(mixed), np.sin(mixed)], -1) * np.float32(scaling)


def rotary(x: Array, table: Array) -> Array:
    """Rotate the first R dims of x [H, T, D] by table [T, R]; pairs are (i, i + R/2)."""
    half = table.shape[1] // 2
    cos, sin = table[:, :half].astype(x.dtype), table[:, half:].astype(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def axial_rotary_table(places: Array, inv_freq) -> Array:
    """Return [T, R]: cos then sin of R/2 angles, those of the rows places[:, 0], then those of the columns."""
    angles = places.astype(np.float32)[:, :, None] * np.asarray(inv_freq, np.float32)  # [T, 2, R/4]
    angles = angles.reshape(len(places), -1)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def picture_attention(
    qkv: Array, table: Array, *, heads: int, scale: float, cache: str = "f32"
) -> Array:
    """Rotate queries and keys of qkv [T, 3 * H * D] by table [T, D], attend to all; return [T, H * D]."""
    q, k, v = qkv.reshape(len(qkv), 3, heads, -1).transpose(1, 2, 0, 3)
    k, v = (round_cells(x, cache) for x in (rotary(k, table), v))
    out = full_attention(rotary(q, table), k, v, scale)
    return out.reshape(len(qkv), -1)


def scale_pixels(x: Array, scale: float, shift: float) -> Array:
    return x.astype(np.float32) * np.float32(scale) + np.float32(shift)


def interpolate_rows(table: Array, taps: Array, weights: Array) -> Array:
    """Return the sum over n of weights[:, n] * table[taps[:, n]]."""
    return (table[taps] * weights[:, :, None].astype(table.dtype)).sum(1)


def gated_delta_net(
    qkv,
    z,
    b,
    a,
    conv_w,
    a_log,
    dt_bias,
    norm_w,
    *,
    key_heads,
    value_heads,
    eps,
    conv=None,
    delta=None,
) -> tuple[Array, Array, Array]:
    """Return out [T, Hv*Dv], the new conv state [K-1, C] and the new delta state [Hv, Dk, Dv]."""
    tokens, channels = qkv.shape
    taps = conv_w.shape[-1]
    value_dim = z.shape[1] // value_heads
    key_dim = (channels - z.shape[1]) // (2 * key_heads)
    before = np.zeros((taps - 1, channels), qkv.dtype) if conv is None else conv
    mixed = silu(causal_conv(qkv.T, conv_w.reshape(channels, taps), before.T)).T
    conv_out = np.concatenate([before, qkv])[tokens:]
    q, k, v = np.split(mixed, [key_heads * key_dim, 2 * key_heads * key_dim], -1)
    q, k = (x.reshape(tokens, key_heads, key_dim) for x in (q, k))
    g = -np.exp(a_log) * softplus(a + dt_bias)
    out, state = delta_rule(q, k, v.reshape(tokens, value_heads, value_dim), g, sigmoid(b), delta)
    gate = z.reshape(tokens, value_heads, value_dim)
    return gated_rms_norm(out, norm_w, gate, eps).reshape(tokens, -1), conv_out, state


def project_heads(q_gate, k, v, q_norm, k_norm, table, *, heads, kv_heads, eps):
    """Split, normalise and rotate: return q [Hq,T,D], k and v [Hkv,T,D], gate [T, Hq*D]."""
    tokens = q_gate.shape[0]
    q, gate = np.split(q_gate.reshape(tokens, heads, -1), 2, -1)
    k, v = (x.reshape(tokens, kv_heads, -1).transpose(1, 0, 2) for x in (k, v))
    q = rotary(rms_norm(q, q_norm, eps, 1.0).transpose(1, 0, 2), table)
    return q, rotary(rms_norm(k, k_norm, eps, 1.0), table), v, gate.reshape(tokens, -1)


def gated_attention(q_gate, k, v, q_norm, k_norm, table, *, heads, kv_heads, eps, scale) -> Array:
    """Normalise, rotate, attend causally and gate; return [T, Hq*D]."""
    q, k, v, gate = project_heads(
        q_gate, k, v, q_norm, k_norm, table, heads=heads, kv_heads=kv_heads, eps=eps
    )
    return attention(q, k, v, scale).reshape(len(gate), -1) * sigmoid(gate)


def stateful_gated_delta_net(
    qkv, z, b, a, conv_w, a_log, dt_bias, norm_w, slots, starts, conv, delta, *, rows, **attrs
) -> Array:
    """Continue each sequence from conv [B, K-1, C] and delta [B, Hv, Dk, Dv], both updated in place.

    What the sequences hold already, `starts`, matters to the order of a kernel's sums alone.
    """
    runs = [(slots[0], slice(None))] if rows == "sequence" else _one_row_each(slots)
    outputs = []
    for slot, row in runs:
        out, conv[slot], delta[slot] = gated_delta_net(
            qkv[row], z[row], b[row], a[row], conv_w, a_log, dt_bias, norm_w,
            conv=conv[slot].astype(qkv.dtype), delta=delta[slot].astype(qkv.dtype), **attrs,
        )  # fmt: skip
        outputs.append(out)
    return np.concatenate(outputs)


def round_cells(x: Array, dtype: str) -> Array:
    """Return keys or values [.., D] as a cache of this type keeps them; int8 has one scale for each D."""
    if dtype == "f32":
        return x
    if dtype == "bf16":
        return round_rows(x, dtype)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.rint(x * inverse) * scale


def stateful_gated_attention(
    q_gate, k, v, q_norm, k_norm, table, slots, starts, keys, values, *, rows, scale, cache="f32", **attrs
) -> Array:  # fmt: skip
    """Append to the cache keys/values [B, CTX, Hkv, D] at `starts` and attend to all of it so far."""
    q, k, v, gate = project_heads(q_gate, k, v, q_norm, k_norm, table, **attrs)
    k, v = (round_cells(x, cache) for x in (k, v))
    runs = [(slots[0], slice(None))] if rows == "sequence" else _one_row_each(slots)
    outputs = []
    for (slot, row), start in zip(runs, starts, strict=True):
        end = start + k[:, row].shape[1]
        keys[slot, start:end] = k[:, row].transpose(1, 0, 2)
        values[slot, start:end] = v[:, row].transpose(1, 0, 2)
        past_keys, past_values = (
            x[slot, :end].transpose(1, 0, 2).astype(q.dtype) for x in (keys, values)
        )
        outputs.append(attention(q[:, row], past_keys, past_values, scale, start))
    return np.concatenate(outputs).reshape(len(gate), -1) * sigmoid(gate)


def _one_row_each(slots: Array):
    return [(slot, slice(i, i + 1)) for i, slot in enumerate(slots)]
