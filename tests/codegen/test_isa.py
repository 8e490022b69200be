"""Every row of an instruction set does what its operation means, to the last bit; and what a level lacks is not asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tvm.script import tirx as T

from q35c import load
from q35c.codegen.cpu.isa.apply import apply
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.isa.operations import OPERATIONS
from q35c.codegen.cpu.isa.x86 import ISAS, V3, V4, V4_BF16
from q35c.codegen.cpu.support import support_ir
from q35c.compile import compile_model
from q35c.cpuinfo import processor_flags
from scripts.replay import MODELS, graph_of
from tests.kernels.harness import Kernels, build_kernels, guard

TURNS = 64
Rng = np.random.Generator
ROWS = sorted({(isa.name, row.operation) for isa in ISAS.values() for row in isa.instructions})


def any_bits(rng: Rng, kind: str, count: int) -> NDArray[Any]:
    return rng.integers(0, 256, count * np.dtype(kind).itemsize, dtype=np.uint8).view(kind)


def numbers(rng: Rng, kind: str, count: int) -> NDArray[Any]:
    """Return normal f32 of either sign, or the upper halves of such."""
    found = np.ldexp(rng.standard_normal(count).astype(np.float32), rng.integers(-20, 20, count))
    return found if kind == "float32" else (found.view(np.uint32) >> 16).astype(np.uint16)


# What an operation is defined for, by the number of its operand, where that is less than all.
DOMAINS: dict[tuple[str, int], Callable[[Rng, str, int], NDArray[Any]]] = {
    ("lookup16", 1): lambda rng, kind, count: any_bits(rng, kind, count) & 15,
    ("scale_f32", 1): lambda rng, _, count: rng.integers(-80, 80, count).astype(np.float32),
    ("add2_u8s8", 1): lambda rng, kind, count: any_bits(rng, kind, count) & 127,
}


def samples(rng: Rng, operation: str, bytes_each: int) -> list[NDArray[Any]]:
    """Return registers for each operand; tables of 16 bytes fill theirs."""
    made = []
    for number, kind in enumerate(OPERATIONS[operation].takes):
        is_number = kind == "float32" or operation == "dot2_bf16"
        fill = DOMAINS.get((operation, number), numbers if is_number else any_bits)
        made.append(fill(rng, kind, bytes_each // np.dtype(kind).itemsize))
    if operation == "lookup16":
        made[0] = np.tile(made[0][:16], bytes_each // 16)
    return made


def kernel_of(isa: Isa, operation: str) -> Any:
    """Return the kernel (operands' registers, one behind the other; the result's register) of one operation."""
    row, L = isa.instruction(operation), isa.lanes
    width = 1 if row.is_scalar else L

    def result(data: Any) -> Any:
        operands = [data[T.ramp(number * L, 1, L)] for number in range(len(row.takes))]
        return T.reinterpret(apply(isa, operation, *operands), dtype="int32" if row.is_scalar else f"int32x{L}")  # fmt: skip

    @T.prim_func(private=True, s_tir=True)
    def once(X: T.handle("int32"), Y: T.handle("int32"), tid: T.int32, nt: T.int32) -> T.int32:
        x = T.decl_buffer((len(row.takes) * L,), "int32", data=X)
        y = T.decl_buffer((width,), "int32", data=Y)
        y[T.ramp(0, 1, width) if width > 1 else 0] = result(x)
        return T.int32(0)

    return once


@functools.cache
def kernels_of(name: str) -> Kernels:
    """Build the operations of one level that this processor has."""
    isa, flags = ISAS[name], processor_flags()
    rows = [row for row in isa.instructions if flags.issuperset(row.needs)]
    return build_kernels({row.operation: kernel_of(isa, row.operation) for row in rows}, isa)


@pytest.mark.parametrize(("name", "operation"), ROWS)
def test_a_row_does_what_its_operation_means(name: str, operation: str) -> None:
    isa, rng = ISAS[name], np.random.default_rng(7)
    if not processor_flags().issuperset(isa.instruction(operation).needs):
        pytest.skip(f"needs {' '.join(isa.instruction(operation).needs)}")
    kernels, meaning = kernels_of(name), OPERATIONS[operation]
    for _ in range(TURNS):
        operands = samples(rng, operation, 4 * isa.lanes)
        data = guard(np.concatenate([operand.view(np.int32) for operand in operands]))
        found = guard(np.zeros(1 if isa.instruction(operation).is_scalar else isa.lanes, np.int32))
        kernels.call(operation, data, found)
        with np.errstate(over="ignore"):
            expected = meaning.meaning(*operands)
        assert expected.dtype == meaning.gives
        np.testing.assert_array_equal(found.view(expected.dtype), expected)


@T.prim_func(private=True, s_tir=True)
def multiply_flushed(
    X: T.handle("float32"), Y: T.handle("float32"), tid: T.int32, nt: T.int32
) -> T.int32:
    x, y = T.decl_buffer((16,), data=X), T.decl_buffer((16,), data=Y)
    old: T.let[T.int32] = T.call_extern("int32", "q35c_flush_denormals")
    for i in T.serial(16):
        y[i] = x[i] * y[i]
    T.evaluate(T.call_extern("int32", "q35c_restore_denormals", old))
    return T.int32(0)


def test_what_is_flushed_keeps_its_sign() -> None:
    kernels = build_kernels({"once": multiply_flushed})
    tiny = np.finfo(np.float32).tiny
    values = np.array(
        [1, tiny, tiny / 2, np.finfo(np.float32).smallest_subnormal, 0, 3e38, np.inf, 1e-30] * 2,
        np.float32,
    )
    values[8:] *= -1
    data, found = guard(values), guard(np.ones(16, np.float32))
    kernels.call("once", data, found)
    expected = np.where(np.abs(values) < tiny, np.copysign(np.float32(0), values), values)
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))
    assert expected[2] == 0 and np.signbit(expected[10])


@pytest.mark.parametrize("isa", ISAS.values(), ids=list(ISAS))
def test_rows_are_of_their_level(isa: Isa) -> None:
    names = [row.operation for row in isa.instructions]
    assert len(set(names)) == len(names)
    for row in isa.instructions:
        assert row.lanes == isa.lanes
        assert set(row.needs) <= set(isa.cpu_features)
        assert len(row.takes) == len(OPERATIONS[row.operation].takes)
        assert row.text.startswith("llvm.") or f"@{row.text}(" in support_ir(isa)
    assert {"dot2_s16", "lookup16"} <= set(names)
    assert set(names) <= set(OPERATIONS)


def test_an_operation_that_is_not_offered() -> None:
    assert not V4.offers("dot2_bf16")
    assert V4_BF16.offers("dot2_bf16")
    with pytest.raises(KeyError):
        V4.instruction("dot2_bf16")


FOUR = Isa(
    name="four",
    lanes=4,
    llvm_cpu="x86-64-v2",
    llvm_features=(),
    cpu_features=("sse4_2",),
    tuning=replace(V3.tuning, has_assembled_tiles=False),
    system=V3.system,
    instructions=(),
)


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.nightly), "moe"])
def test_a_machine_of_four_lanes_and_no_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(ISAS, FOUR.name, FOUR)
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    ids = np.random.default_rng(5).integers(0, MODELS[name]["vocab_size"], 70).tolist()
    logits: list[NDArray[np.float32]] = []
    for isa in (FOUR, V3):
        output = tmp_path / isa.name
        options: dict[str, Any] = {"precision": "f32", "context": 128, "load_format": "dummy"}
        compile_model(tmp_path, output, target=f"cpu:{isa.name}", import_graph=graph_of, **options)
        with load(output) as model, model.session() as session:
            logits.append(session.score(ids))
    assert np.abs(logits[1]).max() > 0.1
    np.testing.assert_allclose(*logits, atol=4e-6)
