"""Rounded rows and products with integer weights against float64, on every instruction set that runs here."""

import numpy as np
import pytest
from harness import ISA, RoundedRows, assert_close, build_kernels, guard, nmse

from q35c.codegen.cpu.isa.x86 import ISAS
from q35c.codegen.cpu.kernels.experts.products import expert_down, expert_gate_up
from q35c.codegen.cpu.kernels.experts.routing import group_by_expert
from q35c.codegen.cpu.kernels.linear.embedding import embedding
from q35c.codegen.cpu.kernels.linear.linear import linear
from q35c.codegen.cpu.kernels.rows.round_int8 import quantize_rows, row_layout
from q35c.codegen.pack import PackedWeight
from q35c.cpuinfo import processor_flags
from q35c.formats import integer, registry

EVERY_ISA = [  # each has its own byte product
    pytest.param(
        isa,
        id=name,
        marks=pytest.mark.skipif(
            not processor_flags().issuperset(isa.cpu_features), reason=f"needs {name}"
        ),
    )
    for name, isa in ISAS.items()
]
# Outputs, inputs, format, epilogue.
LINEARS = (
    (1, 1, "i4g32", "none"), (31, 3, "i8g32", "residual"), (33, 64, "i4g64", "none"),
    (47, 65, "i8g64", "none"), (98, 77, "i4g32", "residual"), (64, 128, "i4g128", "swiglu"),
    (100, 200, "i8g128", "swiglu"), (256, 320, "i4g64", "residual"), (256, 320, "i8g64", "none"),
    (130, 1024, "i4g128", "none"), (40, 1000, "i8g32", "none"), (17, 96, "i4g32", "swiglu"),
    (70, 150, "i5g64", "residual"), (96, 1056, "i5g128", "none"), (33, 32, "i5g32", "swiglu"),
)  # fmt: skip
TOKENS = (1, 2, 3, 5, 8, 9, 15, 16, 23, 50, 71)


def name_of(case):
    return "_".join(map(str, case))


def rows_of(outputs, epilogue):
    return outputs * 2 if epilogue == "swiglu" else outputs


@pytest.fixture(scope="module", params=EVERY_ISA)
def kernels(request):
    isa = request.param
    functions = {
        f"linear_{name_of(c)}": linear(rows_of(c[0], c[3]), c[1], c[2], c[3], isa) for c in LINEARS
    }
    rounds = {(k, registry.integer_format(dtype).group) for _, k, dtype, _ in LINEARS}
    functions |= {f"round_{k}_{g}": quantize_rows(k, g, isa) for k, g in rounds}
    return build_kernels(functions, isa)


def pack(weight, dtype, layout="linear"):
    """Pack [N, K], or gate over up, or experts."""
    parts = np.split(weight, 2) if layout == "swiglu" else [weight]
    names = tuple(f"s{i}" for i in range(len(parts)))
    packed = PackedWeight("w", layout, dtype, names, tuple(p.shape for p in parts))
    chunks = packed.chunks(lambda name, start, stop: parts[int(name[1:])][start:stop])
    return guard(np.concatenate([chunk.reshape(-1) for chunk in chunks]))


def round_rows(kernels, x, width, group, threads=1, extra_words=0):
    """Run `quantize_rows`; return the words, rows [T, words] of int32."""
    layout = row_layout(width, group, kernels.isa)
    words = guard(np.zeros((len(x), layout.words + extra_words), np.int32), poison=True)
    strides = (len(x), x.shape[1], words.shape[1])
    kernels.call(f"round_{width}_{group}", x, words, *strides, threads=threads)
    return words


def row_values(words, width, group, isa):
    """Return the float64 values that rounded rows stand for, and check their sums."""
    words = np.array(words)
    layout = row_layout(width, group, isa)
    codes = words[:, : layout.scales].view(np.int8).astype(np.float64)
    scales = words[:, layout.scales : layout.sums].copy().view(np.float32).astype(np.float64)
    sums = words[:, layout.sums : layout.sums + layout.groups]
    assert (codes[:, width:] == 0).all()
    grouped = codes.reshape(len(words), layout.groups, group)
    np.testing.assert_array_equal(sums, -32 * grouped.sum(-1))
    if not isa.has_vnni:
        halves = codes.reshape(len(words), -1, 8, 2, 2).sum((2, 4)).astype(np.int64)
        starts = words[:, layout.starts : layout.used_words].copy().view(np.int16)
        np.testing.assert_array_equal(
            starts, (-32 * halves).astype(np.int16).reshape(len(words), -1)
        )
    return (grouped * scales[..., None]).reshape(len(words), -1)[:, :width]


