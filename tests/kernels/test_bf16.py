"""Rows rounded to bf16, and their products with bf16 weights, against float64 on the rounded values.

A product of two bf16 values is exact in f32, so only the sums round, once for each input.
"""

import numpy as np
import pytest
from harness import (
    EACH_ISA,
    assert_close,
    build_kernels,
    compile_only,
    guard,
    pack_rows,
    pack_swiglu,
    stored,
)

from q35c.codegen.cpu.isa.x86 import V4, V4_BF16
from q35c.codegen.cpu.kernels.experts.products import expert_down, expert_gate_up
from q35c.codegen.cpu.kernels.experts.routing import group_by_expert
from q35c.codegen.cpu.kernels.linear.linear import linear
from q35c.codegen.cpu.kernels.rows.round_bf16 import round_rows
from q35c.formats import bf16
from q35c.layouts.rows import bf16_row_words

SHAPES = ((1, 1), (31, 3), (47, 65), (98, 77), (256, 320))
WIDTHS = tuple(sorted({k for _, k in SHAPES} | {2, 15, 16, 127, 128, 129, 300}))
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 23, 67)
EPILOGUES = ("none", "residual", "swiglu")
EXPERTS = (6, 17, 33, 3)  # E, I, H, top_k


def name_of(shape, epilogue):
    return f"{epilogue}_{shape[0]}_{shape[1]}"


def rows_of(outputs, epilogue):
    return outputs * 2 if epilogue == "swiglu" else outputs


