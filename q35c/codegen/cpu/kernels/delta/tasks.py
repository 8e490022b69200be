"""Gated delta network kernels: causal convolution, recurrence and gated norm.

`gated_delta_decode` takes row b as one token of sequence b: convolution, SiLU and one step for each (row, key head).
In `gated_delta` all rows continue sequence 0, each key head's run in order, a chunk of rows at a time, so that what was
convolved is still in L2 when the recurrence reads it. Chunks begin at multiples of CHUNK of the sequence's positions, not of
the call's rows, so that a sequence cut there gives the bits of the whole one. SHORT_RUN rows of a chunk or more take the scan,
fewer the same step as decode: these equal decode steps bit for bit.
Threads share (row, key head) pairs or key heads, never a sum, so results do not depend on their number.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.calls import Cost, Division
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.delta.conv import ConvShape, convolve_channels
from q35c.codegen.cpu.kernels.delta.scan import pack_state, scan_chunk, scan_shape, unpack_state
from q35c.codegen.cpu.kernels.delta.step import (
    DeltaShape,
    gated_norm,
    recurrent_step,
    vector_of_row,
)
from q35c.codegen.cpu.kernels.family import (
    EXP_OPERATIONS,
    F32_BYTES,
    Family,
    Parameters,
    Room,
    rounded_bytes,
)
from q35c.codegen.cpu.kernels.rows.round_int8 import Rounding
from q35c.codegen.cpu.kernels.vectors import share
from q35c.layouts.blobs import SLOT_WORDS

SHORT_RUN = 8  # below this many rows of a chunk one step for each is faster than the scan


def gated_delta(
    Hk: int,
    Hv: int,
    Dk: int,
    Dv: int,
    K: int,
    eps: float,
    slot_offset_bytes: int,
    isa: Isa,
    short_run: int = SHORT_RUN,
    group: int = 0,
) -> tirx.PrimFunc:
    """Build the kernel of one sequence's tokens, with a convolution of K taps; `short_run` rows of a chunk or more take the scan.

    Params: CONV_W f32[K, C], CONV_STATE f32[K-1, C], QKV f32[T, C] of C = 2*Hk*Dk + Hv*Dv, which its convolution replaces,
    Z f32[T, Hv*Dv], B and A f32[T, Hv], A_LOG and DT_BIAS f32[Hv], NORM_W f32[Dv], STATE, SLOTS i64[1], STARTS i32[1], Y f32[T, Hv*Dv],
    ROUNDED, SCRATCH, T, then the row strides ld_qkv, ld_z, ld_b, ld_a, ld_y, ld_rounded, then worker, tid, nt. With a `group`, of
    which Dv is a multiple, ROUNDED gets what `quantize_rows` makes of Y.
    """
    shape = DeltaShape(Hk, Hv, Dk, Dv, eps, slot_offset_bytes // 4, isa)
    conv = ConvShape(shape.channels, K, isa.lanes, slot_offset_bytes // 4)
    return _sequence_kernel(shape, conv, Rounding(Hv * Dv, group, isa), short_run)


def gated_delta_scratch_bytes(Hk: int, Hv: int, Dk: int, Dv: int, isa: Isa) -> int:
    """Return the scratch bytes of one thread of `gated_delta`."""
    return 4 * scan_shape(DeltaShape(Hk, Hv, Dk, Dv, 0.0, 0, isa)).total


def gated_delta_decode(
    Hk: int,
    Hv: int,
    Dk: int,
    Dv: int,
    K: int,
    eps: float,
    slot_offset_bytes: int,
    isa: Isa,
    group: int = 0,
) -> tirx.PrimFunc:
    """Build the kernel of one token for each sequence: parameters as those of `gated_delta`, but SLOTS i64[B], no STARTS, no SCRATCH, no worker."""
    shape = DeltaShape(Hk, Hv, Dk, Dv, eps, slot_offset_bytes // 4, isa)
    conv = ConvShape(shape.channels, K, isa.lanes, slot_offset_bytes // 4)
    return _decode_kernel(shape, conv, Rounding(Hv * Dv, group, isa))


@T.inline
def convolve_key_head(shape, conv, x, w, state, base, first, count, key_head):
    """Convolve what one key head and its value heads read of some rows: queries, keys, values."""
    for part in T.serial(T.int64(3)):
        begin: T.let[T.int64] = T.Select(
            part == 2,
            shape.v(key_head * shape.ratio),
            part * (shape.Hk * shape.Dk) + key_head * shape.Dk,
        )
        width: T.let[T.int64] = T.Select(
            part == 2, T.int64(shape.ratio * shape.Dv), T.int64(shape.Dk)
        )
        convolve_channels(conv, x, w, state, base, first, count, begin, width)


@T.inline
def run_sequence(
    shape, scan, conv, short_run, conv_w, conv_state, qkv, z, b, a, a_log, dt_bias, norm_w, state, slots, starts, y, rounding,
    rounded, w, tokens, tid, nt,
):  # fmt: skip
    """All rows, for the value heads of each key head of this thread's share."""
    conv_base: T.let[T.int64] = slots[0] * SLOT_WORDS + conv.slot_offset
    # Rows that the first chunk has before this call.
    before: T.let[T.int64] = T.cast(T.truncmod(starts[0], scan.rows), "int64")
    chunks: T.let[T.int64] = T.truncdiv(before + tokens + (scan.rows - 1), T.int64(scan.rows))
    lo: T.let[T.int64] = share(shape.Hk, tid, nt)
    for task in T.serial(share(shape.Hk, tid + 1, nt) - lo):
        key_head: T.let[T.int64] = lo + task
        for member in T.serial(T.int64(shape.ratio)):
            head: T.let[T.int64] = key_head * shape.ratio + member
            base: T.let[T.int64] = shape.state(slots[0], head)
            for chunk in T.serial(chunks):
                first: T.let[T.int64] = T.max(chunk * scan.rows - before, T.int64(0))
                end: T.let[T.int64] = T.min((chunk + 1) * scan.rows - before, tokens)
                live: T.let[T.int64] = end - first
                if member == 0:
                    convolve_key_head(
                        shape, conv, qkv, conv_w, conv_state, conv_base, first, live, key_head
                    )
                if live < short_run:  # the first or the last chunk
                    for i in T.serial(live):
                        recurrent_step(
                            shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, base, y, first + i, head
                        )  # fmt: skip
                        rounding.columns(y, first + i, rounded, head * shape.Dv, shape.Dv)
                else:
                    if first < short_run:  # no chunk was scanned before
                        pack_state(scan, w, state, base)
                    scan_chunk(scan, qkv, a, b, a_log, dt_bias, w, y, head, first, live)
                    for i in T.serial(live):
                        gated_norm(
                            shape,
                            vector_of_row(y, first + i, head * shape.Dv, shape.lanes),
                            z, norm_w, y, first + i, head,
                        )  # fmt: skip
                        rounding.columns(y, first + i, rounded, head * shape.Dv, shape.Dv)
                    if tokens - end < short_run:  # none will be
                        unpack_state(scan, w, state, base)


