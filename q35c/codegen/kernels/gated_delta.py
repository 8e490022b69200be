"""Gated delta network kernels: causal convolution, and the recurrence with its gated norm.

`gated_delta` has two forms. "batch": row b is one token of sequence b, one step per (row, head). "sequence": all rows
continue sequence 0, each head's run in order; runs of SHORT_RUN tokens or more take the chunk scan, shorter ones the
same step as decode, so a run of one token equals a decode step bit for bit. Threads share (row, head) pairs or heads,
never a sum, so results do not depend on their number.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.common import share
from q35c.codegen.kernels.gated_delta_scan import (
    pack_state,
    scan_chunk,
    scan_shape,
    unpack_state,
)
from q35c.codegen.kernels.gated_delta_step import (
    DeltaShape,
    gated_norm,
    recurrent_step,
    vector_of_row,
)

SHORT_RUN = 8  # below this many tokens one step per token is faster than the scan


def gated_delta(
    Hk: int,
    Hv: int,
    Dk: int,
    Dv: int,
    eps: float,
    slot_offset_bytes: int,
    rows: str,
    isa: Isa,
    short_run: int = SHORT_RUN,
) -> tirx.PrimFunc:
    """Build the recurrence kernel; a "sequence" of `short_run` tokens or more takes the scan.

    Params: QKV f32[T, 2*Hk*Dk + Hv*Dv] (after convolution and SiLU), Z f32[T, Hv*Dv], B and A f32[T, Hv],
    A_LOG and DT_BIAS f32[Hv], NORM_W f32[Dv], STATE, SLOTS i64[B], Y f32[T, Hv*Dv], SCRATCH, T, then the row strides
    ld_qkv, ld_z, ld_b, ld_a, ld_y, then tid, nt.
    """
    shape = DeltaShape(Hk, Hv, Dk, Dv, eps, slot_offset_bytes // 4, isa)
    return _kernel(shape, rows == "batch", short_run)


def gated_delta_scratch_bytes(Hk: int, Hv: int, Dk: int, Dv: int, rows: str, isa: Isa) -> int:
    """Return the scratch bytes of one thread."""
    return 0 if rows == "batch" else 4 * scan_shape(DeltaShape(Hk, Hv, Dk, Dv, 0.0, 0, isa)).total


@T.inline
def run_batch(shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, slots, y, tokens, tid, nt):
    """One step for each (row, head) of this thread's share."""
    lo: T.let[T.int64] = share(tokens * shape.Hv, tid, nt)
    for task in T.serial(share(tokens * shape.Hv, tid + 1, nt) - lo):
        row: T.let[T.int64] = T.truncdiv(lo + task, T.int64(shape.Hv))
        head: T.let[T.int64] = lo + task - row * shape.Hv
        base: T.let[T.int64] = shape.state(slots[row], head)
        recurrent_step(shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, base, y, row, head)


@T.inline
def run_sequence(
    shape,
    scan,
    short_run,
    qkv,
    z,
    b,
    a,
    a_log,
    dt_bias,
    norm_w,
    state,
    slots,
    y,
    w,
    tokens,
    tid,
    nt,
):
    """All rows, for each head of this thread's share."""
    lo: T.let[T.int64] = share(shape.Hv, tid, nt)
    for task in T.serial(share(shape.Hv, tid + 1, nt) - lo):
        head: T.let[T.int64] = lo + task
        base: T.let[T.int64] = shape.state(slots[0], head)
        if tokens < short_run:
            for row in T.serial(tokens):
                recurrent_step(
                    shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, base, y, row, head
                )
        else:
            pack_state(scan, w, state, base)
            for chunk in T.serial(T.truncdiv(tokens + (scan.rows - 1), T.int64(scan.rows))):
                first: T.let[T.int64] = chunk * scan.rows
                live: T.let[T.int64] = T.min(tokens - first, T.int64(scan.rows))
                scan_chunk(scan, qkv, a, b, a_log, dt_bias, w, y, head, first, live)
                for i in T.serial(live):
                    gated_norm(
                        shape,
                        vector_of_row(y, first + i, head * shape.Dv, shape.lanes),
                        z, norm_w, y, first + i, head,
                    )  # fmt: skip
            unpack_state(scan, w, state, base)


def _kernel(shape: DeltaShape, is_batch: bool, short_run: int) -> tirx.PrimFunc:
    scan = scan_shape(shape)

    @T.prim_func(private=True, s_tir=True)
    def gated_delta(
        QKV: T.handle("float32"),
        Z: T.handle("float32"),
        B: T.handle("float32"),
        A: T.handle("float32"),
        A_LOG: T.handle("float32"),
        DT_BIAS: T.handle("float32"),
        NORM_W: T.handle("float32"),
        STATE: T.handle("float32"),
        SLOTS: T.handle("int64"),
        Y: T.handle("float32"),
        SCRATCH: T.handle("float32"),
        tokens: T.int64,
        ld_qkv: T.int64,
        ld_z: T.int64,
        ld_b: T.int64,
        ld_a: T.int64,
        ld_y: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        qkv = T.decl_buffer((tokens, ld_qkv), "float32", data=QKV)
        z = T.decl_buffer((tokens, ld_z), "float32", data=Z)
        b = T.decl_buffer((tokens, ld_b), "float32", data=B)
        a = T.decl_buffer((tokens, ld_a), "float32", data=A)
        a_log = T.decl_buffer((shape.Hv,), "float32", data=A_LOG)
        dt_bias = T.decl_buffer((shape.Hv,), "float32", data=DT_BIAS)
        norm_w = T.decl_buffer((shape.Dv,), "float32", data=NORM_W)
        state = T.decl_buffer((T.int64(1) << 48,), "float32", data=STATE)
        slots = T.decl_buffer((tokens,), "int64", data=SLOTS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        w = T.decl_buffer((scan.total,), "float32", data=SCRATCH, elem_offset=tid * scan.total)
        if is_batch:
            run_batch(shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, slots, y, tokens, tid, nt)
        else:
            run_sequence(
                shape, scan, short_run, qkv, z, b, a, a_log, dt_bias, norm_w, state, slots, y, w,
                tokens, tid, nt,
            )  # fmt: skip
        return T.int32(0)

    return gated_delta
