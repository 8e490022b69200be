"""The five mixture-of-experts kernels, alone and together, against float64."""

import numpy as np
import pytest

from q35c.codegen.cpu.isa.x86 import V4
from q35c.codegen.cpu.kernels.experts.products import expert_down, expert_gate_up
from q35c.codegen.cpu.kernels.experts.routing import combine, group_by_expert, route
from tests.kernels.harness import (
    EACH_ISA,
    assert_close,
    build_kernels,
    compile_only,
    guard,
    pack_rows,
    pack_swiglu,
    stored,
)

# Experts and those of a token: one, all of them, fewer than a vector, a whole one, some and a rest.
ROUTES = ((1, 1), (7, 3), (8, 8), (17, 2), (256, 8), (512, 10))
EXPERTS = ((6, 17, 33, 3), (9, 40, 70, 4), (16, 64, 128, 8))  # E, I, H, top_k
COMBINES = ((1, 1), (16, 4), (33, 2), (65, 1), (200, 3), (512, 10))
# With a shared expert and without; the others have either.
BOTH = ((17, 2), (256, 8), (33, 2), (200, 3))
TOKENS = (1, 2, 3, 5, 8, 21, 40)
DTYPES = ("f32", "bf16")


def with_shared(shapes):
    """Return shapes, and whether there is a shared expert."""
    return [
        (shape, has_shared)
        for place, shape in enumerate(shapes)
        for has_shared in ((False, True) if shape in BOTH else (place % 2 == 0,))
    ]


@pytest.fixture(scope="module", params=EACH_ISA)
def kernels(request):
    isa = request.param
    functions = {}
    for (experts, top_k), has_shared in with_shared(ROUTES):
        name = f"route_{experts}_{top_k}_{has_shared}"
        functions[name] = route(experts, top_k, isa, has_shared)
    for experts, top_k in {*ROUTES, *((e, k) for e, _, _, k in EXPERTS)}:
        functions[f"group_{experts}_{top_k}"] = group_by_expert(experts, top_k)
    for shape in EXPERTS:
        experts, inner, hidden, top_k = shape
        for dtype in DTYPES:
            name = f"{dtype}_{'_'.join(map(str, shape))}"
            functions[f"up_{name}"] = expert_gate_up(experts, inner, hidden, top_k, dtype, isa)
            functions[f"down_{name}"] = expert_down(experts, hidden, inner, top_k, dtype, isa)
    for (hidden, top_k), has_shared in with_shared(COMBINES):
        name = f"combine_{hidden}_{top_k}_{has_shared}"
        functions[name] = combine(hidden, top_k, isa, has_shared)
    return build_kernels(functions, isa)


def poisoned(shape, dtype=np.float32):
    return guard(np.zeros(shape, dtype), poison=True)


