"""Host programs: one public function per entry that calls the kernels in order.

A program runs on every worker thread at once, each with its own `tid` of `nt`. Kernels split their own work, either into as
many equal shares as there are threads, or into more parts that threads take one by one (division.py); a `Barrier` stands
wherever one kernel reads what another thread may have written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T

from q35c.codegen.calls import (
    Argument,
    Barrier,
    Call,
    Division,
    Int,
    Nt,
    Part,
    Parts,
    Pointer,
    Tid,
    Tokens,
)
from q35c.codegen.cpu.division import count_parts
from q35c.codegen.cpu.kernels.vectors import STACK
from q35c.codegen.cpu.support import barrier, stamp, take_part
from q35c.errors import LoweringError
from q35c.layouts.blobs import BLOBS, DIVIDED_CALLS, ELEMENT_BYTES, PART_COUNTERS

# What programs call beside kernels; build.py adds it. Written out at every call it was most of a program, and of the time
# to compile a model.
HELPERS = {"wait": barrier, "take_part": take_part, "count_parts": count_parts, "stamp": stamp}


def kernel_symbol(name: str) -> str:
    """Return the symbol of a kernel."""
    return f"kernel_{name}"  # an entry may have the same name


def helper_symbol(name: str) -> str:
    """Return the symbol of one of HELPERS."""
    return f"program_{name}"


def call_kernel(name: str, arguments: Sequence[Any]) -> tirx.Stmt:
    """Return the call of a kernel, which is an object of its own."""
    return tirx.Evaluate(T.call_extern("int32", kernel_symbol(name), *arguments))


@dataclass(frozen=True)
class Parameters:
    """Hold the variables that every entry has as parameters, all integers."""

    blobs: dict[str, tirx.Var]
    tokens: tirx.Var
    tid: tirx.Var
    nt: tirx.Var

    @staticmethod
    def make() -> Parameters:
        """Make new variables: five addresses and T int64, tid and nt int32."""
        # Addresses travel as integers: TVM marks pointer parameters of a program noalias, and LLVM could then
        # keep a value in a register across a barrier behind which another thread changes it.
        blobs = {name: tirx.Var(name, "int64") for name in BLOBS}
        return Parameters(
            blobs, tirx.Var("tokens", "int64"), tirx.Var("tid", "int32"), tirx.Var("nt", "int32")
        )

    def as_list(self) -> list[tirx.Var]:
        return [*self.blobs.values(), self.tokens, self.tid, self.nt]


def check_calls(program: Sequence[Call | Barrier], kernels: Mapping[str, tirx.PrimFunc]) -> None:
    """Raise LoweringError if a call gives a kernel something else than it takes; nobody checks calls between objects."""
    for call in program:
        if isinstance(call, Call):
            kernel: Any = kernels.get(call.kernel)
            taken = [_type_name(parameter.ty) for parameter in kernel.params] if kernel else None
            given = [_TYPE_NAMES.get(type(argument), "int32") for argument in call.args]
            if given != taken:
                raise LoweringError(
                    "a call does not fit its kernel", where=call.kernel, expected=taken, got=given
                )


_TYPE_NAMES = {Pointer: "pointer", Tokens: "int64", Int: "int64"}


def _type_name(type: Any) -> str:
    return "pointer" if isinstance(type, tvm.ir.PointerType) else str(type.dtype)


def program_entry(
    symbol: str, calls: Sequence[Call | Barrier], clock: Pointer | None = None
) -> tirx.PrimFunc:
    """Make the public function `symbol(weights, state, arena, io, barrier, T, tid, nt)`.

    All parameters are integers: five byte addresses and T int64, tid and nt int32. It returns 0. Denormals are
    flushed to zero while it runs. Where the word at `clock` is not 0, thread 0 stores the cycle counter before each
    kernel, and when all threads have ended the last, in the words behind it. LoweringError when a kernel argument is not aligned to an element.
    """
    parameters = Parameters.make()
    statements = _statements(calls, parameters)
    if clock is not None:
        statements = _with_stamps(calls, statements, clock, parameters)
    return entry_function(symbol, parameters, statements)


def entry_function(
    symbol: str, parameters: Parameters, statements: Sequence[tirx.Stmt]
) -> tirx.PrimFunc:
    """Make a public function of these statements that flushes denormals and returns 0."""
    old_mode = tirx.Var("old_mode", "int32")
    body = [
        tirx.Bind(old_mode, T.call_extern("int32", "q35c_flush_denormals")),
        *statements,
        tirx.Evaluate(T.call_extern("int32", "q35c_restore_denormals", old_mode)),
    ]
    function: Any = tirx.PrimFunc(parameters.as_list(), tirx.SeqStmt(body))
    return function.with_attr("global_symbol", symbol).with_attr("s_tir", True)


def _statements(calls: Sequence[Call | Barrier], parameters: Parameters) -> list[tirx.Stmt]:
    statements: list[tirx.Stmt] = []
    divided = 0
    for call in calls:
        if isinstance(call, Barrier):
            statements.append(_wait(parameters))
            divided = 0
        elif call.divided is None:
            statements.append(_run(call, parameters, {}))
        else:
            taken = _take_parts(call, call.divided, divided % DIVIDED_CALLS, parameters)
            # The first counter serves again: all threads must have left it.
            is_full = divided and divided % DIVIDED_CALLS == 0
            statements.append(tirx.SeqStmt([_wait(parameters), taken]) if is_full else taken)
            divided += 1
    return statements


def _wait(parameters: Parameters) -> tirx.Stmt:
    words = as_pointer(parameters.blobs["barrier"])
    return _help("wait", words, parameters.nt)


def _run(call: Call, parameters: Parameters, part: dict[type, Any]) -> tirx.Stmt:
    arguments = [_expression(argument, parameters, part, call) for argument in call.args]
    return call_kernel(call.kernel, arguments)


def _take_parts(call: Call, division: Division, number: int, parameters: Parameters) -> tirx.Stmt:
    """Return a loop that takes a part and does it, until none is left; `number` is that of the counter."""
    counter = parameters.blobs["barrier"] + tirx.const(
        PART_COUNTERS + ELEMENT_BYTES * number, "int64"
    )
    part = tirx.decl_buffer((2,), "int32", "part")  # its number, how many
    threads = (parameters.tid, parameters.nt)
    counts = [argument for argument in call.args if isinstance(argument, Tokens)]
    rows = _rows(counts[0], parameters) if counts else tirx.const(1, "int64")
    limits = (tirx.const(value, "int64") for value in (division.bytes, division.most))
    take = _help("take_part", as_pointer(counter), part.data, *threads)
    statements: list[tirx.Stmt] = [
        tirx.AllocBuffer(part, STACK),
        _help("count_parts", part.data, rows, *limits, parameters.nt),
        take,
        tirx.While(
            part[0] < part[1],
            tirx.SeqStmt([_run(call, parameters, {Part: part[0], Parts: part[1]}), take]),
        ),
    ]
    return tirx.SeqStmt(statements)


def _help(name: str, *arguments: Any) -> tirx.Stmt:
    return tirx.Evaluate(T.call_extern("int32", helper_symbol(name), *arguments))


def _with_stamps(
    calls: Sequence[Call | Barrier],
    statements: Sequence[tirx.Stmt],
    clock: Pointer,
    parameters: Parameters,
) -> list[tirx.Stmt]:
    """Put a stamp before each call and at the end; a barrier's time belongs to the kernel before it."""
    words = as_pointer(parameters.blobs[clock.blob] + tirx.const(clock.byte_offset, "int64"))
    # 0: not asked for, so that a step costs a call and a comparison; -1: asked for, but another thread keeps it.
    started: Any = tirx.Var("clock", "int64")
    stamped: list[Any] = [
        tirx.Bind(started, T.call_extern("int64", "q35c_clock", words, parameters.tid))
    ]
    number = 0
    for call, statement in zip(calls, statements, strict=True):
        if isinstance(call, Call):
            stamped.append(_stamp(started, number))
            number += 1
        stamped.append(statement)
    if number:  # the last kernel, too, ends when all threads have ended it
        last = tirx.IfThenElse(started != 0, _wait(parameters), None)
        stamped.append(last)
    return [*stamped, _stamp(started, number)]


