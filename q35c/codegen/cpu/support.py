"""What compiled code needs and TIR cannot say, as LLVM IR that comes into every object.

- the barrier between two kernels of a program, and flush-to-zero for the threads that run one;
- the fixed-order sum of a vector's lanes;
- what an instruction set's rows bring along (isa/);
- the meeting of threads that end parts of one group (products/rounded_blocks.py);
- the clock: where asked, thread 0 notes the processor's cycle counter before each kernel;
- an empty stand-in for the one function that TVM's argument checks import, so that the shared object needs no library of
  TVM: a failed check is seen by its return code.
"""

from __future__ import annotations

from string import Template

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from q35c.codegen.cpu.isa.base import Isa

SUMMED_LANES = (4, 8, 16)
CYCLES_BEFORE_SLEEP = 200_000  # about 70 us; then another thread may need this core

# Generation barrier: the last thread to arrive clears the count before it opens the next generation, so the
# words are ready again, for any number of threads. Who has spun long enough sleeps on the generation; measured:
# yielding instead lets a spinner keep the core that the thread it waits for was woken on, for milliseconds.
# The wait is bounded by time and has no `pause`: under a hypervisor each may cost an exit, 2,000 of them milliseconds.
# Either the opener sees the sleeper's count, or the kernel sees the new generation and does not let it sleep.
_COMMON_IR = Template("""
declare i64 @llvm.readcyclecounter()
$sums
$flush
define linkonce_odr hidden i32 @q35c_barrier(ptr %arrivals, i32 %nt) {
  %generation = getelementptr i8, ptr %arrivals, i64 64
  %sleepers = getelementptr i8, ptr %arrivals, i64 68
  %before = load atomic i32, ptr %generation acquire, align 4
  %arrived = atomicrmw add ptr %arrivals, i32 1 acq_rel
  %count = add i32 %arrived, 1
  %last = icmp eq i32 %count, %nt
  br i1 %last, label %open, label %spin
open:
  store atomic i32 0, ptr %arrivals monotonic, align 4
  %next = add i32 %before, 1
  store atomic i32 %next, ptr %generation seq_cst, align 4
  %asleep = load atomic i32, ptr %sleepers seq_cst, align 4
  %quiet = icmp eq i32 %asleep, 0
  br i1 %quiet, label %done, label %wake
wake:
  %woken = call i64 $wake
  br label %done
spin:
  %start = call i64 @llvm.readcyclecounter()
  br label %look
look:
  %now = load atomic i32, ptr %generation acquire, align 4
  %same = icmp eq i32 %now, %before
  br i1 %same, label %wait, label %done
wait:
  %clock = call i64 @llvm.readcyclecounter()
  %waited = sub i64 %clock, %start
  %patient = icmp ult i64 %waited, $cycles
  br i1 %patient, label %look, label %sleep
sleep:
  %one_more = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %expected = zext i32 %before to i64
  %slept = call i64 $wait
  %one_less = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  br label %look
done:
  ret i32 0
}

define linkonce_odr hidden i32 @q35c_arrive(ptr %counter, i32 %count, i32 %whole) alwaysinline {
  %alone = icmp eq i32 %count, %whole
  br i1 %alone, label %complete, label %meet
meet:
  %before = atomicrmw add ptr %counter, i32 %count acq_rel, align 4
  %now = add i32 %before, %count
  %is_last = icmp eq i32 %now, %whole
  br i1 %is_last, label %reset, label %others
reset:
  store atomic i32 0, ptr %counter monotonic, align 4
  br label %complete
complete:
  ret i32 1
others:
  ret i32 0
}

define linkonce_odr hidden i32 @q35c_claim(ptr %counter, i32 %parts, i32 %tid, i32 %nt, i32 %last) alwaysinline {
  %divided = icmp sgt i32 %parts, %nt
  br i1 %divided, label %claim, label %share
share:
  %begins = icmp slt i32 %last, 0
  %mine = select i1 %begins, i32 %tid, i32 %parts
  ret i32 %mine
claim:
  %part = atomicrmw add ptr %counter, i32 1 monotonic, align 4
  %after = sub i32 %part, %parts
  %threads_after = add i32 %after, 1
  %is_last = icmp eq i32 %threads_after, %nt
  br i1 %is_last, label %reset, label %done
reset:
  store atomic i32 0, ptr %counter monotonic, align 4
  br label %done
done:
  ret i32 %part
}

define linkonce_odr hidden i64 @q35c_clock(ptr %words, i32 %tid) alwaysinline {
  %flag = load i64, ptr %words, align 8
  %is_off = icmp eq i64 %flag, 0
  %is_first = icmp eq i32 %tid, 0
  %next = getelementptr i64, ptr %words, i64 1
  %address = ptrtoint ptr %next to i64
  %mine = select i1 %is_first, i64 %address, i64 -1
  %clock = select i1 %is_off, i64 0, i64 %mine
  ret i64 %clock
}

define linkonce_odr hidden i32 @q35c_stamp(i64 %clock, i64 %index) alwaysinline {
  %is_off = icmp sle i64 %clock, 0
  br i1 %is_off, label %done, label %stamp
stamp:
  %words = inttoptr i64 %clock to ptr
  %word = getelementptr i64, ptr %words, i64 %index
  %now = call i64 @llvm.readcyclecounter()
  store i64 %now, ptr %word, align 8
  br label %done
done:
  ret i32 0
}

define weak hidden void @TVMFFIErrorSetRaisedFromCStrParts(ptr %kind, ptr %parts, i32 %count) {
  ret void
}
""")


