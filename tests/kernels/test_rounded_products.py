"""Products that read rounded rows through experts, and products that round what they write."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.experts.products import expert_down, expert_gate_up
from q35c.codegen.cpu.kernels.experts.routing import group_by_expert
from q35c.codegen.cpu.kernels.linear.linear import linear
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows
from q35c.formats import registry
from tests.kernels.harness import (
    EACH_ISA,
    ISA,
    RoundedRows,
    assert_close,
    build_kernels,
    guard,
    pack_formatted,
    pack_rows,
    pack_swiglu,
    stored,
)
from tests.kernels.row_formats import Bf16Rows, Int8Rows, Rows

# Experts, inner, hidden, experts of a token, weight.
BF16_EXPERTS = (6, 17, 33, 3, "bf16")
INT8_EXPERTS = ((3, 17, 33, 2, "i4g32"), (8, 64, 128, 3, "i8g64"), (6, 40, 96, 2, "i4g64"))
ROUNDING_EXPERTS = ((5, 64, 96, 2, "i8g64"), (9, 192, 64, 3, "i4g64"), (4, 256, 33, 2, "i5g128"))
Pack = Callable[[np.ndarray], np.ndarray]


def check_experts(
    shape: tuple, isa: Isa, rows: Rows, pack_up: Pack, pack_down: Pack, keep: Pack, limit: float
) -> None:
    """Compare both products of some experts with float64 on the values that are stored."""
    experts, inner, hidden, top_k, dtype = shape
    row_format = "bf16" if dtype == "bf16" else "f32"
    kernels = build_kernels(
        {
            "group": group_by_expert(experts, top_k),
            "up": expert_gate_up(experts, inner, hidden, top_k, dtype, isa, row_format),
            "down": expert_down(experts, hidden, inner, top_k, dtype, isa, row_format),
            **rows.function(hidden),
            **rows.function(inner, top_k),
        },
        isa,
    )
    rng = np.random.default_rng(experts)
    weights = rng.normal(size=(experts, 2 * inner, hidden)).astype(np.float32)
    down = rng.normal(size=(experts, hidden, inner)).astype(np.float32)
    w_up, w_down = pack_up(weights), pack_down(down)
    weights, down = (keep(w).astype(np.float64) for w in (weights, down))
    for tokens in (1, 3, 20, 50):
        ids = np.argsort(rng.random((tokens, experts)))[:, :top_k].astype(np.int32)
        groups = [guard(np.zeros(n, np.int32)) for n in (tokens * top_k, experts, experts + 1, 1)]
        kernels.call("group", guard(ids), *groups, tokens)
        x = guard(rng.normal(size=(tokens, hidden)).astype(np.float32))
        x = rows.store(kernels, x, hidden)
        y1 = guard(np.zeros((tokens * top_k, inner), np.float32), poison=True)
        kernels.call("up", w_up, x, *groups, y1, tokens, x.shape[1], threads=2)
        wide = rows.values(x, hidden).repeat(top_k, axis=0)
        product = np.einsum("pnh,ph->pn", weights[ids.ravel()], wide)
        gate, up = product[:, :inner], product[:, inner:]
        assert_close(y1, gate / (1 + np.exp(-gate)) * up, 10 * limit)
        words = rows.store(kernels, y1, inner, threads=2, pairs=top_k)
        y2 = guard(np.zeros((tokens * top_k, hidden), np.float32), poison=True)
        kernels.call("down", w_down, words, *groups, y2, tokens, words.shape[1], threads=2)
        want = np.einsum("phi,pi->ph", down[ids.ravel()], rows.values(words, inner))
        assert_close(y2, want, limit)


@pytest.mark.parametrize("isa", EACH_ISA)
def test_experts_on_rows_of_bf16(isa: Isa) -> None:
    check_experts(
        BF16_EXPERTS,
        isa,
        Bf16Rows(isa),
        lambda w: guard(np.stack([pack_swiglu(*np.split(one, 2), "bf16") for one in w])),
        lambda w: guard(np.stack([pack_rows(one, "bf16") for one in w])),
        lambda w: stored(w, "bf16"),
        1e-12,
    )


@pytest.mark.parametrize("shape", INT8_EXPERTS, ids=str)
def test_experts_on_rows_of_int8(shape: tuple) -> None:
    dtype = shape[-1]
    check_experts(
        shape,
        ISA,
        Int8Rows(ISA, registry.integer_format(dtype).group),
        lambda w: pack_formatted(w, dtype, "experts_swiglu"),
        lambda w: pack_formatted(w, dtype, "experts"),
        lambda w: stored(w, dtype),
        1e-8,
    )


@pytest.mark.parametrize("dtype", ["i4g64", "i5g32", "i8g128"])
def test_swiglu_that_rounds(dtype: str) -> None:
    """Its bits are those of the product and of rounding one after the other."""
    inner, width, group = 384, 192, registry.integer_format(dtype).group
    rows = Int8Rows(ISA, group)
    kernels = build_kernels(
        {
            "plain": linear(2 * inner, width, dtype, "swiglu", ISA),
            "rounding": linear(2 * inner, width, dtype, "swiglu", ISA, group=group),
            **rows.function(width),
            "round": quantize_rows(inner, group, ISA),
        }
    )
    rng = np.random.default_rng(5)
    w = pack_formatted(rng.normal(size=(2 * inner, width)).astype(np.float32), dtype, "swiglu")
    for tokens in (1, 3, 8, 41):
        x = guard(rng.normal(size=(tokens, width)).astype(np.float32))
        x = rows.store(kernels, x, width, extra=16)
        y = guard(np.zeros((tokens, inner), np.float32), poison=True)
        kernels.call("plain", w, x, y, tokens, x.shape[1], inner)
        # Boundaries of more parts than groups cut some of them, some twice.
        for threads, divided in (
            (1, 1),
            (2, 2),
            (3, 3),
            (3, 5),
            (3, 16),
            (2, 13),
            (1, 24),
        ):
            rounded = RoundedRows(tokens, inner, group, kernels.isa)
            parts = (threads + inner // group) * tokens
            scratch = guard(np.zeros((parts, group), np.float32), poison=True)
            arrivals = guard(np.zeros(inner // group, np.int32))
            args = (w, x, rounded.words, scratch, arrivals, tokens)
            strides = (x.shape[1], rounded.words.shape[1])
            kernels.call("rounding", *args, *strides, threads=threads, parts=divided)
            rounded.check(kernels, y)
            assert not arrivals.any()


@pytest.mark.parametrize("shape", ROUNDING_EXPERTS, ids=str)
def test_experts_that_round(shape: tuple) -> None:
    """Their bits are those of the products and of rounding one after the other."""
    experts, inner, hidden, top_k, dtype = shape
    group = registry.integer_format(dtype).group
    rows = Int8Rows(ISA, group)
    kernels = build_kernels(
        {
            "group": group_by_expert(experts, top_k),
            "plain": expert_gate_up(experts, inner, hidden, top_k, dtype, ISA),
            "rounding": expert_gate_up(experts, inner, hidden, top_k, dtype, ISA, group=group),
            **rows.function(hidden),
            "round": quantize_rows(inner, group, ISA),
        }
    )
    rng = np.random.default_rng(experts)
    weights = rng.normal(size=(experts, 2 * inner, hidden)).astype(np.float32)
    w = pack_formatted(weights, dtype, "experts_swiglu")
    for tokens in (1, 3, 20, 60):
        ids = np.argsort(rng.random((tokens, experts)))[:, :top_k].astype(np.int32)
        if tokens == 60:
            ids[:] = (
                experts - 1
            )  # as `route` answers NaN: an expert gets more rows than there are tokens
        groups = [guard(np.zeros(n, np.int32)) for n in (tokens * top_k, experts, experts + 1, 1)]
        kernels.call("group", guard(ids), *groups, tokens)
        x = guard(rng.normal(size=(tokens, hidden)).astype(np.float32))
        x = rows.store(kernels, x, hidden)
        y = guard(np.zeros((tokens * top_k, inner), np.float32), poison=True)
        kernels.call("plain", w, x, *groups, y, tokens, x.shape[1], threads=2)
        # Boundaries of parts cut groups, some more than once.
        for threads, divided in ((1, 1), (2, 2), (3, 3), (3, 16), (2, 7), (3, 32)):
            rounded = RoundedRows(tokens * top_k, inner, group, kernels.isa)
            parts = tokens * (threads + top_k * inner // group)
            scratch = guard(np.zeros((parts, group), np.float32), poison=True)
            arrivals = guard(np.zeros(experts * inner // group, np.int32))
            args = (w, x, *groups, rounded.words, scratch, arrivals, tokens)
            strides = (x.shape[1], rounded.words.shape[1])
            kernels.call("rounding", *args, *strides, threads=threads, parts=divided)
            rounded.check(kernels, y)
            assert not arrivals.any()
            if tokens == 60:  # they do not fit a thread's own part of the scratch
                assert np.isnan(scratch[-threads * tokens :]).all()