def _sequence_kernel(
    shape: DeltaShape, conv: ConvShape, rounding: Rounding, short_run: int
) -> tirx.PrimFunc:
    scan = scan_shape(shape)

    @T.prim_func(private=True, s_tir=True)
    def gated_delta_kernel(
        CONV_W: T.handle("float32"),
        CONV_STATE: T.handle("float32"),
        QKV: T.handle("float32"),
        Z: T.handle("float32"),
        B: T.handle("float32"),
        A: T.handle("float32"),
        A_LOG: T.handle("float32"),
        DT_BIAS: T.handle("float32"),
        NORM_W: T.handle("float32"),
        STATE: T.handle("float32"),
        SLOTS: T.handle("int64"),
        STARTS: T.handle("int32"),
        Y: T.handle("float32"),
        ROUNDED: T.handle("int32"),
        SCRATCH: T.handle("float32"),
        tokens: T.int64,
        ld_qkv: T.int64,
        ld_z: T.int64,
        ld_b: T.int64,
        ld_a: T.int64,
        ld_y: T.int64,
        ld_rounded: T.int64,
        worker: T.int32,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        conv_w = T.decl_buffer((conv.taps, conv.channels), "float32", data=CONV_W)
        conv_state = T.decl_buffer((T.int64(1) << 48,), "float32", data=CONV_STATE)
        qkv = T.decl_buffer((tokens, ld_qkv), "float32", data=QKV)
        z = T.decl_buffer((tokens, ld_z), "float32", data=Z)
        b = T.decl_buffer((tokens, ld_b), "float32", data=B)
        a = T.decl_buffer((tokens, ld_a), "float32", data=A)
        a_log = T.decl_buffer((shape.Hv,), "float32", data=A_LOG)
        dt_bias = T.decl_buffer((shape.Hv,), "float32", data=DT_BIAS)
        norm_w = T.decl_buffer((shape.Dv,), "float32", data=NORM_W)
        state = T.decl_buffer((T.int64(1) << 48,), "float32", data=STATE)
        slots = T.decl_buffer((1,), "int64", data=SLOTS)
        starts = T.decl_buffer((1,), "int32", data=STARTS)
        y = T.decl_buffer((tokens, ld_y), "float32", data=Y)
        rounded = T.decl_buffer((tokens, ld_rounded), "int32", data=ROUNDED)
        w = T.decl_buffer((scan.total,), "float32", data=SCRATCH, elem_offset=worker * scan.total)
        run_sequence(
            shape, scan, conv, short_run, conv_w, conv_state, qkv, z, b, a, a_log, dt_bias, norm_w, state, slots, starts,
            y, rounding, rounded, w, tokens, tid, nt,
        )  # fmt: skip
        return T.int32(0)

    return gated_delta_kernel


def _decode_kernel(shape: DeltaShape, conv: ConvShape, rounding: Rounding) -> tirx.PrimFunc:
    @T.prim_func(private=True, s_tir=True)
    def gated_delta_decode_kernel(
        CONV_W: T.handle("float32"),
        CONV_STATE: T.handle("float32"),
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
        ROUNDED: T.handle("int32"),
        tokens: T.int64,
        ld_qkv: T.int64,
        ld_z: T.int64,
        ld_b: T.int64,
        ld_a: T.int64,
        ld_y: T.int64,
        ld_rounded: T.int64,
        tid: T.int32,
        nt: T.int32,
    ) -> T.int32:
        T.func_attr({"tirx.noalias": True})
        conv_w = T.decl_buffer((conv.taps, conv.channels), "float32", data=CONV_W)
        conv_state = T.decl_buffer((T.int64(1) << 48,), "float32", data=CONV_STATE)
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
        rounded = T.decl_buffer((tokens, ld_rounded), "int32", data=ROUNDED)
        first: T.let[T.int64] = share(tokens * shape.Hk, tid, nt)
        for task in T.serial(share(tokens * shape.Hk, tid + 1, nt) - first):
            row: T.let[T.int64] = T.truncdiv(first + task, T.int64(shape.Hk))
            key_head: T.let[T.int64] = first + task - row * shape.Hk
            conv_base: T.let[T.int64] = slots[row] * SLOT_WORDS + conv.slot_offset
            convolve_key_head(
                shape, conv, qkv, conv_w, conv_state, conv_base, row, T.int64(1), key_head
            )
            for member in T.serial(T.int64(shape.ratio)):
                head: T.let[T.int64] = key_head * shape.ratio + member
                base: T.let[T.int64] = shape.state(slots[row], head)
                recurrent_step(
                    shape, qkv, z, b, a, a_log, dt_bias, norm_w, state, base, y, row, head
                )
                rounding.columns(y, row, rounded, head * shape.Dv, shape.Dv)
        return T.int32(0)

    return gated_delta_decode_kernel


def _scratch(p: Parameters, room: Room) -> int:
    one = gated_delta_scratch_bytes(p["Hk"], p["Hv"], p["Dk"], p["Dv"], room.isa)
    return max(one, 64) * room.threads


def _division(p: Parameters) -> Division:
    return Division(p["Hk"], p["Hv"] * p["Dk"] * p["Dv"] * 8)  # the state, read and written


def _cost(p: Parameters) -> Cost:
    """Decay, k S, the update and q S are 7 operations for each element of the state, which is read and written."""
    size, values, taps = p["Hv"] * p["Dk"] * p["Dv"], p["Hv"] * p["Dv"], p["K"]
    channels = 2 * p["Hk"] * p["Dk"] + values
    words = 2 * channels + 2 * values + 2 * p["Hv"]
    return Cost(
        weight_share=1,  # of the convolution
        bytes_per_sequence=2 * (size + (taps - 1) * channels) * F32_BYTES,
        cached_bytes_per_token=words * F32_BYTES + rounded_bytes(p, values),
        operations_per_token=7 * size
        + EXP_OPERATIONS * values
        + channels * (2 * taps + EXP_OPERATIONS),
    )


_INPUTS = "conv_w conv_state qkv z b a a_log dt_bias norm_w state slots"
_STRIDES = "tokens ld_qkv ld_z ld_b ld_a ld_y ld_rounded"
_WRITES = "conv_state qkv state y rounded"

GATED_DELTA = Family(
    gated_delta,
    f"{_INPUTS} starts y rounded scratch {_STRIDES} worker",
    writes=f"{_WRITES} scratch",
    cost=_cost,
    scratch=_scratch,
    division=_division,
)
GATED_DELTA_DECODE = Family(
    gated_delta_decode,
    f"{_INPUTS} y rounded {_STRIDES}",
    writes=_WRITES,
    cost=_cost,
    division=_division,
)
