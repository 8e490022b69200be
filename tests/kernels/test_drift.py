"""R13: 32,768 tokens through the delta rule in f32 stay as close to float64 as the first ones."""

from __future__ import annotations

import numpy as np
import pytest

from q35c.codegen.cpu.kernels.delta.tasks import gated_delta, gated_delta_scratch_bytes
from q35c.ir import reference
from tests.kernels.harness import ISA, Kernels, assert_close, build_kernels, guard

TOKENS, PART = 32_768, 1024
HEADS, DIM, EPS = 3, 32, 1e-6
# How fast each head forgets: hardly ever (a state that lives for the whole run), slowly, at once.
A_LOG = np.log([1e-6, 1e-2, 4.0]).astype(np.float32)
TAPS = (0.0, 1.0)  # the convolution leaves a token as it is: what follows is the recurrence alone
CHANNELS, WIDTH = 2 * DIM + HEADS * DIM, HEADS * DIM


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    shape = (1, HEADS, DIM, DIM, len(TAPS), EPS, 0, ISA)
    return build_kernels(
        {"steps": gated_delta(*shape, short_run=2**31), "scan": gated_delta(*shape)}
    )


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    widths = {"qkv": CHANNELS, "z": WIDTH, "b": HEADS, "a": HEADS}
    return {n: rng.normal(size=(TOKENS, width)).astype(np.float32) for n, width in widths.items()}


@pytest.fixture(scope="module")
def expected(rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return outputs and the last state in float64."""
    qkv, z, b, a = (part.astype(np.float64) for part in rows.values())
    q, k, v = np.split(reference.silu(qkv), [DIM, 2 * DIM], -1)
    decay = -np.exp(A_LOG.astype(np.float64)) * reference.softplus(a)
    out, state = reference.delta_rule(
        q[:, None], k[:, None], v.reshape(TOKENS, HEADS, DIM), decay, reference.sigmoid(b)
    )
    gate = z.reshape(TOKENS, HEADS, DIM)
    return reference.gated_rms_norm(out, np.ones(DIM), gate, EPS).reshape(TOKENS, -1), state


@pytest.mark.parametrize("form", ["steps", "scan"])
def test_long_runs_do_not_drift(kernels: Kernels, rows, expected, form: str) -> None:
    want, want_state = expected
    state = guard(np.zeros((HEADS, DIM, DIM), np.float32))
    a_log, dt_bias = guard(A_LOG), guard(np.zeros(HEADS, np.float32))
    norm_w, slots = guard(np.ones(DIM, np.float32)), guard(np.zeros(1, np.int64))
    size = gated_delta_scratch_bytes(1, HEADS, DIM, DIM, ISA)
    scratch, unused = guard(np.zeros(size // 4, np.float32)), guard(np.zeros(1, np.int32))
    conv_w = guard(np.repeat(np.float32(TAPS)[:, None], CHANNELS, 1))
    conv_state = guard(np.zeros((1, CHANNELS), np.float32))
    for first in range(0, TOKENS, PART):
        part = [guard(array[first : first + PART]) for array in rows.values()]
        y = guard(np.zeros((PART, WIDTH), np.float32), poison=True)
        starts = guard(np.array([first], np.int32))
        kernels.call(
            form, conv_w, conv_state, *part, a_log, dt_bias, norm_w, state, slots, starts, y, unused, scratch,
            PART, CHANNELS, WIDTH, HEADS, HEADS, WIDTH, 1,
        )  # fmt: skip
        for head in range(HEADS):  # each alone: a large one would hide a small one's error
            columns = slice(head * DIM, (head + 1) * DIM)
            got, exact = y[:, columns], want[first : first + PART, columns]
            assert_close(got, exact, 1e-9, (head, first))
    assert_close(state, want_state, 1e-9)
