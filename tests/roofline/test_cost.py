"""The cost model against numbers worked out by hand, with 0.8B shapes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from q35c.artifact import read_artifact
from q35c.artifact.kernels import KernelCost
from q35c.artifact.schema import decode
from q35c.codegen.cpu.families import FAMILIES
from q35c.roofline import predict_tests
from q35c.roofline.cost import Cost, Work, call_cost
from q35c.roofline.machine import Limits
from tests.codegen.test_families import VARIANTS
from tests.compiled import artifact

DECODE = Work(tokens=1, starts=(100,), weight_bytes=0)
HEADS = {"Hq": 8, "Hkv": 2, "D": 256, "kv_dtype": "bf16", "context": 8192}
DELTA = {"Hk": 16, "Hv": 16, "Dk": 128, "Dv": 128, "K": 4}

CASES: dict[str, tuple[str, dict[str, Any], Work, tuple[float, float, float, str]]] = {
    # 4 bits a weight and 2 bytes for 128 of them; 1,024 int8, 8 scales and sums in, 8,192 floats out.
    "an integer matvec": (
        "linear",
        {"N": 8192, "K": 1024, "dtype": "i4g128", "rows": "q8g128", "epilogue": "none"},
        Work(1, (0,), 8192 * (512 + 16)),
        (4325376, 1024 + 8 * 8 + 4 * 8192, 2 * 8192 * 1024, "int8"),
    ),
    "a bf16 product with a residual": (
        "linear",
        {"N": 1024, "K": 2048, "dtype": "bf16", "rows": "bf16", "epilogue": "residual"},
        Work(256, (0,), 2 * 1024 * 2048),
        (4194304, 256 * (2 * 2048 + 4 * 2 * 1024), 2 * 256 * 1024 * 2048, "bf16"),
    ),
    "gates multiply f32 rows": (
        "linear",
        {"N": 32, "K": 1024, "dtype": "bf16", "rows": "f32", "epilogue": "none"},
        Work(2, (0,), 2 * 32 * 1024),
        (65536, 2 * 4 * (1024 + 32), 2 * 2 * 32 * 1024, "f32"),
    ),
    "swiglu writes half as many columns": (
        "linear",
        {"N": 7168, "K": 1024, "dtype": "f32", "rows": "f32", "epilogue": "swiglu"},
        Work(2, (0,), 7168 * 4096),
        (7168 * 4096, 2 * 4 * (1024 + 3584), 2 * 2 * 7168 * 1024, "f32"),
    ),
    # Of tokens at random two may be one: 1,000 (1 - 0.999^3) rows.
    "a lookup reads rows": (
        "embedding",
        {"V": 1000, "H": 64, "dtype": "bf16"},
        Work(3, (0,), 1000 * 128),
        (2.997001 * 128, 3 * 256, 3 * 64, "f32"),
    ),
    "decode attention reads 101 cells": (
        "attention",
        HEADS,
        DECODE,
        (2 * 101 * 2 * 256 * 2, 3 * 8 * 256 * 4, 101 * 8 * 4 * 256, "bf16"),
    ),
    "an int8 cache has a scale for each cell and head": (
        "attention",
        {**HEADS, "kv_dtype": "int8"},
        DECODE,
        (2 * 101 * 2 * (256 + 4), 3 * 8 * 256 * 4, 2 * 101 * 8 * 4 * 256, "int8"),
    ),
    # Token t of 4 meets 100 + t + 1 cells: 101 + 102 + 103 + 104.
    "prefill attention is causal": (
        "attention",
        HEADS,
        Work(4, (100,), 0),
        (2 * 104 * 2 * 256 * 2, 4 * 3 * 8 * 256 * 4, 410 * 8 * 4 * 256, "bf16"),
    ),
    "a batch reads every sequence's cells": (
        "attention",
        HEADS,
        Work(2, (9, 19), 0),
        (2 * (10 + 20) * 2 * 256 * 2, 2 * 3 * 8 * 256 * 4, 30 * 8 * 4 * 256, "bf16"),
    ),
    "both states are read and written": (
        "gated_delta",
        DELTA,
        DECODE,
        (
            2 * 2**20 + 2 * 3 * 6144 * 4,
            4 * (2 * 6144 + 2 * 2048 + 2 * 16),
            7 * 2**18 + 12 * 2048 + 6144 * (8 + 12),
            "f32",
        ),
    ),
    "swiglu that rounds writes codes, scales and sums": (
        "linear",
        {
            "N": 7168,
            "K": 1024,
            "dtype": "i4g64",
            "rows": "q8g64",
            "epilogue": "swiglu",
            "group": 64,
        },
        Work(2, (0,), 3584 * 1024),
        (3584 * 1024, 2 * (1024 + 8 * 16 + 3584 + 8 * 56), 2 * 2 * 7168 * 1024, "int8"),
    ),
    "a norm that rounds writes codes, scales and sums": (
        "rms_norm",
        {"D": 1024, "group": 64, "is_kept": False},
        Work(2, (0,), 0),
        (0, 2 * (4 * 1024 + 1024 + 8 * 16), 2 * 4 * 1024, "f32"),
    ),
    "one token uses top_k experts": (
        "expert_down",
        {"E": 256, "I": 512, "H": 2048, "top_k": 8, "dtype": "i4g64", "rows": "q8g64"},
        Work(1, (0,), 256 * 1000),
        (8000, 8 * (512 + 64 + 4 * 2048), 2 * 8 * 512 * 2048, "int8"),
    ),
    "two tokens may share experts": (
        "expert_gate_up",
        {"E": 4, "I": 16, "H": 32, "top_k": 2, "dtype": "f32", "rows": "f32"},
        Work(2, (0,), 400),
        (300, 4 * (4 * 32 + 4 * 16), 4 * 4 * 16 * 32, "f32"),
    ),
    "rounding writes codes, scales and sums": (
        "quantize_rows",
        {"K": 96, "group": 64, "pairs": 8},
        Work(2, (0,), 0),
        (0, 16 * (4 * 96 + 96 + 16), 5 * 16 * 96, "f32"),
    ),
    "rounding to bf16 writes half": (
        "round_rows",
        {"K": 96, "pairs": 1},
        Work(2, (0,), 0),
        (0, 2 * (4 * 96 + 2 * 96), 5 * 2 * 96, "f32"),
    ),
}


def stated(family: str, parameters: dict[str, Any]) -> KernelCost:
    """Return the cost that a kernel's row states, as an artifact keeps it."""
    return decode(KernelCost, asdict(FAMILIES[family].cost(parameters)), "$")


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    family, parameters, work, expected = CASES[name]
    cost = call_cost(stated(family, parameters), work)
    found = (cost.memory_bytes, cost.cache_bytes, cost.operations, cost.peak)
    assert found == (pytest.approx(expected[0]), expected[1], expected[2], expected[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_states_a_cost(family: str) -> None:
    for parameters in VARIANTS[family]:
        cost = stated(family, parameters)
        assert cost.cached_bytes_per_token > 0 or cost.bytes_per_cell > 0
        assert cost.operations_per_token > 0 or cost.operations_per_score > 0


# Sums over the steps of a whole test, lookups aside: bytes from memory, bytes from caches, operations. They were found by rules
# for each family in the roofline itself, before kernels stated their costs.
TOTALS = {
    ("dense", "f32", "auto"): {
        "pp300": (1908736, 7041996, 125907200),
        "tg1": (836608, 37868, 449696),
        "pp300 @ d40": (1949696, 7041996, 132051200),
        "tg1 @ d40": (857088, 37868, 470176),
    },
    ("dense", "w4", "int8"): {
        "pp300": (516096, 6998012, 149772720),
        "tg1": (212640, 37436, 453808),
        "pp300 @ d40": (527616, 6998012, 162060720),
        "tg1 @ d40": (218400, 37436, 494768),
    },
    ("moe", "w4", "auto"): {
        "pp300": (800768, 9240944, 146474496),
        "tg1": (257024, 48632, 552224),
        "pp300 @ d40": (821248, 9240944, 152618496),
        "tg1 @ d40": (267264, 48632, 572704),
    },
}


@pytest.mark.parametrize("kind", TOTALS, ids=" ".join)
def test_whole_models(kind: tuple[str, str, str]) -> None:
    model, precision, cache = kind
    with read_artifact(artifact(model, precision, kv_dtype=cache)) as compiled:
        sizes: dict[str, Any] = {"prompt_tokens": (300,), "new_tokens": (1,), "depths": (0, 40)}
        tests = predict_tests(compiled.manifest, **sizes)
    for test in tests:
        costs = [step.cost for step in test.steps]
        memory = sum(s.cost.memory_bytes for s in test.steps if s.kernel.family != "embedding")
        found = (memory, sum(c.cache_bytes for c in costs), sum(c.operations for c in costs))
        assert found == pytest.approx(TOTALS[kind][test.name]), test.name


def test_the_slowest_part_is_the_limit() -> None:
    limits = Limits(read=10, cache=100, int8=1000, bf16=500, f32=250)
    assert limits.seconds(Cost(100, 0, 100, "int8")) == 10
    assert limits.seconds(Cost(100, 1400, 100, "int8")) == 15
    assert limits.seconds(Cost(100, 0, 5000, "f32")) == 20
    assert limits.parts(Cost(100, 0, 5000, "bf16")) == {"memory": 10, "cache": 1, "compute": 10}