def top_experts(logits, top_k):
    """Ids in falling order of logit, ties by lowest id, and their renormalised softmax."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(logits.astype(np.float64), ids, axis=1)
    weights = np.exp(chosen - chosen[:, :1])
    return ids, weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("shape", "has_shared"), with_shared(ROUTES), ids=str)
@pytest.mark.parametrize("with_ties", [False, True])
def test_route(kernels, shape, with_ties, has_shared):
    for tokens in TOKENS:
        check_route(kernels, shape, tokens, with_ties, has_shared)


def check_route(kernels, shape, tokens, with_ties, has_shared):
    experts, top_k = shape
    rng = np.random.default_rng(experts * 100 + tokens)
    ld = experts + tokens % 4
    logits = rng.normal(0, 3, (tokens, ld)).astype(np.float32)
    logits = guard(np.round(logits / 2) * 2 if with_ties else logits)
    ids, weights = top_experts(logits[:, :experts], top_k)
    gate = guard(rng.normal(size=(tokens, 1 + tokens % 2)).astype(np.float32))
    if has_shared:
        ids = np.concatenate([ids, np.full((tokens, 1), experts)], 1)
        weights = np.concatenate([weights, 1 / (1 + np.exp(-gate[:, :1].astype(np.float64)))], 1)
    for threads in (1, 2, 3):
        got_ids, got = poisoned(ids.shape, np.int32), poisoned(ids.shape)
        kernels.call(
            f"route_{experts}_{top_k}_{has_shared}", logits, gate, got_ids, got,
            tokens, ld, gate.shape[1], threads=threads,
        )  # fmt: skip
        np.testing.assert_array_equal(got_ids, ids)
        assert_close(got, weights, note=f"{tokens} tokens")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_route_gives_valid_ids_for_invalid_logits(kernels, value):
    logits = np.zeros((3, 256), np.float32)
    logits[0], logits[1, 5], logits[2, 60:] = value, value, value
    ids, weights = poisoned((3, 8), np.int32), poisoned((3, 8))
    logits = guard(logits)
    kernels.call("route_256_8_False", logits, logits, ids, weights, 3, 256, 256)
    assert ((ids >= 0) & (ids < 256)).all()


def group(kernels, ids, experts, threads=1):
    """Run group_by_expert; return ORDER, ACTIVE, OFFSETS, COUNT."""
    tokens, top_k = ids.shape
    arrays = [poisoned(size, np.int32) for size in (tokens * top_k, experts, experts + 1, 1)]
    name = f"group_{experts}_{top_k}"
    kernels.call(name, guard(ids.astype(np.int32)), *arrays, tokens, threads=threads)
    return arrays


def random_ids(rng, tokens, experts, top_k, skew=0.0):
    """Distinct experts for each token; `skew` pulls them to the first ones."""
    score = rng.random((tokens, experts)) - skew * (np.arange(experts) < top_k)
    return np.argsort(score, axis=1)[:, :top_k]


@pytest.mark.parametrize("shape", ROUTES, ids=str)
def test_group_by_expert(kernels, shape):
    for tokens in TOKENS:
        check_groups(kernels, shape, tokens)


def check_groups(kernels, shape, tokens):
    experts, top_k = shape
    ids = random_ids(np.random.default_rng(tokens), tokens, experts, top_k)
    order, active, offsets, count = group(kernels, ids, experts, threads=2)
    used, pairs = np.unique(ids, return_counts=True)
    assert count[0] == len(used)
    np.testing.assert_array_equal(active[: len(used)], used)
    np.testing.assert_array_equal(offsets[: len(used) + 1], np.cumsum([0, *pairs]))
    np.testing.assert_array_equal(order, np.argsort(ids.ravel(), kind="stable"))
    assert (active[len(used) :] == -1).all() and (offsets[len(used) + 1 :] == -1).all()


@pytest.mark.parametrize("skew", [0.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EXPERTS, ids=str)
def test_experts(kernels, shape, dtype, skew):
    experts, inner, hidden, top_k = shape
    name = f"{dtype}_{'_'.join(map(str, shape))}"
    rng = np.random.default_rng(experts)
    gate, up = rng.normal(size=(2, experts, inner, hidden)).astype(np.float32) / hidden**0.5
    down = rng.normal(size=(experts, hidden, inner)).astype(np.float32)
    w_up = guard(np.stack([pack_swiglu(g, u, dtype) for g, u in zip(gate, up, strict=True)]))
    w_down = guard(np.stack([pack_rows(d, dtype) for d in down]))
    gate, up, down = (stored(w, dtype) for w in (gate, up, down))
    for tokens in TOKENS:
        ids = random_ids(rng, tokens, experts, top_k, skew)
        groups, pairs, ld_x = group(kernels, ids, experts), tokens * top_k, hidden + tokens % 3
        x = guard(rng.normal(size=(tokens, ld_x)).astype(np.float32))
        wide, flat = x[:, :hidden].astype(np.float64).repeat(top_k, axis=0), ids.ravel()
        gated, linear = (np.einsum("pih,ph->pi", w[flat], wide) for w in (gate, up))
        expected = gated / (1 + np.exp(-gated)) * linear
        outputs = []
        for threads in (1, 2, 3):
            y1, y2 = poisoned((pairs, inner)), poisoned((pairs, hidden))
            kernels.call(f"up_{name}", w_up, x, *groups, y1, tokens, ld_x, threads=threads)
            kernels.call(f"down_{name}", w_down, y1, *groups, y2, tokens, inner, threads=threads)
            outputs.append(y1.tobytes() + y2.tobytes())
        assert_close(y1, expected, note=f"gate_up, {tokens} tokens")
        product = np.einsum("phi,pi->ph", down[flat], y1.astype(np.float64))
        assert_close(y2, product, note=f"down, {tokens} tokens")
        assert outputs[0] == outputs[1] == outputs[2], f"{tokens} tokens"


@pytest.mark.parametrize(("shape", "has_shared"), with_shared(COMBINES), ids=str)
def test_combine(kernels, shape, has_shared):
    for tokens in TOKENS:
        check_combine(kernels, shape, tokens, has_shared)


def check_combine(kernels, shape, tokens, has_shared):
    hidden, top_k = shape
    rng = np.random.default_rng(hidden + tokens)
    strides = [hidden + 3, 1 + tokens % 2, hidden, hidden + tokens % 3]  # shared, gate, residual, y
    arrays = [rng.normal(size=(tokens, ld)).astype(np.float32) for ld in strides[:3]]
    shared, gate, residual = map(guard, arrays)
    y2 = guard(rng.normal(size=(tokens * top_k, hidden)).astype(np.float32))
    weights = guard(rng.random((tokens, top_k)).astype(np.float32))
    routed = np.einsum("ts,tsh->th", weights.astype(np.float64), y2.reshape(tokens, top_k, hidden))
    sigmoid = 1 / (1 + np.exp(-gate[:, :1].astype(np.float64)))
    expected = residual + routed + has_shared * sigmoid * shared[:, :hidden]
    outputs = []
    for threads in (1, 2, 3):
        y = poisoned((tokens, strides[3]))
        arguments = (y2, weights, shared, gate, residual, y, tokens, *strides)
        kernels.call(f"combine_{hidden}_{top_k}_{has_shared}", *arguments, threads=threads)
        assert np.isnan(y[:, hidden:]).all(), "columns past the row changed"
        outputs.append(y.tobytes())
    assert_close(y[:, :hidden], expected, note=f"{tokens} tokens")
    assert outputs[0] == outputs[1] == outputs[2]
    in_place = guard(residual)
    arguments = (y2, weights, shared, gate, in_place, in_place, tokens, *strides[:3], strides[2])
    kernels.call(f"combine_{hidden}_{top_k}_{has_shared}", *arguments, threads=2)
    np.testing.assert_array_equal(in_place, y[:, :hidden])


def test_moe_avx512_compiles():
    for dtype in DTYPES:
        compile_only(expert_gate_up(8, 48, 70, 2, dtype, V4), V4, "zmm")
        compile_only(expert_down(8, 70, 48, 2, dtype, V4), V4, "zmm")
    compile_only(route(60, 4, V4), V4, "zmm")
    compile_only(combine(200, 4, V4), V4, "zmm")
