"""Examples of the ops of a vision tower, as in examples.py."""

from __future__ import annotations

from tests.ir.cases import Case, case

_FREQUENCIES = (1.0, 0.1, 0.01, 0.001)

FITS: dict[str, Case] = {
    "full_attention": case("f32[4,T,8] f32[2,T,8] f32[2,T,8]", scale=0.35),
    "gelu": case("f32[T,8]", form="tanh"),
    "layer_norm": case("f32[T,8] @f32[8] @f32[8]", eps=1e-6),
    "linear_bias": case("f32[T,8] @f32[5,8] @f32[5]"),
    "linear_bias_gelu": case("f32[T,8] @f32[5,8] @f32[5]", form="erf"),
    "linear_bias_residual": case("f32[T,8] f32[T,5] @f32[5,8] @f32[5]"),
    "scale_pixels": case("u8[4*T,6]", scale=0.5, shift=-1.0),
    "interpolate_rows": case("@f32[9,8] i32[T,4] f32[T,4]"),
    "axial_rotary_table": case("i32[T,2]", inv_freq=_FREQUENCIES),
    "picture_attention": case("f32[T,24] f32[T,4]", heads=2, scale=0.5),
    "scheduled_picture_attention": case(
        "f32[T,24] f32[T,4]", "scheduled", heads=2, scale=0.5, cache="bf16"
    ),
}

REFUSED: dict[str, list[Case]] = {
    "full_attention": [
        case("f32[4,T,8] f32[3,T,8] f32[3,T,8]", scale=1.0),
        case("f32[4,T,8] f32[2,T,8] f32[2,T,8]", "stateful", scale=1.0),
    ],
    "gelu": [case("f32[T,8]", form="sigmoid"), case("i32[T,8]", form="erf")],
    "layer_norm": [
        case("f32[T,8] @f32[7] @f32[7]", eps=1e-6),
        case("f32[T,8] @f32[8] @f32[7]", eps=1e-6),
    ],
    "linear_bias": [
        case("f32[T,8] @f32[5,8] @f32[8]"),
        case("f32[T,8] @f32[5,7] @f32[5]"),
        case("bf16[T,8] @f32[5,8] @f32[5]", "quantized"),
    ],
    "linear_bias_gelu": [
        case("f32[T,8] @f32[5,8] @f32[5]", form="relu"),
        case("f32[T,8] @f32[5,8] @f32[1,5]", form="erf"),
    ],
    "linear_bias_residual": [
        case("f32[T,8] f32[T,8] @f32[5,8] @f32[5]"),
        case("f32[T,8] f32[T,5] @f32[5,8] @f32[8]"),
    ],
    "scale_pixels": [
        case("f32[4*T,6]", scale=0.5, shift=-1.0),
        case("u8[4*T,3,2]", scale=0.5, shift=-1.0),
    ],
    "interpolate_rows": [
        case("@f32[9,8] f32[T,4] f32[T,4]"),
        case("@f32[9,8] i32[T,4] f32[T,3]"),
        case("@f32[9] i32[T,4] f32[T,4]"),
    ],
    "axial_rotary_table": [
        case("i32[T,3]", inv_freq=_FREQUENCIES),
        case("f32[T,2]", inv_freq=_FREQUENCIES),
    ],
    "scheduled_picture_attention": [
        case("f32[T,24] f32[T,4]", "scheduled", heads=2, scale=0.5, cache="int8"),
        case("f32[T,24] f32[T,4]", "quantized", heads=2, scale=0.5, cache="bf16"),
        case("f32[T,24] f32[T,6]", "scheduled", heads=2, scale=0.5, cache="bf16"),
    ],
    "picture_attention": [
        case("f32[T,24] f32[T,6]", heads=2, scale=0.5),
        case("f32[T,24] f32[T,4]", heads=0, scale=0.5),
        case("f32[T,18] f32[T,3]", heads=2, scale=0.5),
        case("f32[U,24] f32[T,4]", heads=2, scale=0.5),
    ],
}
