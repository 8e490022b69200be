"""Type rules of the ops of a vision tower; type_rules.py says what a rule is."""

from __future__ import annotations

from q35c.ir.type_rules import (
    Attributes,
    Types,
    fits,
    floating,
    linear_residual_type,
    linear_type,
    need,
    normed,
    static,
)
from q35c.ir.types import TensorType


def layer_normed(types: Types, attrs: Attributes) -> Types:
    need(types[1] == types[2], f"weight and bias differ: {types[1]} and {types[2]}")
    return normed(types[:2], attrs)


def gelu_type(types: Types, attrs: Attributes) -> Types:
    need(attrs["form"] in ("erf", "tanh"), 'form must be "erf" or "tanh"')
    return floating(types, attrs)


def linear_bias_type(types: Types, attrs: Attributes) -> Types:
    (out,) = linear_type(types[:2], attrs)
    fits("bias", types[2], types[1].shape[0])
    return gelu_type((out,), attrs) if "form" in attrs else (out,)


def linear_bias_residual_type(types: Types, attrs: Attributes) -> Types:
    x, residual, weight, bias = types
    linear_bias_type((x, weight, bias), attrs)
    return linear_residual_type((x, residual, weight), attrs)


def pixels_type(types: Types, attrs: Attributes) -> Types:
    (x,) = types
    need(x.dtype == "u8" and x.rank == 2, f"wants bytes u8 [T, K], not {x}")
    return (TensorType("f32", x.shape),)


def interpolated_type(types: Types, attrs: Attributes) -> Types:
    table, taps, weights = types
    need(
        taps.dtype == "i32" and taps.rank == table.rank == 2, "wants a table [V, H], taps i32[T, n]"
    )
    fits("weights [T, n]", weights, *taps.shape)
    return (TensorType("f32", (taps.shape[0], table.shape[1])),)


def axial_table_type(types: Types, attrs: Attributes) -> Types:
    (places,) = types
    need(places.dtype == "i32" and places.shape[1:] == (2,), "places must be i32 [T, 2]")
    return (TensorType("f32", (places.shape[0], 4 * len(attrs["inv_freq"]))),)


def scheduled_picture_type(types: Types, attrs: Attributes) -> Types:
    need(attrs["cache"] in ("f32", "bf16"), 'cache must be "f32" or "bf16"')
    return picture_attention_type(types, attrs)


def picture_attention_type(types: Types, attrs: Attributes) -> Types:
    qkv, table = types
    need(qkv.rank == table.rank == 2, "wants qkv [T, 3 * H * D] and a table [T, D]")
    dim, width = static(table.shape[1], "D"), static(qkv.shape[1], "3 * H * D")
    need(attrs["heads"] >= 1 and dim % 2 == 0, "there must be a head of an even number of dims")
    fits("qkv [T, 3 * H * D]", qkv, table.shape[0], 3 * attrs["heads"] * dim)
    return (TensorType(qkv.dtype, (qkv.shape[0], width // 3)),)
