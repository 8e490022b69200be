"""How the ops of a vision tower are written in ONNX; lowerings.py says more."""

from __future__ import annotations

import math

import numpy as np

from q35c.export.composites import attend, rotate
from q35c.export.lowerings import attr, dims, lower_linear, lowers
from q35c.export.nodes import Nodes, element_type
from q35c.ir.graph import Op


@lowers("gelu")
def lower_gelu(n: Nodes, op: Op, x: str) -> str:
    return gelu(n, x, attr(op, "form"))


@lowers("linear_bias")
def lower_linear_bias(n: Nodes, op: Op, x: str, weight: str, bias: str) -> str:
    return n.add("Add", lower_linear(n, op, x, weight), bias)


@lowers("linear_bias_gelu")
def lower_linear_bias_gelu(n: Nodes, op: Op, x: str, weight: str, bias: str) -> str:
    return gelu(n, lower_linear_bias(n, op, x, weight, bias), attr(op, "form"))


@lowers("linear_bias_residual")
def lower_linear_bias_residual(
    n: Nodes, op: Op, x: str, residual: str, weight: str, bias: str
) -> str:
    return n.add("Add", residual, lower_linear_bias(n, op, x, weight, bias))


@lowers("layer_norm")
def lower_layer_norm(n: Nodes, op: Op, x: str, weight: str, bias: str) -> str:
    return n.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=attr(op, "eps"))


@lowers("scale_pixels")
def lower_scale_pixels(n: Nodes, op: Op, x: str) -> str:
    numbers = n.add("Cast", x, to=element_type("f32", "scale_pixels"))
    scaled = n.add("Mul", numbers, n.scalar(attr(op, "scale")))
    return n.add("Add", scaled, n.scalar(attr(op, "shift")), name="pixels")


@lowers("interpolate_rows")
def lower_interpolate_rows(n: Nodes, op: Op, table: str, taps: str, weights: str) -> str:
    rows = n.add("Gather", table, taps, axis=0)  # [T, n, H]
    scaled = n.add("Mul", rows, n.add("Unsqueeze", weights, n.ints(2)))
    return n.add("ReduceSum", scaled, n.ints(1), keepdims=0, name="interpolated")


@lowers("axial_rotary_table")
def lower_axial_rotary_table(n: Nodes, op: Op, places: str) -> str:
    frequencies = np.array(attr(op, "inv_freq"), np.float32)
    numbers = n.add("Cast", places, to=element_type("f32", "axial_rotary_table"))
    angles = n.add("Mul", n.add("Unsqueeze", numbers, n.ints(2)), n.constant(frequencies))
    angles = n.reshape(angles, -1, 2 * len(frequencies))
    return n.add("Concat", n.add("Cos", angles), n.add("Sin", angles), axis=-1, name="table")


@lowers("full_attention")
def lower_full_attention(n: Nodes, op: Op, q: str, k: str, v: str) -> str:
    heads, _, head_dim = dims(op, 0)
    return attend(n, q, k, v, heads, dims(op, 1)[0], head_dim, attr(op, "scale"))


@lowers("picture_attention")
def lower_picture_attention(n: Nodes, op: Op, qkv: str, table: str) -> str:
    heads, head_dim = attr(op, "heads"), dims(op, 1)[1]
    width = heads * head_dim
    q, k, v = (
        n.add("Transpose", n.reshape(part, -1, heads, head_dim), perm=(1, 0, 2))
        for part in n.split(qkv, (width, width, width), axis=1)
    )
    q, k = (rotate(n, x, table, head_dim, head_dim) for x in (q, k))
    out = attend(n, q, k, v, heads, heads, head_dim, attr(op, "scale"))
    return n.reshape(out, -1, width)


def gelu(n: Nodes, x: str, form: str) -> str:
    """Return x times the normal distribution at x: exactly, or by tanh."""
    if form == "erf":
        inner = n.add("Erf", n.add("Mul", x, n.scalar(math.sqrt(0.5))))
    else:
        cubes = n.add("Mul", n.add("Mul", n.add("Mul", x, x), x), n.scalar(0.044715))
        inner = n.add("Mul", n.add("Add", x, cubes), n.scalar(math.sqrt(2 / math.pi)))
        inner = n.add("Tanh", inner)
    half = n.add("Mul", x, n.scalar(0.5))
    return n.add("Mul", half, n.add("Add", inner, n.scalar(1.0)), name="gelu")
