"""What stands for the nodes of an exported program while it is imported.

The batch dimension of one is removed on the way: each node is held as a value without that axis plus
the position it had. In-place writes become new values; a read that would see such a write through
another view is refused, so no aliasing is left in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from q35c.errors import InternalError
from q35c.ir import Attrs, Builder, Dim, SymDim, TensorType, Value
from q35c.ir.graph import Attr
from q35c.ir.types import Shape

DTYPES = {torch.float32: "f32", torch.int64: "i32", torch.int32: "i32", torch.uint8: "u8"}
TOKENS = SymDim("T")
# Position of the batch axis of the program's inputs: tokens [1, T], positions [3, 1, T]; those of a picture have none.
_INPUT_BATCH_AXIS = {
    "tokens": 0, "positions": 1, "patches": None, "taps": None, "tap_weights": None, "places": None,
}  # fmt: skip
_WRAPPERS = ("model.model.", "model.")


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of the program: its value without the batch axis, and where that axis was."""

    value: Value
    batch: int | None = None

    @property
    def shape(self) -> Shape:
        """Return the shape as the program sees it."""
        shape = self.value.type.shape
        return shape if self.batch is None else (*shape[: self.batch], 1, *shape[self.batch :])

    @property
    def rank(self) -> int:
        return self.value.type.rank + (self.batch is not None)

    def axis(self, dim: int) -> int | None:
        """Return the value's axis of a dim of the program; None for the batch axis."""
        dim %= self.rank
        if self.batch is None or dim < self.batch:
            return dim
        return None if dim == self.batch else dim - 1


Made = Item | tuple[Item, ...] | None  # by a rule: one result, several, or an op without one


