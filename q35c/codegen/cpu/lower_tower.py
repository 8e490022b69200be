"""Lowering of a vision tower's ops, as in lower.py. A picture's patches are four times as many as its tokens."""

from __future__ import annotations

from collections.abc import Callable

from q35c.codegen.calls import Tokens
from q35c.codegen.cpu.kernels.attention.picture import padded_dims
from q35c.codegen.cpu.kernels.attention.shape import STEP
from q35c.codegen.requests import Lowering, row_count, width
from q35c.codegen.schedule import View
from q35c.errors import LoweringError
from q35c.ir.graph import Op
from q35c.ir.types import static
from q35c.layouts.weights import ceil_div


def lower_scale_pixels(low: Lowering, op: Op) -> None:
    y, form = result_of(low, op)
    parameters = {"K": width(op["x"]), "scale": op.attrs["scale"], "shift": op.attrs["shift"]}
    low.call("scale_pixels", {**parameters, "result": form}, x=low.views[op["x"]], y=y)


def lower_interpolate_rows(low: Lowering, op: Op) -> None:
    table, taps, weights = op.operands
    parameters = {"D": width(table), "rows": static(table.type.shape[0]), "taps": width(taps)}
    low.call(
        "interpolate_rows", parameters, table=low.shared.weight("vector", table), taps=low.views[taps],
        weights=low.views[weights], y=low.output(op.result),
    )  # fmt: skip


def lower_axial_rotary_table(low: Lowering, op: Op) -> None:
    parameters = {"inv_freq": op.attrs["inv_freq"]}
    places, table = low.views[op["places"]], low.output(op.result)
    low.call("axial_rotary_table", parameters, places=places, table=table)


def lower_layer_norm(low: Lowering, op: Op) -> None:
    w, b = (low.shared.weight("vector", op[name]) for name in ("weight", "bias"))
    y, form = result_of(low, op)
    parameters = {"D": width(op["x"]), "eps": op.attrs["eps"], "result": form}
    low.call("layer_norm", parameters, x=low.views[op["x"]], w=w, b=b, y=y)


def lower_linear_bias(low: Lowering, op: Op) -> None:
    kind = op.kind.removeprefix("rounded_")
    is_residual = kind == "linear_bias_residual"
    weight = op["weight"]
    outputs, inputs = (static(dim) for dim in weight.type.shape)
    y, form = result_of(low, op)
    epilogue = "bias_residual" if is_residual else "bias"
    parameters = {
        "N": outputs, "K": inputs, "dtype": weight.type.dtype, "rows": op["x"].type.dtype,
        "epilogue": f"gelu_{op.attrs['form']}" if kind == "linear_bias_gelu" else epilogue, "result": form,
    }  # fmt: skip
    residual = {"r": low.views[op["residual"]]} if is_residual else {}
    w, b = low.shared.weight("linear", weight), low.shared.weight("vector", op["bias"])
    low.call("linear_bias", parameters, w=w, b=b, x=low.views[op["x"]], y=y, **residual)


def lower_picture_attention(low: Lowering, op: Op) -> None:
    qkv, table = op.operands
    rows = row_count(qkv)
    heads = {
        "H": op.attrs["heads"], "D": width(table), "kv_dtype": op.attrs["cache"],
        "cells": ceil_div(low.most(rows), STEP) * STEP,
    }  # fmt: skip
    parameters = {**heads, "scale": op.attrs["scale"]}
    kept = {
        "q": low.temporary("q", heads["H"] * padded_dims(heads["D"]), rows),
        "cells": low.scratch("picture_prepare", **parameters),
    }
    low.call("picture_prepare", parameters, qkv=low.views[qkv], table=low.views[table], **kept)
    y, form = result_of(low, op)
    scratch = low.scratch("picture_attention", **heads)
    low.call("picture_attention", {**heads, "result": form}, **kept, y=y, scratch=scratch)


def lower_reshape(low: Lowering, op: Op) -> None:
    """Rows that lie side by side make one row: a view, where they lie without gaps."""
    x = op["x"]
    source, rows = low.views[x], row_count(op.result)
    is_rows = x.type.rank == op.result.type.rank == 2 and isinstance(source.rows, Tokens)
    if not is_rows or source.stride != width(x) or not isinstance(rows, Tokens):
        raise LoweringError(
            "only whole rows without gaps are views", where=f"entry {low.graph.name}",
            expected=f"{op.result.type}", got=f"{x.type}, {source.stride} words a row",
        )  # fmt: skip
    low.views[op.result] = View(source.home, width(op.result), rows, source.offset)


def result_of(low: Lowering, op: Op) -> tuple[View, str]:
    """Return the rows that an op writes, and whether they are f32 or rounded to bf16."""
    (made,) = op.results
    return low.output(made), "bf16" if made.type.dtype == "bf16" else "f32"


TOWER_RULES: dict[str, Callable[[Lowering, Op], None]] = {
    "scale_pixels": lower_scale_pixels,
    "rounded_scale_pixels": lower_scale_pixels,
    "interpolate_rows": lower_interpolate_rows,
    "axial_rotary_table": lower_axial_rotary_table,
    "layer_norm": lower_layer_norm,
    "rounded_layer_norm": lower_layer_norm,
    "linear_bias": lower_linear_bias,
    "linear_bias_gelu": lower_linear_bias,
    "rounded_linear_bias_gelu": lower_linear_bias,
    "linear_bias_residual": lower_linear_bias,
    "scheduled_picture_attention": lower_picture_attention,
    "rounded_scheduled_picture_attention": lower_picture_attention,
    "reshape": lower_reshape,
}
