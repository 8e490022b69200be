"""Kernels from Python functions that emit their statements, with what TVMScript offers as values and context managers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder

T: Any = builder  # what TVMScript offers; its own types do not let numbers be expressions
Expr = Any  # a TIR expression, or a Python number where one is accepted


def make_kernel(arguments: str, types: dict[str, str], body: Callable[..., None]) -> PrimFunc:
    """Return the kernel with these arguments, by name: pointers to elements of a type of `types`, all others int32.

    `body` gets them by name, and emits statements; it binds the blocks and the threads.
    """
    ir: Any = IRBuilder()
    with ir, T.prim_func(s_tir=True):
        T.func_name("kernel")
        values: dict[str, Any] = {}
        for name in arguments.split():
            values[name] = T.arg(name, T.handle(types[name]) if name in types else T.int32())
        body(**values)
    return ir.get()


def array(pointer: Expr, shape: tuple[Expr, ...], dtype: str) -> Expr:
    """Return what an argument points to, dense, under the argument's name."""
    return _name(pointer.name, T.decl_buffer(shape, dtype, data=pointer))


def local(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    """Return an array of each thread's own, in registers if all indices are known."""
    return _name(name, T.alloc_buffer(shape, dtype, scope="local"))


def shared(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    """Return an array that the threads of a block share."""
    return _name(name, T.alloc_buffer(shape, dtype, scope="shared"))


def let(name: str, value: Expr) -> Expr:
    """Compute a value once, under a name."""
    return _name(name, T.Bind(value))


def store(place: Expr, value: Expr, *index: Expr) -> None:
    """Store to place[index]."""
    T.buffer_store(place, value, list(index))


def add(place: Expr, value: Expr, *index: Expr) -> None:
    """Add to place[index]."""
    T.buffer_store(place, place[index] + value, list(index))


def _name(name: str, value: Expr) -> Expr:
    IRBuilder.name(name, value)
    return value
