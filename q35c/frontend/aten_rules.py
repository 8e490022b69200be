"""Import rules, one per ATen op that the models use. Anything else is refused by the importer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from q35c.frontend.import_state import ImportState, Item, Made
from q35c.ir import Attrs, Value
from q35c.ir.ops import symbolic_product
from q35c.ir.types import Dim, Shape, SymDim

Rule = Callable[[ImportState, Node], Made]
RULES: dict[str, Rule] = {}
VIEWS: set[str] = set()  # results share memory with the first operand
IGNORED = {
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten.sym_constrain_range_for_size.default",
    "aten.zeros.default",  # who reads it is refused
}
_END = (1 << 63) - 1


def rule(*names: str, view: bool = False) -> Callable[[Rule], Rule]:
    """Register an import rule under the ops' full names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        if view:
            VIEWS.update(names)
        return function

    return register


def arguments(node: Node) -> tuple[Any, ...]:
    """Return a node's positional arguments; the op's schema says what they are."""
    return node.args


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    return arguments(node)[index] if len(node.args) > index else node.kwargs.get(name, default)


# --- shapes ---------------------------------------------------------------------------------------


def reshaped(imp: ImportState, value: Value, shape: Shape) -> Value:
    """Reshape unless the shape is already right."""
    return value if value.type.shape == shape else imp.emit("reshape", value, shape=shape)


def without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def batch_after_reshape(item: Item, shape: Shape) -> int | None:
    """Find the batch axis again after a reshape to `shape`.

    It is a 1 with as many elements before it as before. A tensor that had lost the axis gets it
    back when a leading 1 appears before the tokens.
    """
    if item.batch is None:
        gains_one = len(shape) > 1 and shape[0] == 1 and item.shape[0] != 1
        return 0 if gains_one and any(isinstance(dim, SymDim) for dim in shape) else None
    before = symbolic_product(item.shape[: item.batch])
    found = (i for i, d in enumerate(shape) if d == 1 and symbolic_product(shape[:i]) == before)
    return next(found, None)


@rule(
    *("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"),
    *("aten.unsqueeze.default", "aten.squeeze.dim", "aten.flatten.using_ints"),
    view=True,
)
def import_reshape(imp: ImportState, node: Node) -> Item:
    item, shape = imp.item(arguments(node)[0], node), imp.shape(node)
    batch = batch_after_reshape(item, shape)
    return Item(reshaped(imp, item.value, without(shape, batch)), batch)


