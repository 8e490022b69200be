"""Collect ONNX nodes under readable names, share constants, build bodies of Scan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from q35c.errors import LoweringError
from q35c.ir.types import Shape, SymDim

ELEMENT_TYPES = {
    "f32": TensorProto.FLOAT, "i32": TensorProto.INT32, "i64": TensorProto.INT64, "u8": TensorProto.UINT8,
}  # fmt: skip
NUMPY_TYPES = {"f32": np.float32, "i32": np.int32, "i64": np.int64, "u8": np.uint8}
Made = TypeVar("Made")


def element_type(dtype: str, where: str) -> int:
    """Return the ONNX element type of an IR dtype. Raises LoweringError."""
    if dtype not in ELEMENT_TYPES:
        raise LoweringError(
            "ONNX export has no such element type",
            where=where,
            expected=tuple(ELEMENT_TYPES),
            got=dtype,
        )
    return ELEMENT_TYPES[dtype]


class Nodes:
    """A list of nodes. A value is the name of the tensor; `scope` comes before the names made here."""

    def __init__(self, outer: Nodes | None = None) -> None:
        self.nodes: list[NodeProto] = []
        self.scope = outer.scope if outer else ""
        self.constants: dict[Hashable, TensorProto] = outer.constants if outer else {}
        self._names: set[str] = outer._names if outer else set()
        self._made: dict[Hashable, object] = {}

    def add(self, op_type: str, *inputs: str, name: str = "", **attrs: Any) -> str:
        """Append a node with one output and return it."""
        return self.add_many(op_type, 1, *inputs, name=name, **attrs)[0]

    def add_many(
        self, op_type: str, count: int, *inputs: str, name: str = "", **attrs: Any
    ) -> tuple[str, ...]:
        """Append a node with several outputs and return them."""
        unique = self.unique(name or op_type)
        outputs = (unique,) if count == 1 else tuple(f"{unique}.{i}" for i in range(count))
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=unique, **attrs))
        return outputs

    def unique(self, name: str) -> str:
        """Return a name within the scope that no tensor of the model has yet."""
        base = name = f"{self.scope}/{name}" if self.scope else name
        number = 1
        while name in self._names:
            name, number = f"{base}_{number}", number + 1
        self._names.add(name)
        return name

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` returned the first time this key was asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    # --- constants ------------------------------------------------------------------------------

    def constant(self, array: np.ndarray) -> str:
        """Return an initializer with these values; equal ones are shared."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            shape = "x".join(map(str, array.shape)) or "scalar"
            values = array.ravel().tolist() if array.size <= 4 else [f"no{len(self.constants)}"]
            name = "_".join([f"constants/{array.dtype}", shape, *map(str, values)])
            self.constants[key] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return self.constants[key].name

    def ints(self, *values: int) -> str:
        """Return a vector of int64, as shapes and axes are given."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float, dtype: str = "f32") -> str:
        return self.constant(np.array(value, NUMPY_TYPES[dtype]))

    # --- small compositions ----------------------------------------------------------------------

    def reshape(self, x: str, *dims: int) -> str:
        return self.add("Reshape", x, self.ints(*dims))

    def reshape_to(self, x: str, shape: Shape) -> str:
        """Reshape to an IR shape with at most one symbol. Raises LoweringError."""
        return self.reshape(x, *dynamic_dims(shape))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> tuple[str, ...]:
        """Cut an axis into parts of these sizes."""
        return self.add_many("Split", len(sizes), x, self.ints(*sizes), axis=axis)

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def linear(self, x: str, weight: str) -> str:
        """Multiply x [M, K] by the transpose of a weight [N, K]."""
        return self.add("Gemm", x, weight, transB=1)

    def body(self) -> Nodes:
        """Return an empty list for the body of a loop; it sees the values and constants of this one."""
        return Nodes(self)

    def as_graph(self, name: str, inputs: dict[str, int], outputs: dict[str, int]) -> GraphProto:
        """Return these nodes as the body of a loop; inputs and outputs are given with their rank."""
        declared, results = (
            [
                helper.make_tensor_value_info(value, TensorProto.FLOAT, [None] * rank)
                for value, rank in group.items()
            ]
            for group in (inputs, outputs)
        )
        return helper.make_graph(self.nodes, name, declared, results)


def dynamic_dims(shape: Shape) -> list[int]:
    """Return a shape as ONNX reshapes to it: the one symbolic dim becomes -1. Raises LoweringError."""
    dims = [-1 if isinstance(dim, SymDim) else dim for dim in shape]
    if dims.count(-1) > 1:
        raise LoweringError(
            "ONNX export cannot reshape to several dynamic dims", got=tuple(map(str, shape))
        )
    return dims