@pytest.mark.parametrize("case", LINEARS, ids=name_of)
def test_rows_are_rounded_to_the_nearest_code(kernels, case):
    _, width, dtype, _ = case
    group = registry.integer_format(dtype).group
    rng = np.random.default_rng(width)
    for tokens in (1, 4, 9):
        x = rng.normal(size=(tokens, width + 3)).astype(np.float32) * np.float32(10.0) ** rng.integers(-8, 8, (tokens, 1))  # fmt: skip
        x[0, : width // 2] = 0  # a group of zeros must not divide by zero
        x = guard(x.astype(np.float32))
        first = round_rows(kernels, x, width, group)
        got = row_values(first, width, group, kernels.isa)
        want = registry.round_rows(x[:, :width].astype(np.float64), f"q8g{group}")
        step = np.abs(integer.split_groups(x[:, :width], group)).max(-1) / 127
        wide = np.repeat(step, group, -1)[:, :width]
        assert (np.abs(got - x[:, :width]) <= 0.5001 * wide).all()
        assert nmse(got, want) <= 1e-5  # a tie may fall either way
        second = round_rows(kernels, x, width, group, threads=2)
        used = row_layout(width, group, kernels.isa).used_words
        assert np.array_equal(first[:, :used], second[:, :used])


class Case:
    """Random operands of one linear and its float64 result on the values that are stored."""

    def __init__(self, kernels, case, tokens):
        self.outputs, self.width, self.dtype, self.epilogue = case
        self.name = f"linear_{name_of(case)}"
        rng = np.random.default_rng(self.outputs * 1000 + tokens)
        group = registry.integer_format(self.dtype).group
        x = guard(rng.normal(size=(tokens, self.width)).astype(np.float32))
        self.x = round_rows(kernels, x, self.width, group, extra_words=tokens % 3 * 16)
        values = row_values(self.x, self.width, group, kernels.isa)
        weight = rng.normal(size=(rows_of(self.outputs, self.epilogue), self.width))
        weight = weight.astype(np.float32)
        self.w = pack(weight, self.dtype, "swiglu" if self.epilogue == "swiglu" else "linear")
        self.r = guard(rng.normal(size=(tokens, self.outputs + 5)).astype(np.float32))
        self.expected = self._reference(values, registry.stored(weight, self.dtype))

    def _reference(self, x, weight):
        product = x @ weight.astype(np.float64).T
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


@pytest.mark.parametrize("case", LINEARS, ids=name_of)
def test_linear(kernels, case):
    for tokens in TOKENS:
        made = Case(kernels, case, tokens)
        results = [made.run(kernels, threads) for threads in (1, 2, 3)]
        assert_close(results[0], made.expected, note=f"{tokens} tokens")
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def largest_levels(form):
    """Return 32 levels of largest magnitude, the least level among them, so that they have the scale 1."""
    if form.bits == 8:
        return np.array([form.levels[0]] + [form.levels[-1]] * 31, np.float32)
    half = [form.levels[0]]
    while len(half) < 16:
        rest = integer.LARGEST_SUM - sum(map(abs, half))
        half.append(max(level for level in form.levels if level <= rest))
    assert sum(map(abs, half)) >= integer.LARGEST_SUM - 2
    return np.repeat(np.reshape(half, (8, 1, 2)), 2, 1).reshape(-1).astype(np.float32)


@pytest.mark.parametrize("case", [LINEARS[2], *LINEARS[8:10], LINEARS[-2]], ids=name_of)
def test_the_largest_products_do_not_overflow(kernels, case):
    """Every activation is 127 or -127, weights are as far from 0 as a format lets them, and no two products cancel."""
    outputs, width, dtype, _ = case
    form = registry.integer_format(dtype)
    tokens = 15  # two tall tiles of AVX2, which share a panel, and one that unpacks for itself
    made = Case(kernels, case, tokens)
    # 31/16 is the largest that a scale's mantissa holds: as an integer, 3,968.
    weight = np.tile(largest_levels(form) * np.float32(31 / 16), (outputs, width // 32))
    made.w = pack(weight, dtype)
    for sign in (1, -1):
        x = guard(np.tile(np.sign(weight[0]) * np.float32(sign), (tokens, 1)))
        made.x = round_rows(kernels, x, width, form.group)
        stored = registry.stored(weight, dtype).astype(np.float64)
        np.testing.assert_allclose(stored, weight)
        assert_close(made.run(kernels), x.astype(np.float64) @ stored.T)


@pytest.mark.parametrize("case", [*LINEARS[7:9], LINEARS[-2]], ids=name_of)
def test_a_row_does_not_depend_on_its_neighbours(kernels, case):
    made = Case(kernels, case, 70)
    together = made.run(kernels)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(20, 33), slice(59, 60)):
        assert made.run(kernels, rows=rows).tobytes() == together[rows].tobytes(), rows


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row(kernels, value):
    outputs, width, dtype, _ = case = LINEARS[8]
    made = Case(kernels, case, 9)
    x = np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)
    x[4, 100] = value
    made.x = round_rows(kernels, guard(x), width, registry.integer_format(dtype).group)
    y = made.run(kernels)
    assert not np.isfinite(y[4]).any()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()
    assert y.shape == (9, outputs)


@pytest.mark.parametrize("dtype", ["i4g64", "i5g32", "i8g128"])
def test_swiglu_that_rounds(dtype):
    """Its bits are those of the product and of rounding one after the other."""
    inner, width, group = 384, 192, registry.integer_format(dtype).group
    kernels = build_kernels(
        {
            "plain": linear(2 * inner, width, dtype, "swiglu", ISA),
            "rounding": linear(2 * inner, width, dtype, "swiglu", ISA, group=group),
            f"round_{width}_{group}": quantize_rows(width, group, ISA),
            "round": quantize_rows(inner, group, ISA),
        }
    )
    rng = np.random.default_rng(5)
    w = pack(rng.normal(size=(2 * inner, width)).astype(np.float32), dtype, "swiglu")
    for tokens in (1, 3, 8, 41):
        x = guard(rng.normal(size=(tokens, width)).astype(np.float32))
        x = round_rows(kernels, x, width, group, extra_words=16)
        y = guard(np.zeros((tokens, inner), np.float32), poison=True)
        kernels.call("plain", w, x, y, tokens, x.shape[1], inner)
        # Boundaries of more parts than groups cut some of them, some twice.
        for threads, divided in (
            (1, 1),
            (2, 2),
            (3, 3),
            (5, 5),
            (16, 16),
            (2, 3),
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


EXPERTS = ((3, 17, 33, 2, "i4g32"), (8, 64, 128, 3, "i8g64"), (6, 40, 96, 2, "i4g64"))
ROUNDING_EXPERTS = ((5, 64, 96, 2, "i8g64"), (9, 192, 64, 3, "i4g64"), (4, 256, 33, 2, "i5g128"))


@pytest.mark.parametrize("shape", EXPERTS, ids=str)
def test_experts(shape):
    experts, inner, hidden, top_k, dtype = shape
    group = registry.integer_format(dtype).group
    kernels = build_kernels(
        {
            "group": group_by_expert(experts, top_k),
            "up": expert_gate_up(experts, inner, hidden, top_k, dtype, ISA),
            "down": expert_down(experts, hidden, inner, top_k, dtype, ISA),
            f"round_{hidden}_{group}": quantize_rows(hidden, group, ISA),
            f"round_{inner}_{group}": quantize_rows(inner, group, ISA, pairs=top_k),
        }
    )
    rng = np.random.default_rng(experts)
    weights = rng.normal(size=(experts, 2 * inner, hidden)).astype(np.float32)
    down = rng.normal(size=(experts, hidden, inner)).astype(np.float32)
    w_up, w_down = pack(weights, dtype, "experts_swiglu"), pack(down, dtype, "experts")
    for tokens in (1, 3, 20):
        ids = np.argsort(rng.random((tokens, experts)))[:, :top_k].astype(np.int32)
        groups = [guard(np.zeros(n, np.int32)) for n in (tokens * top_k, experts, experts + 1, 1)]
        kernels.call("group", guard(ids), *groups, tokens)
        x = guard(rng.normal(size=(tokens, hidden)).astype(np.float32))
        x = round_rows(kernels, x, hidden, group)
        values = row_values(x, hidden, group, kernels.isa)
        y1 = guard(np.zeros((tokens * top_k, inner), np.float32), poison=True)
        kernels.call("up", w_up, x, *groups, y1, tokens, x.shape[1], threads=2)
        product = np.einsum("tk,tsnk->tsn", values, registry.stored(weights, dtype)[ids].astype(np.float64))  # fmt: skip
        gate, up = product[..., :inner], product[..., inner:]
        assert_close(y1, (gate / (1 + np.exp(-gate)) * up).reshape(-1, inner))
        words = guard(
            np.zeros((tokens * top_k, row_layout(inner, group, kernels.isa).words), np.int32)
        )
        strides = (tokens, inner, words.shape[1])
        kernels.call(f"round_{inner}_{group}", y1, words, *strides, threads=2)
        y2 = guard(np.zeros((tokens * top_k, hidden), np.float32), poison=True)
        kernels.call("down", w_down, words, *groups, y2, tokens, words.shape[1], threads=2)
        rounded = row_values(words, inner, group, kernels.isa).reshape(tokens, top_k, inner)
        want = np.einsum("tsk,tsnk->tsn", rounded, registry.stored(down, dtype)[ids].astype(np.float64))  # fmt: skip
        assert_close(y2, want.reshape(-1, hidden))


@pytest.mark.parametrize("shape", ROUNDING_EXPERTS, ids=str)
def test_experts_that_round(shape):
    """Their bits are those of the products and of rounding one after the other."""
    experts, inner, hidden, top_k, dtype = shape
    group = registry.integer_format(dtype).group
    kernels = build_kernels(
        {
            "group": group_by_expert(experts, top_k),
            "plain": expert_gate_up(experts, inner, hidden, top_k, dtype, ISA),
            "rounding": expert_gate_up(experts, inner, hidden, top_k, dtype, ISA, group=group),
            f"round_{hidden}_{group}": quantize_rows(hidden, group, ISA),
            "round": quantize_rows(inner, group, ISA),
        }
    )
    rng = np.random.default_rng(experts)
    weights = rng.normal(size=(experts, 2 * inner, hidden)).astype(np.float32)
    w = pack(weights, dtype, "experts_swiglu")
    for tokens in (1, 3, 20, 60):
        ids = np.argsort(rng.random((tokens, experts)))[:, :top_k].astype(np.int32)
        if tokens == 60:
            ids[:] = (
                experts - 1
            )  # as `route` answers NaN: an expert gets more rows than there are tokens
        groups = [guard(np.zeros(n, np.int32)) for n in (tokens * top_k, experts, experts + 1, 1)]
        kernels.call("group", guard(ids), *groups, tokens)
        x = guard(rng.normal(size=(tokens, hidden)).astype(np.float32))
        x = round_rows(kernels, x, hidden, group)
        y = guard(np.zeros((tokens * top_k, inner), np.float32), poison=True)
        kernels.call("plain", w, x, *groups, y, tokens, x.shape[1], threads=2)
        # Boundaries of parts cut groups, some more than once.
        for threads, divided in ((1, 1), (2, 2), (3, 3), (16, 16), (2, 7), (3, 32)):
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


@pytest.mark.parametrize("dtype", ["i4g32", "i4g128", "i5g32", "i5g64", "i8g64"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (100, 128), (97, 257), (64, 1024)], ids=str)
def test_embedding(shape, dtype):
    rows, width = shape
    kernels = build_kernels({"embedding": embedding(rows, width, dtype, ISA)})
    table = np.random.default_rng(rows).normal(size=shape).astype(np.float32)
    ids = guard(np.array([rows - 1, 0, rows // 2], np.int32))
    for threads in (1, 2):
        y = guard(np.zeros((3, width), np.float32), poison=True)
        kernels.call("embedding", pack(table, dtype), ids, y, 3, width, threads=threads)
        np.testing.assert_array_equal(y, registry.stored(table, dtype)[ids])
