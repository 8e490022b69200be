"""Rows of kernel families: what they say of their kernels is what the kernels do, and calls go by it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tvm import tirx
from tvm.ir import Call, StringImm
from tvm_ffi import structural_walk

from q35c.codegen.calls import Int, Signature, Tid, Tokens
from q35c.codegen.cpu import families
from q35c.codegen.cpu.families import FAMILIES, make_kernel
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.x86 import V3, V4_BF16
from q35c.codegen.requests import Lowering, Shared
from q35c.codegen.schedule import Arrivals, Buffer, StateRef, View, WeightRef
from q35c.codegen.targets import find_target
from q35c.errors import LoweringError
from q35c.ir.graph import Graph

HEADS: dict[str, Any] = {"Hq": 4, "Hkv": 2, "D": 32}
CACHE = {"context": 64, "k_offset_bytes": 0, "v_offset_bytes": 8192}
DELTA = {"Hk": 2, "Hv": 4, "Dk": 32, "Dv": 32, "K": 4, "eps": 1e-6, "slot_offset_bytes": 0}
EXPERTS = {"E": 4, "top_k": 2, "I": 64, "H": 32}
F32 = {"dtype": "f32", "rows": "f32"}
INTEGER = {"dtype": "i4g32", "rows": "q8g32"}


def options(**values: Any) -> list[dict[str, Any]]:
    """Return every combination of the values."""
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


CACHES = options(rows=["sequence", "batch"], kv_dtype=["f32", "bf16", "int8"])
# Kernels of every form that a family has.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        HEADS | CACHE | cache | {"splits": 2, "group": group}
        for cache in CACHES
        for group in ((0, 32) if cache["rows"] == "sequence" else (0,))
    ],
    "attention_combine": [HEADS | {"splits": 2} | o for o in options(kv_dtype=["f32", "int8"], group=[0, 32])],
    "attention_prepare": [HEADS | CACHE | {"R": 8, "eps": 1e-6, "scale": 0.25} | cache for cache in CACHES],
    "axial_rotary_table": [{"inv_freq": (1.0, 0.5, 0.25)}],
    "combine": [{"H": 80, "top_k": 2, **o} for o in options(has_shared=[True, False])],
    "embedding": [{"V": 64, "H": 64, "dtype": dtype} for dtype in ("f32", "bf16", "i5g64")],
    "expert_down": [EXPERTS | F32, EXPERTS | INTEGER],
    "expert_gate_up": [EXPERTS | F32, EXPERTS | INTEGER, EXPERTS | INTEGER | {"group": 32}],
    "gated_delta": [DELTA | {"group": 0}, DELTA | {"group": 32}],
    "gated_delta_decode": [DELTA | {"group": 0}, DELTA | {"group": 32}],
    "group_by_expert": [{"E": 4, "top_k": 2}],
    "interpolate_rows": [{"D": 48, "rows": 9, "taps": 4}],
    "layer_norm": [{"D": 48, "eps": 1e-6, **o} for o in options(result=["f32", "bf16"])],
    "linear_bias": [
        {"N": 128, "K": 64, **F32, **o}
        for o in options(epilogue=["bias", "gelu_erf", "bias_residual"], result=["f32", "bf16"])
    ],
    "picture_attention": [
        {"H": 2, "cells": 64, **o} for o in options(D=[32, 72], kv_dtype=["f32", "bf16"], result=["f32", "bf16"])
    ],
    "picture_prepare": [
        {"H": 2, "cells": 64, "scale": 0.25, **o} for o in options(D=[32, 72], kv_dtype=["f32", "bf16"])
    ],
    "linear": [
        *({"N": 128, "K": 64, **F32, **o} for o in options(epilogue=["none", "residual", "swiglu"])),
        {"N": 128, "K": 64, **INTEGER, "epilogue": "none"},
        {"N": 128, "K": 64, **INTEGER, "epilogue": "swiglu", "group": 32},
        {"N": 128, "K": 64, "dtype": "bf16", "rows": "bf16", "epilogue": "residual"},
    ],
    "quantize_rows": [{"K": 64, "group": 32, "pairs": 1}, {"K": 80, "group": 32, "pairs": 2}],
    "rms_norm": [
        {"D": 64, "eps": 1e-6, "offset": 1.0},
        *({"D": 64, "eps": 1e-6, "offset": 1.0, "group": 32, **o} for o in options(is_kept=[True, False])),
    ],
    "rotary_table": [{"inv_freq": (1.0, 0.5, 0.25, 0.125), "sections": (2, 1, 1), "scaling": 1.0}],
    "round_rows": [{"K": 65, "pairs": 1}],
    "scale_pixels": [{"K": 27, "scale": 0.5, "shift": -1.0, **o} for o in options(result=["f32", "bf16"])],
    "route": [{"E": 8, "top_k": 2, **o} for o in options(has_shared=[True, False])],
}  # fmt: skip


def signature(family: str, parameters: Mapping[str, Any]) -> Signature:
    return FAMILIES[family].signature(parameters)


def stored(kernel: Any) -> set[str]:
    """Return the pointers that a kernel stores to, by a scan of its body. Functions of the narrow tile only read what they get."""
    behind: list[tuple[Any, Any]] = []  # a buffer and the pointer it lies behind
    written: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.DeclBuffer):
            behind.append((node.buffer, node.data))
        elif isinstance(node, tirx.BufferStore):
            written.append(node.buffer)
        elif any(isinstance(a, StringImm) and a.value == "q35c_arrive" for a in node.args):
            written.append(node.args[1].args[0].source)  # the address of a counter

    kinds = (tirx.DeclBuffer, tirx.BufferStore, Call)
    structural_walk(kernel.body, (kinds, visit))
    return {
        parameter.name.lower()
        for parameter in kernel.params
        for buffer, pointer in behind
        if parameter.same_as(pointer) and any(buffer.same_as(store) for store in written)
    }


def test_every_family_has_variants() -> None:
    assert set(VARIANTS) == set(FAMILIES)


@pytest.mark.parametrize("isa", [V3, V4_BF16], ids=lambda isa: isa.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_names_what_its_kernels_take_and_store_to(family: str, isa: Isa) -> None:
    everywhere: set[str] = set()
    for parameters in VARIANTS[family]:
        kernel = make_kernel(family, tuple(sorted(parameters.items())), isa)  # names are compared
        said, found = signature(family, parameters), stored(kernel)
        assert found <= said.writes, parameters
        everywhere |= found
    assert everywhere == set(FAMILIES[family].writes.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_call_does_not_name_follows_from_what_it_does(family: str) -> None:
    for parameters in VARIANTS[family]:
        said = signature(family, parameters)
        assert len(set(said.arguments)) == len(said.arguments)
        strided = {n.removeprefix("ld_") for n in said.arguments if n.startswith("ld_")}
        assert strided <= set(said.pointers) and "tokens" in said.arguments


def test_a_row_that_disagrees_with_its_kernel_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(FAMILIES["rms_norm"], arguments="w x y tokens ld_x ld_y")
    monkeypatch.setitem(families.FAMILIES, "rms_norm", row)
    parameters = (("D", 96), ("eps", 1e-6), ("offset", 0.0))
    with pytest.raises(LoweringError, match="other arguments"):
        make_kernel("rms_norm", parameters, V3)


# --- calls ----------------------------------------------------------------------------------------


def lowering() -> Lowering:
    return Lowering(
        Graph("test", "lowered", (), (), ()), Shared(find_target("cpu:x86-64-v3"), 64, 8, {}), 8
    )


def view(name: str, stride: int) -> View:
    return View(Buffer(name, 4096), stride, Tokens())


SWIGLU = VARIANTS["linear"][-2]


def test_arguments_come_in_the_kernels_order() -> None:
    low, x, q = lowering(), view("x", 20), view("q", 36)
    scratch = View(Buffer("scratch", 4096), 1024, Int(1))
    low.call("linear", SWIGLU, scratch=scratch, q=q, arrivals=Arrivals(), x=x, w=WeightRef("w"))
    (step,) = low.schedule.steps
    pointers = (WeightRef("w"), x, q, scratch, Arrivals())
    assert step.args == (*pointers, Tokens(), Int(20), Int(36), Tid())
    assert (step.reads, step.writes) == ((x,), (q, scratch))


def test_a_call_of_one_row_says_so() -> None:
    low = lowering()
    x, y = (View(Buffer(name, 64), 16, Int(1)) for name in "xy")
    low.call("linear", VARIANTS["linear"][0], w=WeightRef("w"), x=x, y=y)
    assert low.schedule.steps[0].args[3:] == (Int(1), Int(16), Int(16))


def test_states_behind_a_pointer_are_touched() -> None:
    low = lowering()
    names = signature("attention_prepare", VARIANTS["attention_prepare"][0]).pointers
    pointers = {name: view(name, 8) for name in names}
    state = StateRef(64, ("keys", "values"))
    low.call("attention_prepare", VARIANTS["attention_prepare"][0], **{**pointers, "state": state})
    (step,) = low.schedule.steps
    assert step.state == ("keys", "values") and step.writes == (pointers["q_out"],)


@pytest.mark.parametrize(
    ("family", "pointers"),
    [
        ("norm", "x w y"),
        ("rms_norm", "x w"),
        ("rms_norm", "x w y z"),
        ("rms_norm", "x w y X"),
        ("rms_norm", "x w y q"),  # no kernel that rounds
        ("rms_norm", "x w y ld_x"),
        ("rms_norm", "x w y tokens"),
    ],
)
def test_a_name_too_many_or_too_few_is_an_error(family: str, pointers: str) -> None:
    low = lowering()
    given = {name: view(name, 8) for name in pointers.split()}
    with pytest.raises(LoweringError, match=r"does not name|no such kernel family"):
        low.call(family, {"D": 64, "eps": 1e-6, "offset": 0.0}, **given)
    assert not low.schedule.steps and not low.shared.kernels
