"""The intermediate representation: types, graph, op table, text form, verifier, interpreter."""

from q35c.ir.build import Builder, Rewriter
from q35c.ir.graph import Attrs, Graph, Module, Op, Value
from q35c.ir.types import Dim, DType, SymDim, TensorType

__all__ = [
    "Attrs",
    "Builder",
    "DType",
    "Dim",
    "Graph",
    "Module",
    "Op",
    "Rewriter",
    "SymDim",
    "TensorType",
    "Value",
]