def _stamp(clock: Any, number: int) -> tirx.Stmt:
    index = tirx.const(number, "int64")
    return _help("stamp", clock, index)


def _expression(
    argument: Argument, parameters: Parameters, part: dict[type, Any], call: Call
) -> Any:
    if isinstance(argument, Part | Parts):
        return part[type(argument)]
    if isinstance(argument, Tid):
        return parameters.tid
    if isinstance(argument, Nt):
        return parameters.nt
    if isinstance(argument, Tokens):
        return _rows(argument, parameters)
    if isinstance(argument, Int):
        return tirx.const(argument.value, "int64")
    return _address(argument, parameters, call)


def _rows(count: Tokens, parameters: Parameters) -> Any:
    tokens: Any = parameters.tokens
    return tokens if count.factor == 1 else tokens * tirx.const(count.factor, "int64")


def _address(pointer: Pointer, parameters: Parameters, call: Call) -> Any:
    # Buffers start at multiples of 64; a view of some columns may start at any element.
    if pointer.byte_offset % ELEMENT_BYTES:
        raise LoweringError(
            "a kernel argument is not aligned to an element",
            where=call.kernel,
            got=pointer,
        )
    offset: Any = tirx.const(pointer.byte_offset, "int64")
    if pointer.last_row:
        offset = offset + (parameters.tokens - 1) * tirx.const(pointer.row_bytes, "int64")
    return as_pointer(parameters.blobs[pointer.blob] + offset)


def as_pointer(address: Any) -> Any:
    """Turn an int64 address expression into a pointer that may alias any other."""
    return T.reinterpret(address, dtype="handle")
