"""Host programs: one public function per entry that calls the kernels in order.

A program runs on every worker thread at once, each with its own `tid` of `nt`. Kernels split their own work; a
`Barrier` stands wherever one kernel reads what another thread may have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import tvm
from tvm import tirx
from tvm.script import tirx as T

from q35c.errors import LoweringError

Blob = Literal["weights", "state", "arena", "io", "barrier"]
BLOBS: tuple[Blob, ...] = ("weights", "state", "arena", "io", "barrier")
ELEMENT_BYTES = 4
BARRIER_FUNCTION = tvm.ir.GlobalVar("program_barrier")  # build.py adds it to every module


@dataclass(frozen=True)
class Pointer:
    """Point `byte_offset` into a blob; with `last_row`, (T - 1) * row_bytes further."""

    blob: Blob
    byte_offset: int
    row_bytes: int = 0
    last_row: bool = False


@dataclass(frozen=True)
class Tokens:
    """Pass the number of tokens T of this run, int64."""


@dataclass(frozen=True)
class Int:
    """Pass a constant int64."""

    value: int


@dataclass(frozen=True)
class Tid:
    """Pass the calling thread's number, int32."""


@dataclass(frozen=True)
class Nt:
    """Pass the number of threads, int32."""


Argument = Pointer | Tokens | Int | Tid | Nt


@dataclass(frozen=True)
class Call:
    """Call the private kernel of this name."""

    kernel: str
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class Barrier:
    """Let no thread go on before all have come here."""


@cache
def kernel_symbol(name: str) -> tvm.ir.GlobalVar:
    """Return the one global variable that names a private kernel in every module."""
    return tvm.ir.GlobalVar(f"kernel_{name}")  # an entry may have the same name


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


def program_entry(
    symbol: str, calls: Sequence[Call | Barrier], clock: Pointer | None = None
) -> tirx.PrimFunc:
    """Make the public function `symbol(weights, state, arena, io, barrier, T, tid, nt)`.

    All parameters are integers: five byte addresses and T int64, tid and nt int32. It returns 0. Denormals are
    flushed to zero while it runs. Where the word at `clock` is not 0, thread 0 stores the cycle counter before each
    kernel, and when all threads have ended the last, in the words behind it. LoweringError when a kernel argument is not aligned to an element.
    """
    parameters = Parameters.make()
    statements = [_statement(call, parameters) for call in calls]
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


def _statement(call: Call | Barrier, parameters: Parameters) -> tirx.Stmt:
    if isinstance(call, Barrier):
        wait = _evaluate(BARRIER_FUNCTION, [as_pointer(parameters.blobs["barrier"]), parameters.nt])
        return tirx.IfThenElse(parameters.nt > 1, wait, None)
    arguments = [_expression(argument, parameters, call) for argument in call.args]
    return _evaluate(kernel_symbol(call.kernel), arguments)


def _with_stamps(
    calls: Sequence[Call | Barrier],
    statements: Sequence[tirx.Stmt],
    clock: Pointer,
    parameters: Parameters,
) -> list[tirx.Stmt]:
    """Put a stamp before each call and at the end; a barrier's time belongs to the kernel before it."""
    words = as_pointer(parameters.blobs[clock.blob] + tirx.const(clock.byte_offset, "int64"))
    # 0: not asked for, so that a step costs one comparison; -1: asked for, but another thread keeps it.
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
        last = tirx.IfThenElse(started != 0, _statement(Barrier(), parameters), None)
        stamped.append(last)
    return [*stamped, _stamp(started, number)]


def _stamp(clock: Any, number: int) -> tirx.Stmt:
    index = tirx.const(number, "int64")
    return tirx.Evaluate(T.call_extern("int32", "q35c_stamp", clock, index))


def _evaluate(function: tvm.ir.GlobalVar, arguments: list[Any]) -> tirx.Stmt:
    return tirx.Evaluate(tvm.ir.Call(function, arguments, ret_ty="int32"))


def _expression(argument: Argument, parameters: Parameters, call: Call) -> Any:
    if isinstance(argument, Tid):
        return parameters.tid
    if isinstance(argument, Nt):
        return parameters.nt
    if isinstance(argument, Tokens):
        return parameters.tokens
    if isinstance(argument, Int):
        return tirx.const(argument.value, "int64")
    return _address(argument, parameters, call)


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
