"""Write an operation as an instruction set does it."""

from __future__ import annotations

from tvm.script import tirx as T

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.vectors import Expr


def apply(isa: Isa, operation: str, *operands: Expr) -> Expr:
    """Return an operation of operations.py on registers, which may hold their bytes as elements of any type.

    Raises KeyError if the instruction set does not offer it.
    """
    row = isa.instruction(operation)
    values = [_as(row.operand(number), operand) for number, operand in enumerate(operands)]
    if row.text.startswith("llvm."):
        intrinsic = T.llvm_lookup_intrinsic_id(row.text)
        return T.call_llvm_pure_intrin(intrinsic, *values, dtype=row.result)
    return T.call_pure_extern(row.result, row.text, *values)


def _as(kind: str, value: Expr) -> Expr:
    return value if str(value.ty.dtype) == kind else T.reinterpret(value, dtype=kind)
