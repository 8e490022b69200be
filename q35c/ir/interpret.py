"""Run a graph with numpy, any stage: the definition that passes and kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from q35c.errors import VerifyError
from q35c.formats.registry import stored
from q35c.ir.graph import Graph, Value
from q35c.ir.ops import OPS
from q35c.ir.types import SymDim, TensorType

Weights = Mapping[str, np.ndarray] | Callable[[str], np.ndarray]


def bind(symbols: dict[str, int], value: Value, array: np.ndarray) -> None:
    """Check an array against a type and learn the sizes of its symbols."""
    if array.ndim != value.type.rank:
        raise VerifyError(
            "array has another rank", where=str(value), expected=str(value.type), got=array.shape
        )
    for dim, size in zip(value.type.shape, array.shape, strict=True):
        if isinstance(dim, SymDim):
            dim, size = symbols.setdefault(dim.name, size // dim.factor) * dim.factor, size
        if dim != size:
            raise VerifyError(
                "array does not fit", where=str(value), expected=str(value.type), got=array.shape
            )


def concrete(attr: Any, symbols: dict[str, int]) -> Any:
    """Replace symbols inside an attribute by their sizes."""
    if isinstance(attr, SymDim):
        return symbols[attr.name] * attr.factor
    if isinstance(attr, tuple):
        return tuple(concrete(item, symbols) for item in attr)
    return attr


def run(
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    weights: Weights,
    state: Mapping[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return the outputs; `state` arrays are updated in place.

    Arrays keep the precision they come in: float64 weights give a float64 run.
    """
    lookup = weights if callable(weights) else weights.__getitem__
    symbols: dict[str, int] = {}
    values: dict[Value, np.ndarray] = {}
    for value in graph.inputs:
        values[value] = np.asarray(inputs[value.name])
        bind(symbols, value, values[value])
    for op in graph.ops:
        for operand in op.operands:
            if operand.kind == "weight" and operand not in values:
                values[operand] = stored(lookup(operand.name), operand.type.dtype)
                bind(symbols, operand, values[operand])
            elif operand.kind == "state":
                values[operand] = (state or {})[operand.name]
        attrs = {name: concrete(attr, symbols) for name, attr in op.attrs}
        made = OPS[op.kind].reference(*(values[v] for v in op.operands), **attrs)
        made = made if isinstance(made, tuple) else (made,)
        for result, array in zip(op.results, made, strict=True):
            values[result] = array
    return [values[v] for v in graph.outputs]


def zeros(tensor: TensorType, symbols: Mapping[str, int]) -> np.ndarray:
    """Return an empty state array of this type."""
    return np.zeros(concrete(tensor.shape, dict(symbols)), np.float32)
