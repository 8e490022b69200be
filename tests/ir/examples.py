"""For each row of the op table: operands that fit, and operands that must be refused.

Types are IR text; `@` and `$` mark weights and state. `docs/ir.md` shows the examples that fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from q35c.ir import Builder, Graph, SymDim, TensorType, Value
from q35c.ir.ops import OPS, ROUNDING
from q35c.ir.text import parse_dim
from tests.ir import tower_examples
from tests.ir.cases import Case, case

T = SymDim("T")
SIZES = {"T": 5, "B": 2, "CTX": 9}
KINDS = {"@": "weight", "$": "state"}


_QKV = "f32[T,32] f32[T,16] f32[T,4] f32[T,4] @f32[32,1,3] @f32[4] @f32[4] @f32[4]"  # Hk 2, Hv 4
_HEADS = "f32[T,32] f32[T,4] f32[T,4] @f32[4] @f32[4] f32[T,2]"  # Hq 4, Hkv 1, D 4, R 2
_MOE = "f32[T,6] f32[T,4] f32[T,6] f32[T,1] @f32[4,10,6] @f32[4,6,5]"
_QUANTIZED_MOE = "q8g32[T,6] f32[T,4] f32[T,6] f32[T,1] @i4g32[4,10,6] @i4g32[4,6,5]"
_FOLDED_MOE = f"{_QUANTIZED_MOE} f32[T,6] @i4g32[5,6] @i4g32[5,6] @i4g32[6,5]".replace(
    "f32[T,4] f32[T,6]", "f32[T,4]"
)
_DELTA = {"key_heads": 2, "value_heads": 4, "eps": 1e-6}
_ATTENTION = {"heads": 4, "kv_heads": 1, "eps": 1e-6, "scale": 0.5}
_FREQUENCIES = (1.0, 0.1, 0.01, 0.001)

FITS: dict[str, Case] = {
    "embedding": case("i32[T] @f32[11,8]"),
    "embedding_or_rows": case("i32[T] @f32[11,8] f32[T,8]", "fused"),
    "linear": case("f32[T,8] @f32[3,8] @f32[5,8]"),
    "add": case("f32[T,8] f32[8]"),
    "mul": case("f32[T,1,8] f32[4,1]"),
    "div": case("f32[T,8] f32[T,1]"),
    "add_scalar": case("f32[T,8]", value=1e-6),
    "mul_scalar": case("f32[T,8]", value=-0.5),
    "pow_scalar": case("f32[T,8]", exponent=2),
    "neg": case("f32[T,8]"),
    "exp": case("f32[T,8]"),
    "sigmoid": case("f32[T,8]"),
    "silu": case("f32[T,8]"),
    "softplus": case("f32[T,8]"),
    "rsqrt": case("f32[T,8]"),
    "cos": case("f32[T,8]"),
    "sin": case("f32[T,8]"),
    "cast": case("i32[T,8]", dtype="f32"),
    "mean": case("f32[T,8]", axis=-1),
    "sum": case("f32[T,8]", axis=0),
    "softmax": case("f32[T,8]", axis=-1),
    "topk": case("f32[T,8]", k=3),
    "reshape": case("f32[T,8]", shape=(T * 4, 2)),
    "transpose": case("f32[T,2,4]", perm=(1, 2, 0)),
    "slice": case("f32[T,8]", axis=-1, start=1, stop=8, step=3),
    "slice_update": case("f32[T,8] f32[T,3]", axis=-1, start=1, step=3),
    "concat": case("f32[T,8] f32[T,3]", axis=1),
    "constant": case("", values=(1.0, 1e-08, 0.5), shape=(3, 1)),
    "causal_conv": case("f32[6,T] f32[6,4]"),
    "delta_rule": case("f32[T,2,4] f32[T,2,4] f32[T,4,3] f32[T,4] f32[T,4]"),
    "attention": case("f32[4,T,8] f32[2,T,8] f32[2,T,8]", scale=0.35),
    "experts": case("f32[T,6] i32[T,2] f32[T,2] @f32[4,10,6] @f32[4,6,5]"),
    "rms_norm": case("f32[T,8] @f32[8]", eps=1e-6, offset=1.0),
    "gated_rms_norm": case("f32[T,2,8] @f32[8] f32[T,2,8]", "fused", eps=1e-6),
    "rotary_table": case("i32[3,T]", inv_freq=_FREQUENCIES, sections=(2, 1, 1), scaling=1.0),
    "rotary": case("f32[2,T,8] f32[T,4]", "fused"),
    "swiglu": case("f32[T,8] f32[T,8]", "fused"),
    "linear_swiglu": case("f32[T,8] @f32[5,8] @f32[5,8]"),
    "linear_residual": case("f32[T,8] f32[T,5] @f32[5,8]"),
    "gated_delta_net": case(_QKV, "fused", **_DELTA),
    "gated_attention": case(_HEADS, "fused", **_ATTENTION),
    "sparse_moe": case(_MOE, top_k=2),
    "sparse_moe_residual": case(f"{_MOE} f32[T,6]", top_k=2),
    "stateful_gated_delta_net": case(
        f"{_QKV} i64[1] i32[1] $f32[B,2,32] $f32[B,4,4,4]", "stateful", **_DELTA, rows="sequence"
    ),
    "stateful_gated_attention": case(
        f"{_HEADS} i64[1] i32[1] $f32[B,CTX,1,4] $f32[B,CTX,1,4]",
        "stateful",
        **_ATTENTION,
        rows="sequence",
    ),
    "scheduled_gated_attention": case(
        f"{_HEADS} i64[1] i32[1] $f32[B,CTX,1,4] $f32[B,CTX,1,4]",
        "scheduled",
        **_ATTENTION,
        rows="sequence",
        cache="int8",
        splits=1,
    ),
    "last_token": case("f32[T,8]", "stateful"),
    "quantize_rows": case("f32[T,40]", "quantized", dtype="bf16"),
    "quantized_moe_residual": case(
        f"{_QUANTIZED_MOE} f32[T,6]", "quantized", top_k=2, dtype="q8g32"
    ),
    "folded_moe_residual": case(_FOLDED_MOE, "scheduled", top_k=2, dtype="q8g32"),
}
FITS |= tower_examples.FITS
FITS |= {  # an op that also rounds takes what it takes without
    f"rounded_{kind}": replace(
        FITS[kind],
        stage="scheduled",
        attrs={**FITS[kind].attrs, "dtype": "q8g32", "is_kept": kind != "linear_swiglu"},
    )
    for kind in ROUNDING
}

REFUSED: dict[str, list[Case]] = {
    "embedding": [case("f32[T] @f32[11,8]"), case("i32[T] @f32[11]")],
    "embedding_or_rows": [
        case("i32[T] @f32[11,8] f32[T,4]", "fused"),
        case("i32[T] @f32[11,8] f32[5,8]", "fused"),
        case("i32[T] @f32[11,8] f32[T,8]", "traced"),
    ],
    "linear": [
        case("f32[T,8] @f32[3,7]"),
        case("f32[T,8] @f32[3,8] @f32[3,7]"),
        case("f32[T,8]"),
        case("f32[T,8] @i4g32[3,8]", "quantized"),
        case("q8g32[T,8] @i4g64[3,8]", "quantized"),
        case("q8g32[T,8] @bf16[3,8]", "quantized"),
        case("bf16[T,8] @f32[3,8]", "quantized"),
        case("bf16[T,8] @i4g32[3,8]", "quantized"),
        case("q8g32[T,8] @i4g32[3,8] @i8g32[3,8]", "quantized"),
    ],
    "add": [case("f32[T,8] f32[T,7]"), case("f32[T] i32[T]"), case("f32[T] f32[U]")],
    "mul": [case("f32[T,8] f32[T]")],
    "div": [case("f32[T,8] f32[2]"), case("i32[T] i32[T]")],
    "add_scalar": [case("f32[T,8]"), case("f32[T,8] f32[T,8]", value=1.0)],
    "mul_scalar": [case("f32[T,8]", factor=1.0)],
    "pow_scalar": [case("f32[T,8]", value=2)],
    "neg": [case("f32[T,8] f32[T,8]")],
    **{
        kind: [case("i32[T,8]"), case("")]
        for kind in ("exp", "sigmoid", "silu", "softplus", "rsqrt", "cos", "sin")
    },
    "cast": [case("f32[T,8]", dtype="f16")],
    "mean": [case("f32[T,8]", axis=2), case("i32[T,8]", axis=0)],
    "sum": [case("f32[T,8]", axis=-3), case("f32[T,8]", axis=0, keepdims=True)],
    "softmax": [case("f32[T,8]", axis=2), case("i32[T,8]", axis=1)],
    "topk": [case("f32[T,8]", k=9), case("f32[T,8]", k=0), case("f32[8,T]", k=1)],
    "reshape": [case("f32[T,8]", shape=(T * 4, 3)), case("f32[T,8]", shape=(8,))],
    "transpose": [case("f32[T,8]", perm=(0, 0)), case("f32[T,8]", perm=(0,))],
    "slice": [
        case("f32[T,8]", axis=-1, start=1, stop=9, step=1),
        case("f32[T,8]", axis=-1, start=3, stop=3, step=1),
        case("f32[T,8]", axis=-1, start=0, stop=8, step=-1),
        case("f32[T,8]", axis=0, start=0, stop=1, step=1),
        case("f32[T,8]", axis=2, start=0, stop=1, step=1),
    ],
    "slice_update": [
        case("f32[T,8] f32[T,3]", axis=-1, start=2, step=3),
        case("f32[T,8] f32[1,3]", axis=-1, start=1, step=1),
        case("f32[T,8] i32[T,3]", axis=-1, start=1, step=1),
        case("f32[T,8] f32[3]", axis=-1, start=1, step=1),
    ],
    "concat": [
        case("f32[T,8] f32[U,8]", axis=1),
        case("f32[T,8] f32[T,8]", axis=0),
        case("f32[T,8] i32[T,8]", axis=1),
        case("f32[T,8] f32[8]", axis=1),
        case("f32[T,8]", axis=2),
    ],
    "constant": [case("", values=(1.0, 2.0), shape=(3,))],
    "causal_conv": [case("f32[6,T] f32[5,4]"), case("f32[6,T] f32[6,1,4]")],
    "delta_rule": [
        case("f32[T,2,4] f32[T,2,4] f32[T,3,3] f32[T,3] f32[T,3]"),
        case("f32[T,2,4] f32[T,2,3] f32[T,4,3] f32[T,4] f32[T,4]"),
        case("f32[T,2,4] f32[T,2,4] f32[T,4,3] f32[T,4] f32[T,2]"),
        case("f32[U,2,4] f32[U,2,4] f32[T,4,3] f32[T,4] f32[T,4]"),
    ],
    "attention": [
        case("f32[4,T,8] f32[3,T,8] f32[3,T,8]", scale=1.0),
        case("f32[4,T,8] f32[2,T,8] f32[2,T,4]", scale=1.0),
        case("f32[4,T,8] f32[2,U,8] f32[2,U,8]", scale=1.0),
    ],
    "experts": [
        case("f32[T,6] f32[T,2] f32[T,2] @f32[4,10,6] @f32[4,6,5]"),
        case("f32[T,6] i32[T,2] f32[T,3] @f32[4,10,6] @f32[4,6,5]"),
        case("f32[T,6] i32[T,2] f32[T,2] @f32[4,9,6] @f32[4,6,5]"),
        case("f32[T,6] i32[T,2] f32[T,2] @f32[4,10,7] @f32[4,6,5]"),
        case("f32[T,6] i32[T,2] f32[T,2] @f32[4,10,6] @f32[3,6,5]"),
    ],
    "rms_norm": [case("f32[T,8] @f32[7]", eps=1e-6, offset=1.0), case("f32[T,8] @f32[8]", eps=1.0)],
    "gated_rms_norm": [
        case("f32[T,8] @f32[8] f32[T,1]", "fused", eps=1e-6),
        case("f32[T,8] @f32[8] f32[T,8]", "traced", eps=1e-6),
    ],
    "rotary_table": [
        case("i32[2,T]", inv_freq=_FREQUENCIES, sections=(2, 1, 1), scaling=1.0),
        case("i32[3,T]", inv_freq=_FREQUENCIES, sections=(2, 2), scaling=1.0),
    ],
    "rotary": [
        case("f32[2,T,8] f32[T,10]", "fused"),
        case("f32[2,T,8] f32[T,3]", "fused"),
        case("f32[2,T,8] f32[U,4]", "fused"),
        case("f32[2,T,8] f32[T,4]", "traced"),
    ],
    "swiglu": [case("f32[T,8] f32[T,4]", "fused"), case("f32[T,8] f32[T,8]", "stateful")],
    "linear_swiglu": [case("f32[T,8] @f32[5,8] @f32[4,8]"), case("f32[T,8] @f32[5,7] @f32[5,7]")],
    "linear_residual": [case("f32[T,8] f32[T,8] @f32[5,8]"), case("f32[T,8] f32[5] @f32[5,8]")],
    "gated_delta_net": [
        case(_QKV.replace("f32[T,32]", "f32[T,30]", 1), "fused", **_DELTA),
        case(_QKV.replace("f32[T,16]", "f32[T,12]"), "fused", **_DELTA),
        case(_QKV.replace("@f32[32,1,3]", "@f32[32,3]"), "fused", **_DELTA),
        case(_QKV, "fused", **{**_DELTA, "key_heads": 3}),
        case(_QKV, "fused", **{**_DELTA, "key_heads": 0}),
        case(_QKV, "fused", **{**_DELTA, "key_heads": -2}),
        case(_QKV, "stateful", **_DELTA),
    ],
    "gated_attention": [
        case(_HEADS.replace("f32[T,2]", "f32[T,6]"), "fused", **_ATTENTION),
        case(_HEADS, "fused", **{**_ATTENTION, "kv_heads": 2}),
        case(_HEADS, "fused", **{**_ATTENTION, "kv_heads": 0}),
        case(_HEADS, "fused", **{**_ATTENTION, "heads": 8}),
        case(_HEADS.replace("@f32[4] @f32[4]", "@f32[4] @f32[2]"), "fused", **_ATTENTION),
    ],
    "sparse_moe": [
        case(_MOE, top_k=5),
        case(_MOE.replace("f32[T,1]", "f32[T,6]"), top_k=2),
        case(_MOE.replace("f32[T,4]", "f32[T,3]"), top_k=2),
    ],
    "sparse_moe_residual": [case(_MOE, top_k=2), case(f"{_MOE} f32[T,5]", top_k=2)],
    "stateful_gated_delta_net": [
        case(
            f"{_QKV} i64[1] i32[1] $f32[B,3,32] $f32[B,4,4,4]",
            "stateful",
            **_DELTA,
            rows="sequence",
        ),
        case(
            f"{_QKV} i64[1] i32[1] $f32[B,2,32] $f32[B,4,4,3]",
            "stateful",
            **_DELTA,
            rows="sequence",
        ),
        case(f"{_QKV} i64[1] i32[1] $f32[B,2,32] $f32[B,4,4,4]", "stateful", **_DELTA, rows="all"),
        case(
            f"{_QKV} i64[1] i32[2] $f32[B,2,32] $f32[B,4,4,4]",
            "stateful",
            **_DELTA,
            rows="sequence",
        ),
    ],
    "stateful_gated_attention": [
        case(
            f"{_HEADS} i64[1] i32[1] $f32[B,CTX,2,4] $f32[B,CTX,2,4]",
            "stateful",
            **_ATTENTION,
            rows="sequence",
        ),
        case(
            f"{_HEADS} i64[1] i32[2] $f32[B,CTX,1,4] $f32[B,CTX,1,4]",
            "stateful",
            **_ATTENTION,
            rows="sequence",
        ),
    ],
    "scheduled_gated_attention": [
        case(
            f"{_HEADS} i64[1] i32[1] $f32[B,CTX,1,4] $f32[B,CTX,1,4]",
            stage,
            **_ATTENTION,
            rows="sequence",
            cache=cache,
            splits=splits,
        )
        for stage, cache, splits in (
            ("scheduled", "i8", 1),
            ("stateful", "int8", 1),
            ("scheduled", "f32", 0),
        )
    ],
    "last_token": [case("f32[]", "stateful"), case("f32[T,8]", "fused")],
    "quantize_rows": [
        case("f32[T,40]", "stateful", dtype="q8g32"),
        case("f32[T,40]", "quantized", dtype="q8g48"),
        case("f32[T,40]", "quantized", dtype="i8g32"),
        case("f32[T,40]", "quantized", dtype="f32"),
        case("i32[T,40]", "quantized", dtype="bf16"),
    ],
    "quantized_moe_residual": [
        case(f"{_QUANTIZED_MOE} f32[T,6]", "quantized", top_k=2, dtype="q8g64"),
        case(f"{_QUANTIZED_MOE} f32[T,6]", "stateful", top_k=2, dtype="q8g32"),
        case(
            f"{_QUANTIZED_MOE.replace('i4g32', 'f32')} f32[T,6]",
            "quantized",
            top_k=2,
            dtype="q8g32",
        ),
        case(f"{_QUANTIZED_MOE} f32[T,5]", "quantized", top_k=2, dtype="q8g32"),
    ],
    "folded_moe_residual": [
        case(_FOLDED_MOE, "scheduled", top_k=2, dtype="f32"),
        case(_FOLDED_MOE.replace("i4g32[5,6]", "i4g32[4,6]"), "scheduled", top_k=2, dtype="q8g32"),
        case(_FOLDED_MOE.replace("i4g32[6,5]", "i8g32[6,5]"), "scheduled", top_k=2, dtype="q8g32"),
        case(_FOLDED_MOE, "quantized", top_k=2, dtype="q8g32"),
    ],
}
REFUSED |= tower_examples.REFUSED
REFUSED |= {
    f"rounded_{kind}": [
        replace(fits, stage="quantized"),
        replace(fits, attrs=fits.attrs | {"dtype": "f32"}),
    ]
    for kind in ROUNDING
    if (fits := FITS[f"rounded_{kind}"])
}


def parse_type(text: str) -> TensorType:
    """Read a type such as `f32[4*T,8]`."""
    dtype, _, dims = text.rstrip("]").partition("[")
    return TensorType(dtype, tuple(parse_dim(dim) for dim in dims.split(",") if dim))


def operand_names(kind: str, count: int) -> list[str]:
    """Name operands as the op table does; repeated ones are numbered."""
    names = list(OPS[kind].operands)[:count]
    last = names[-1] if names else ""
    return names + [f"{last}_{i}" for i in range(1, count - len(names) + 1)]


def build(kind: str, example: Case) -> Graph:
    """Make a graph of this one op; VerifyError if it is refused."""
    builder = Builder("example", example.stage)
    makers: dict[str, Callable[[str, TensorType], Value]]
    makers = {"@": builder.weight, "$": builder.state}
    names = operand_names(kind, len(example.operands))
    operands = [
        makers.get(text[0], builder.input)(name, parse_type(text.lstrip("@$")))
        for name, text in zip(names, example.operands, strict=True)
    ]
    made = builder.emit(kind, *operands, **example.attrs)
    return builder.finish(made if isinstance(made, tuple) else (made,))


def sized(tensor: TensorType) -> tuple[int, ...]:
    """Return a shape with the sizes of SIZES in place of symbols."""
    return tuple(d if isinstance(d, int) else SIZES[d.name] * d.factor for d in tensor.shape)


def draw(value: Value, rng: np.random.Generator) -> np.ndarray:
    """Draw an array of a type: small indices for integers, positive numbers for floats.

    Positive, so that rsqrt is defined; integers run 0, 1, 0, 1.. so that they index every table.
    """
    shape = sized(value.type)
    if value.type.dtype in ("u8", "i32", "i64"):
        dtype = {"u8": np.uint8, "i32": np.int32, "i64": np.int64}[value.type.dtype]
        return (np.arange(int(np.prod(shape))) % 2).astype(dtype).reshape(shape)
    if value.kind == "state":
        return np.zeros(shape, np.float32)
    return rng.uniform(0.1, 1.0, shape).astype(np.float32)


def draw_arrays(
    graph: Graph, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw inputs, weights and empty state of a graph by name."""
    leaves = (graph.inputs, graph.leaves("weight"), graph.leaves("state"))
    inputs, weights, state = ({v.name: draw(v, rng) for v in group} for group in leaves)
    return inputs, weights, state