@pytest.fixture(scope="module", params=EACH_ISA)
def isa(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(isa):
    functions = {
        name_of(s, e): linear(rows_of(s[0], e), s[1], "bf16", e, isa, "bf16")
        for s in SHAPES
        for e in EPILOGUES
    }
    functions |= {f"round_{k}": round_rows(k, isa) for k in WIDTHS}
    experts, inner, hidden, top_k = EXPERTS
    functions |= {
        "group": group_by_expert(experts, top_k),
        "up": expert_gate_up(experts, inner, hidden, top_k, "bf16", isa, "bf16"),
        "down": expert_down(experts, hidden, inner, top_k, "bf16", isa, "bf16"),
        f"round_{hidden}": round_rows(hidden, isa),
        f"round_{inner}_pairs": round_rows(inner, isa, pairs=top_k),
    }
    return build_kernels(functions, isa)


def rounded(kernels, isa, x, width, threads=1, pairs=1):
    """Run `round_rows`; return the words [rows, words] of int32, what is not written poisoned."""
    words = guard(np.zeros((len(x), bf16_row_words(width, isa.has_bf16)), np.int32), poison=True)
    strides = (len(x) // pairs, x.shape[1], words.shape[1])
    name = f"round_{width}_pairs" if pairs > 1 else f"round_{width}"
    kernels.call(name, x, words, *strides, threads=threads)
    return words


def values(words, width, isa):
    """Return the f32 values that rounded rows stand for."""
    words = np.array(words)
    if not isa.has_bf16:
        return words.view(np.float32)[:, :width]
    halves = words.view(np.uint16)
    assert (halves[:, width : width + width % 2] == 0).all(), "an odd row ends in half a pair"
    return (halves[:, :width].astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_rounded_to_the_nearest(kernels, isa, width):
    rng = np.random.default_rng(width)
    for tokens in (1, 2, 7):
        x = rng.normal(size=(tokens, width + 3)) * 10.0 ** rng.integers(-30, 30, (tokens, 1))
        x = guard(x.astype(np.float32))
        x.view(np.uint32)[0, 0] = 0x3F808000  # a tie: down to even
        if width > 2:
            x.view(np.uint32)[0, 1:3] = 0x3F818000, 0x7F7FFFFF  # up to even; up to infinity
        first = rounded(kernels, isa, x, width)
        got = values(first, width, isa)
        want = bf16.round_bf16(np.array(x[:, :width]))
        assert got.tobytes() == want.tobytes()
        for threads in (2, 3):
            again = rounded(kernels, isa, x, width, threads)
            assert again.tobytes() == first.tobytes()
        used = width if not isa.has_bf16 else -(-width // 2)
        assert (first[:, used:] == -1).all(), "words past the row changed"


def test_what_is_no_number_stays_so(kernels, isa):
    patterns = [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF80FFFF, 0x7F800000, 0xFF800000]  # fmt: skip
    x = guard(np.tile(np.array(patterns, np.uint32).view(np.float32), (1, 2)))
    got = values(rounded(kernels, isa, x, 16), 16, isa)[0]
    assert np.isnan(got[[0, 1, 2, 3, 4, 5]]).all()
    assert got[6] == np.inf and got[7] == -np.inf


class Case:
    """Random operands of one linear and its float64 result on the values that are stored."""

    def __init__(self, kernels, isa, shape, epilogue, tokens):
        self.outputs, self.width = shape
        self.name, self.epilogue = name_of(shape, epilogue), epilogue
        rng = np.random.default_rng(self.outputs * 1000 + tokens)
        x = guard(rng.normal(size=(tokens, self.width)).astype(np.float32))
        self.x = rounded(kernels, isa, x, self.width)
        weight = rng.normal(size=(rows_of(self.outputs, epilogue), self.width)).astype(np.float32)
        if epilogue == "swiglu":
            packed = pack_swiglu(weight[: self.outputs], weight[self.outputs :], "bf16")
        else:
            packed = pack_rows(weight, "bf16")
        self.w = guard(packed)
        self.r = guard(rng.normal(size=(tokens, self.outputs + 5)).astype(np.float32))
        exact = values(self.x, self.width, isa).astype(np.float64)
        self.expected = self._reference(exact, stored(weight, "bf16"))

    def _reference(self, x, weight):
        product = x @ weight.T
        if self.epilogue == "residual":
            return product + self.r[:, : self.outputs]
        if self.epilogue == "swiglu":
            gate, up = product[:, : self.outputs], product[:, self.outputs :]
            return gate / (1 + np.exp(-gate)) * up
        return product

    def run(self, kernels, threads=1, rows=slice(None)):
        x, ld_y = guard(self.x[rows]), self.outputs + 3
        y = guard(np.zeros((len(x), ld_y), np.float32), poison=True)
        residual = [guard(self.r[rows])] if self.epilogue == "residual" else []
        strides = (len(x), x.shape[1], ld_y, *(r.shape[1] for r in residual))
        kernels.call(self.name, self.w, x, y, *residual, *strides, threads=threads)
        beyond = np.ascontiguousarray(y[:, self.outputs :]).view(np.uint32)
        assert (beyond == 0xFFFFFFFF).all(), "columns past the row changed"
        return np.array(y[:, : self.outputs])


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(kernels, isa, shape, epilogue):
    for tokens in TOKENS:
        case = Case(kernels, isa, shape, epilogue, tokens)
        results = [case.run(kernels, threads) for threads in (1, 2, 3)]
        assert_close(results[0], case.expected, 1e-12, note=f"{tokens} tokens")
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_row_does_not_depend_on_its_neighbours(kernels, isa, epilogue):
    case = Case(kernels, isa, (256, 320), epilogue, 60)
    together = case.run(kernels)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(20, 33), slice(59, 60)):
        assert case.run(kernels, rows=rows).tobytes() == together[rows].tobytes(), rows


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(kernels, isa, value):
    case = Case(kernels, isa, (256, 320), "none", 20)
    x = np.random.default_rng(0).normal(size=(20, 320)).astype(np.float32)
    x[7, 100] = value
    case.x = rounded(kernels, isa, guard(x), 320)
    y = case.run(kernels)
    assert not np.isfinite(y[7]).any()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


def test_experts(kernels, isa):
    experts, inner, hidden, top_k = EXPERTS
    rng = np.random.default_rng(experts)
    gate, up = rng.normal(size=(2, experts, inner, hidden)).astype(np.float32)
    down = rng.normal(size=(experts, hidden, inner)).astype(np.float32)
    w_up = guard(np.stack([pack_swiglu(g, u, "bf16") for g, u in zip(gate, up, strict=True)]))
    w_down = guard(np.stack([pack_rows(d, "bf16") for d in down]))
    gate, up, down = (stored(w, "bf16") for w in (gate, up, down))
    for tokens in (1, 3, 20, 50):
        ids = np.argsort(rng.random((tokens, experts)))[:, :top_k].astype(np.int32)
        groups = [guard(np.zeros(n, np.int32)) for n in (tokens * top_k, experts, experts + 1, 1)]
        kernels.call("group", guard(ids), *groups, tokens)
        x = guard(rng.normal(size=(tokens, hidden)).astype(np.float32))
        x = rounded(kernels, isa, x, hidden)
        y1 = guard(np.zeros((tokens * top_k, inner), np.float32), poison=True)
        kernels.call("up", w_up, x, *groups, y1, tokens, x.shape[1], threads=2)
        wide = values(x, hidden, isa).astype(np.float64).repeat(top_k, axis=0)
        gated, straight = (np.einsum("pih,ph->pi", w[ids.ravel()], wide) for w in (gate, up))
        assert_close(y1, gated / (1 + np.exp(-gated)) * straight, 1e-11)
        words = rounded(kernels, isa, y1, inner, threads=2, pairs=top_k)
        y2 = guard(np.zeros((tokens * top_k, hidden), np.float32), poison=True)
        kernels.call("down", w_down, words, *groups, y2, tokens, words.shape[1], threads=2)
        exact = values(words, inner, isa).astype(np.float64)
        assert_close(y2, np.einsum("phi,pi->ph", down[ids.ravel()], exact), 1e-12)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_pairs_are_multiplied_where_there_is_an_instruction(epilogue):
    pairs = linear(200, 77, "bf16", epilogue, V4_BF16, "bf16")
    assert "vdpbf16ps" in compile_only(pairs, V4_BF16, "zmm")
    assert "vfmadd231ps" in compile_only(linear(200, 77, "bf16", epilogue, V4, "bf16"), V4, "zmm")
    exact = compile_only(linear(200, 77, "bf16", epilogue, V4_BF16), V4_BF16, "zmm")
    assert "vdpbf16ps" not in exact, "gates read f32 rows"
    compile_only(round_rows(77, V4_BF16), V4_BF16, "zmm")