def _sum_ir(lanes: int) -> str:
    """Return the function that adds the lanes of a vector in the order of a tree."""
    kind = f"<{lanes} x float>"
    return f"""
declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, {kind})

define linkonce_odr hidden float @q35c_sum_f32x{lanes}({kind} %x) alwaysinline {{
  %r = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float -0.0, {kind} %x)
  ret float %r
}}
"""


def support_ir(isa: Isa) -> str:
    """Return all that may come into an object of an instruction set; LLVM drops what is not called."""
    system, rows = isa.system, "".join(row.support for row in isa.instructions)
    texts = {"flush": system.flush, "wait": system.wait, "wake": system.wake}
    texts["sums"] = "".join(map(_sum_ir, SUMMED_LANES))
    return _COMMON_IR.substitute(texts, cycles=CYCLES_BEFORE_SLEEP) + rows


def barrier() -> PrimFunc:
    """Make the function that returns once all `nt` threads have called it."""

    @T.prim_func(private=True, s_tir=True)
    def wait(BARRIER: T.handle("int32"), nt: T.int32) -> T.int32:
        if nt > 1:
            T.evaluate(T.call_extern("int32", "q35c_barrier", BARRIER, nt))
        return T.int32(0)

    return wait


def take_part() -> PrimFunc:
    """Make the function that replaces PART[0], -1 at first, by the next part of PART[1] that a thread does, or by one that
    is not less if there is none left.
    """

    @T.prim_func(private=True, s_tir=True)
    def take(
        COUNTER: T.handle("int32"), PART: T.handle("int32"), tid: T.int32, nt: T.int32
    ) -> T.int32:
        part = T.decl_buffer((2,), "int32", data=PART)
        part[0] = T.call_extern("int32", "q35c_claim", COUNTER, part[1], tid, nt, part[0])
        return T.int32(0)

    return take


def stamp() -> PrimFunc:
    """Make the function that keeps the cycle counter where `clock`, from q35c_clock, asks for it."""

    @T.prim_func(private=True, s_tir=True)
    def keep(clock: T.int64, index: T.int64) -> T.int32:
        T.evaluate(T.call_extern("int32", "q35c_stamp", clock, index))
        return T.int32(0)

    return keep