class ImportState:
    """The graph so far, and which value each node of the program is. The import rules read and write it."""

    def __init__(self, program: ExportedProgram, name: str, prefix: str) -> None:
        self.builder = Builder(name, stage="traced")
        self._program = program
        self._items: dict[Node, Item | tuple[Item, ...]] = {}
        self._leaves = {
            spec.arg.name: spec
            for spec in program.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT
        }
        self._weight_names = _weight_names(program, prefix)
        self._views: dict[Node, Node] = {}  # view -> what it is a view of
        self._stale: set[Node] = set()
        self._partly_stale: dict[Node, tuple[Any, ...]] = {}  # only this (axis, index) is stale

    def declare_input(self, node: Node) -> None:
        """Declare a graph input; weights and constants are made when first read."""
        if node.name in self._leaves:
            return
        if node.name not in _INPUT_BATCH_AXIS:
            raise self.error(node, "unexpected program input")
        batch, shape = _INPUT_BATCH_AXIS[node.name], self.shape(node)
        if batch is not None:
            shape = (*shape[:batch], *shape[batch + 1 :])
        input_type = TensorType(self.dtype(node), shape)
        self._items[node] = Item(self.builder.input(node.name, input_type), batch)

    def keep(self, node: Node, made: Made, viewed: Node | None) -> None:
        """Let a node mean what its rule has made; `viewed` is the node whose memory its results share, if any."""
        if made is not None:
            self._items[node] = made
        if viewed is not None:
            self._views[node] = viewed

    def emit(self, kind: str, *operands: Value, **attrs: Attr) -> Value:
        """Append an op that has one result."""
        (result,) = self.builder.append(kind, operands, Attrs.of(attrs))
        return result

    def error(self, node: Node, what: str) -> InternalError:
        """Return an error that names the node and the module it came from."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        place = stack[-1][0] if stack else "program"
        return InternalError(
            what,
            where=f"{place}, node {node.name}",
            hint="q35c imports the models of transformers 5.23 as torch 2.13 exports them",
        )

    # --- reading ------------------------------------------------------------------------------

    def item(self, node: Any, reader: Node) -> Item:
        """Return what stands for a node that `reader` reads."""
        if not isinstance(node, Node):
            raise self.error(reader, f"expected a tensor operand, got {node!r}")
        self._check_fresh(node, reader)
        if node not in self._items and node.name in self._leaves:
            self._items[node] = self._leaf(node)
        found = self._items.get(node)
        if not isinstance(found, Item):
            raise self.error(reader, f"operand {node.name} is not one tensor")
        return found

    def items(self, node: Node) -> tuple[Item, ...]:
        """Return the results of an op that has several."""
        found = self._items[node]
        return found if isinstance(found, tuple) else (found,)

    def _leaf(self, node: Node) -> Item:
        """Make a weight, or a constant of a buffer that holds real data."""
        spec = self._leaves[node.name]
        target, shape = spec.target or "", self.shape(node)
        if spec.kind is InputKind.PARAMETER:
            name = self._weight_names[target]
            return Item(self.builder.weight(name, TensorType(self.dtype(node), shape)))
        data = self._program.constants.get(target)
        if not isinstance(data, torch.Tensor) or data.is_meta or data.dtype != torch.float32:
            raise self.error(node, f"buffer {target} holds no float32 data")
        values = tuple(data.flatten().tolist())
        return Item(self.emit("constant", values=values, shape=shape))

    def shape(self, node: Node) -> Shape:
        """Return the program's shape of a node with the symbol T for the token count."""
        return self.shape_of(node.meta["val"], node)

    def shape_of(self, tensor: torch.Tensor, node: Node) -> Shape:
        """Return the shape of one of a node's results."""
        return tuple(self._dim(size, node) for size in tensor.shape)

    def _dim(self, size: int | torch.SymInt, node: Node) -> Dim:
        if isinstance(size, int):
            return size
        if size.node.expr.is_Integer:
            return int(size.node.expr)  # computed from others, but the same for all
        factor, rest = size.node.expr.as_coeff_Mul()
        if not rest.is_Symbol or not factor.is_Integer:
            raise self.error(node, f"dimension {size} is not a multiple of the token count")
        return TOKENS * int(factor)

    def dtype(self, node: Node) -> str:
        dtype = node.meta["val"].dtype
        if dtype not in DTYPES:
            raise self.error(node, f"element type {dtype} has no place in a traced graph")
        return DTYPES[dtype]

    # --- in-place writes ------------------------------------------------------------------------

    def rebind(self, node: Node, item: Item, writer: Node) -> None:
        """Let `node` mean a new value, because `writer` wrote to it in place.

        Every other view of the same memory becomes unreadable, except that what a `select` was
        taken from stays readable at other indices.
        """
        root = node
        while root in self._views:
            root = self._views[root]
        if root.op == "placeholder":
            raise self.error(writer, "in-place write to an input or a weight")
        parent, chosen = self._views.get(node), node.args[1:3]
        stays_readable = str(node.target) == "aten.select.int" and parent not in self._stale
        self._stale |= {view for view in (root, *self._views) if self._has_root(view, root)}
        self._stale.discard(node)
        if (
            parent is not None
            and stays_readable
            and self._partly_stale.setdefault(parent, chosen) == chosen
        ):
            self._stale.discard(parent)
        self._items[node] = item

    def _has_root(self, node: Node, root: Node) -> bool:
        while node in self._views:
            node = self._views[node]
        return node is root

    def _check_fresh(self, node: Node, reader: Node) -> None:
        is_stale = node in self._stale
        if node in self._partly_stale:
            axis, index = self._partly_stale[node]
            is_select = str(reader.target) == "aten.select.int" and reader.args[1] == axis
            is_stale |= not is_select or reader.args[2] == index
        if is_stale:
            raise self.error(reader, f"reads {node.name} after an in-place write through a view")


def _weight_names(program: ExportedProgram, put_before: str) -> dict[str, str]:
    """Map each parameter to its canonical name; tied parameters share the first one's."""
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for target, tensor in program.state_dict.items():
        prefix = next((prefix for prefix in _WRAPPERS if target.startswith(prefix)), "")
        names[target] = first.setdefault(id(tensor), put_before + target.removeprefix(prefix))
    return names