@rule("aten.expand.default", view=True)
def import_expand(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    if item.shape != imp.shape(node):
        raise imp.error(node, "expand that repeats data")
    return item


@rule("aten.transpose.int", "aten.permute.default", view=True)
def import_transpose(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    if str(node.target) == "aten.permute.default":
        order = [dim % item.rank for dim in arguments(node)[1]]
    else:
        order = list(range(item.rank))
        a, b = arguments(node)[1] % item.rank, arguments(node)[2] % item.rank
        order[a], order[b] = order[b], order[a]
    batch = None if item.batch is None else order.index(item.batch)
    perm = tuple(axis for axis in (item.axis(dim) for dim in order) if axis is not None)
    if perm == tuple(range(len(perm))):
        return Item(item.value, batch)
    return Item(imp.emit("transpose", item.value, perm=perm), batch)


def sliced(imp: ImportState, node: Node, item: Item, dim: int, bounds: tuple[Any, ...]) -> Item:
    """Take start:stop:step of one dim; the whole of a dim is the item itself."""
    size, axis = item.shape[dim % item.rank], item.axis(dim)
    start, stop, step = bounds
    if start == 0 and step == 1 and stop in (size, _END):
        return item
    if axis is None or not isinstance(size, int) or not all(isinstance(b, int) for b in bounds):
        raise imp.error(node, "slice of the batch or token axis")
    stop = min(stop, size)
    made = imp.emit("slice", item.value, axis=axis, start=start, stop=stop, step=step)
    return Item(made, item.batch)


def slice_bounds(node: Node, size: Dim) -> tuple[int, Dim, Dim, int]:
    """Return dim, start, stop, step of an `aten.slice` node, negatives resolved."""
    dim = argument(node, 1, "dim", 0)
    start, stop = argument(node, 2, "start") or 0, argument(node, 3, "end")
    stop = _END if stop is None else stop
    if isinstance(size, int):
        start, stop = (b + size if isinstance(b, int) and b < 0 else b for b in (start, stop))
    return dim, start, stop, argument(node, 4, "step", 1)


@rule("aten.slice.Tensor", view=True)
def import_slice(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    size = item.shape[argument(node, 1, "dim", 0) % item.rank]
    dim, *bounds = slice_bounds(node, size)
    return sliced(imp, node, item, dim, tuple(bounds))


@rule("aten.select.int", view=True)
def import_select(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    return selected(imp, node, item, arguments(node)[1] % item.rank, arguments(node)[2])


def selected(imp: ImportState, node: Node, item: Item, dim: int, index: int) -> Item:
    """Take one index of a dim, which goes."""
    if item.axis(dim) is None:
        return Item(item.value)
    size = item.shape[dim]
    index = index + size if index < 0 and isinstance(size, int) else index
    one = sliced(imp, node, item, dim, (index, index + 1, 1))
    batch = None if item.batch is None else item.batch - (dim < item.batch)
    shape = without(without(one.shape, dim), batch)
    return Item(reshaped(imp, one.value, shape), batch)


@rule("aten.split_with_sizes.default", "aten.split.Tensor", "aten.chunk.default", view=True)
def import_split(imp: ImportState, node: Node) -> tuple[Item, ...]:
    item = imp.item(arguments(node)[0], node)
    dim = argument(node, 2, "dim", 0)
    axis = dim % item.rank
    sizes = [imp.shape_of(part, node)[axis] for part in node.meta["val"]]
    made, start = [], 0
    for size in sizes:
        if not isinstance(size, int):
            raise imp.error(node, "split of the token axis")
        made.append(sliced(imp, node, item, dim, (start, start + size, 1)))
        start += size
    return tuple(made)


@rule("aten.unbind.int", view=True)
def import_unbind(imp: ImportState, node: Node) -> tuple[Item, ...]:
    item = imp.item(arguments(node)[0], node)
    dim = argument(node, 1, "dim", 0) % item.rank
    return tuple(selected(imp, node, item, dim, i) for i in range(len(node.meta["val"])))


@rule("<built-in function getitem>", view=True)
def import_getitem(imp: ImportState, node: Node) -> Item:
    source, index = arguments(node)
    return imp.items(source)[index]


@rule("aten.cat.default")
def import_cat(imp: ImportState, node: Node) -> Item:
    items = [imp.item(part, node) for part in arguments(node)[0]]
    axis = items[0].axis(argument(node, 1, "dim", 0))
    if axis is None or len({item.batch for item in items}) != 1:
        raise imp.error(node, "concatenation along the batch axis")
    return Item(imp.emit("concat", *(item.value for item in items), axis=axis), items[0].batch)


# --- elementwise ----------------------------------------------------------------------------------


def aligned(imp: ImportState, a: Item, b: Item) -> tuple[Value, Value, int | None]:
    """Return two operands without batch axes that still broadcast, and the result's batch axis."""
    rank = max(a.rank, b.rank)
    places = {item.rank - item.batch for item in (a, b) if item.batch is not None}
    if not places:
        return a.value, b.value, None
    place = max(places)  # counted from the right
    values = []
    for item in (a, b):
        batch = item.rank - place
        if batch >= 0 and (len(places) > 1 or item.shape[batch] != 1):
            # The batch axis meets a real one: keep it as an ordinary axis of one.
            return reshaped(imp, a.value, a.shape), reshaped(imp, b.value, b.shape), None
        values.append(
            item.value if batch < 0 else reshaped(imp, item.value, without(item.shape, batch))
        )
    return values[0], values[1], rank - place


def import_binary(kind: str) -> Rule:
    def import_op(imp: ImportState, node: Node) -> Item:
        if node.kwargs:
            raise imp.error(node, f"options {dict(node.kwargs)}")
        a, b = arguments(node)[:2]
        if isinstance(b, (int, float)) and kind != "div":
            item = imp.item(a, node)
            return Item(imp.emit(f"{kind}_scalar", item.value, value=float(b)), item.batch)
        left, right, batch = aligned(imp, imp.item(a, node), imp.item(b, node))
        return Item(imp.emit(kind, left, right), batch)

    return import_op


def import_unary(kind: str) -> Rule:
    def import_op(imp: ImportState, node: Node) -> Item:
        if len(node.args) > 1 or node.kwargs:
            raise imp.error(node, f"options {arguments(node)[1:]} {dict(node.kwargs)}")
        item = imp.item(arguments(node)[0], node)
        return Item(imp.emit(kind, item.value), item.batch)

    return import_op


for _kind in ("add", "mul", "div"):
    RULES[f"aten.{_kind}.Tensor"] = import_binary(_kind)
for _kind in ("neg", "exp", "sigmoid", "silu", "softplus", "rsqrt", "cos", "sin"):
    RULES[f"aten.{_kind}.default"] = import_unary(_kind)


@rule("aten.pow.Tensor_Scalar")
def import_pow(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    return Item(imp.emit("pow_scalar", item.value, exponent=float(arguments(node)[1])), item.batch)


@rule(
    *("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.type_as.default"),
    *("aten.alias.default", "aten.detach.default", "aten.contiguous.default"),
    view=True,
)
@rule("aten._to_copy.default", "aten.clone.default")
def import_cast(imp: ImportState, node: Node) -> Item:
    item, dtype = imp.item(arguments(node)[0], node), imp.dtype(node)
    if item.value.type.dtype == dtype:
        return item
    return Item(imp.emit("cast", item.value, dtype=dtype), item.batch)


@rule("aten.div_.Tensor")
def import_div_in_place(imp: ImportState, node: Node) -> Item:
    made = import_binary("div")(imp, node)
    assert isinstance(made, Item)
    imp.rebind(arguments(node)[0], made, node)
    return made


@rule("aten.copy_.default")
def import_copy_in_place(imp: ImportState, node: Node) -> None:
    """Write into a slice: the tensor it was taken from becomes a new value."""
    target, source = arguments(node)[:2]
    if str(target.target) != "aten.slice.Tensor":
        raise imp.error(node, "in-place copy into something else than a slice")
    whole = arguments(target)[0]
    base, update = imp.item(whole, node), imp.item(source, node)
    size = base.shape[argument(target, 1, "dim", 0) % base.rank]
    dim, start, _, step = slice_bounds(target, size)
    axis = base.axis(dim)
    if axis is None or update.batch != base.batch or update.shape != imp.shape(target):
        raise imp.error(node, "in-place copy of another shape")
    made = imp.emit("slice_update", base.value, update.value, axis=axis, start=start, step=step)
    imp.rebind(whole, Item(made, base.batch), node)


# --- reductions, products, composites ------------------------------------------------------------


@rule("aten.mean.dim", "aten.sum.dim_IntList")
def import_reduction(imp: ImportState, node: Node) -> Item:
    item, dims = imp.item(arguments(node)[0], node), arguments(node)[1]
    axis = item.axis(dims[0]) if len(dims) == 1 else None
    if axis is None or node.kwargs:
        raise imp.error(node, "reduction over the batch or over several axes")
    kind = "mean" if str(node.target) == "aten.mean.dim" else "sum"
    made = Item(imp.emit(kind, item.value, axis=axis), item.batch)
    if argument(node, 2, "keepdim", False):
        return made
    dim = dims[0] % item.rank
    batch = None if made.batch is None else made.batch - (dim < made.batch)
    return Item(reshaped(imp, made.value, without(without(made.shape, dim), batch)), batch)


@rule("aten.softmax.int")
def import_softmax(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    axis = item.axis(arguments(node)[1])
    if axis is None or imp.dtype(node) != item.value.type.dtype:
        raise imp.error(node, "softmax over the batch or to another element type")
    return Item(imp.emit("softmax", item.value, axis=axis), item.batch)


@rule("aten.topk.default")
def import_topk(imp: ImportState, node: Node) -> tuple[Item, ...]:
    item, k = imp.item(arguments(node)[0], node), arguments(node)[1]
    is_plain = argument(node, 3, "largest", True) and argument(node, 4, "sorted", True)
    if item.axis(argument(node, 2, "dim", -1)) != item.value.type.rank - 1 or not is_plain:
        raise imp.error(node, "top-k other than the largest of the last axis, sorted")
    values, indices = imp.builder.append("topk", (item.value,), Attrs.of({"k": k}))
    return Item(values, item.batch), Item(indices, item.batch)


@rule("aten.embedding.default")
def import_embedding(imp: ImportState, node: Node) -> Item:
    table, tokens = (imp.item(operand, node) for operand in arguments(node)[:2])
    return Item(imp.emit("embedding", tokens.value, table.value), tokens.batch)


@rule("aten.linear.default")
def import_linear(imp: ImportState, node: Node) -> Item:
    item, weight = (imp.item(operand, node) for operand in arguments(node)[:2])
    product = imp.emit("linear", item.value, weight.value)
    if (bias := argument(node, 2, "bias")) is not None:
        product = imp.emit("add", product, imp.item(bias, node).value)
    return Item(product, item.batch)


@rule("aten.layer_norm.default")
def import_layer_norm(imp: ImportState, node: Node) -> Item:
    x, shape = imp.item(arguments(node)[0], node), arguments(node)[1]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    if len(shape) != 1 or weight is None or bias is None:
        raise imp.error(node, "layer norm of several axes, or without weight and bias")
    operands = (x.value, *(imp.item(operand, node).value for operand in (weight, bias)))
    return Item(
        imp.emit("layer_norm", *operands, eps=float(argument(node, 4, "eps", 1e-5))), x.batch
    )


@rule("aten.gelu.default")
def import_gelu(imp: ImportState, node: Node) -> Item:
    item = imp.item(arguments(node)[0], node)
    form = {"none": "erf", "tanh": "tanh"}[argument(node, 1, "approximate", "none")]
    return Item(imp.emit("gelu", item.value, form=form), item.batch)


def batchless(imp: ImportState, node: Node, index: int) -> Value:
    """Return an operand whose leading batch axis is gone."""
    item = imp.item(arguments(node)[index], node)
    if item.shape[0] != 1:
        raise imp.error(node, f"operand {index} has no leading batch axis of one")
    return reshaped(imp, item.value, item.shape[1:])


@rule("q35c.causal_conv.default")
def import_causal_conv(imp: ImportState, node: Node) -> Item:
    weight = imp.item(arguments(node)[1], node).value
    return Item(imp.emit("causal_conv", batchless(imp, node, 0), weight), 0)


@rule("q35c.delta_rule.default")
def import_delta_rule(imp: ImportState, node: Node) -> Item:
    operands = [batchless(imp, node, index) for index in range(5)]
    return Item(imp.emit("delta_rule", *operands), 0)


@rule("q35c.attention.default", "q35c.full_attention.default")
def import_attention(imp: ImportState, node: Node) -> Item:
    operands = [batchless(imp, node, index) for index in range(3)]
    kind = str(node.target).split(".")[1]
    return Item(imp.emit(kind, *operands, scale=float(arguments(node)[3])), 0)


@rule("q35c.experts.default")
def import_experts(imp: ImportState, node: Node) -> Item:
    operands = [imp.item(operand, node) for operand in arguments(node)]
    if any(item.batch is not None for item in operands):
        raise imp.error(node, "experts of a batched tensor")
    return Item(imp.emit("experts", *(item.value for item in operands)))
