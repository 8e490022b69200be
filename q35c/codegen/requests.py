"""What rules of lowering (lower.py) work with: kernels, packed weights and buffers by request, and kernel calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from q35c.artifact.tower import EMBEDDINGS, PATCHES
from q35c.codegen.backend import Backend, KernelKey
from q35c.codegen.calls import Int, Tid, Tokens
from q35c.codegen.pack import PackedWeight
from q35c.codegen.schedule import (
    Arrivals,
    Buffer,
    Schedule,
    StateRef,
    Step,
    StepArgument,
    View,
    WeightRef,
)
from q35c.errors import LoweringError
from q35c.formats.registry import integer_format, is_row_format
from q35c.ir.graph import Graph, Op, Value, producers
from q35c.ir.types import SymDim
from q35c.layouts.rows import RowLayout, row_words
from q35c.layouts.weights import LINE_WORDS, WeightLayout


@dataclass(slots=True)
class Shared:
    """What the entries of one model share: kernels, packed weights, the layout of a sequence's state."""

    backend: Backend
    context: int
    io_tokens: int  # row stride of the positions in the io blob
    state_offsets: Mapping[str, int]
    kernels: dict[KernelKey, str] = field(default_factory=dict)
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    row_layouts: dict[str, RowLayout] = field(default_factory=dict)  # of rounded rows, by dtype
    counters: int = 0  # the most that a kernel needs at once

    def kernel(self, family: str, **parameters: Any) -> str:
        """Return the name of a kernel; equal requests share one."""
        key = (family, tuple(sorted(parameters.items())))
        return self.kernels.setdefault(key, f"{family}_{len(self.kernels)}")

    def state(self, *tensors: Value) -> StateRef:
        """Return where state tensors start, the first of them, in every sequence's region."""
        names = tuple(tensor.name for tensor in tensors)
        return StateRef(self.state_offsets[names[0]], names)

    def row_words(self, dtype: str, width: int) -> int:
        """Return the 4-byte words of one row of activations; rounded rows have a layout of their own."""
        if not is_row_format(dtype):
            return width
        layout = self.row_layouts.setdefault(dtype, self.backend.row_layout(dtype))
        words = row_words(layout, dtype, width)
        if words is None:
            raise LoweringError(
                "the backend's layout holds no such rows", expected=dtype, got=layout
            )
        return words

    def arrivals(self, counters: int) -> Arrivals:
        """Request counters for a kernel whose threads meet at groups."""
        self.counters = max(self.counters, counters)
        return Arrivals()

    def weight(self, layout: WeightLayout, *sources: Value) -> WeightRef:
        """Request a packed weight; equal requests share one."""
        leaves = [source.name.removesuffix(".weight") for source in sources]
        name = "-".join([leaves[0], *(leaf.rpartition(".")[2] for leaf in leaves[1:])])
        shapes = tuple(tuple(int(d) for d in source.type.shape) for source in sources)  # type: ignore[arg-type]
        packed = PackedWeight(
            name, layout, sources[0].type.dtype, tuple(s.name for s in sources), shapes
        )
        known = self.weights.setdefault(name, packed)
        if known != packed:
            raise LoweringError(
                "a weight is needed in two layouts", where=name, expected=known, got=packed
            )
        return WeightRef(name)


class Lowering:
    """Lower one entry of up to `max_tokens` tokens; the value `logits` is what it returns, in io."""

    def __init__(self, graph: Graph, shared: Shared, max_tokens: int) -> None:
        self.graph, self.shared, self.max_tokens = graph, shared, max_tokens
        self.schedule = Schedule(graph.name)
        self.views: dict[Value, View] = {}
        self.readers: dict[Value, list[Op]] = {}
        for op in graph.ops:
            for value in op.operands:
                self.readers.setdefault(value, []).append(op)
        self.made_by = producers(graph)
        self.logits = graph.outputs[0] if graph.outputs else None
        self.returned = EMBEDDINGS if PATCHES in {v.name for v in graph.inputs} else "logits"
        for value in graph.inputs:
            symbols = [dim for dim in value.type.shape if isinstance(dim, SymDim)]
            self.views[value] = View(value.name, 0, Tokens(symbols[0].factor if symbols else 1))

    # --- buffers -----------------------------------------------------------------------------

    def output(self, value: Value) -> View:
        """Return the rows a result is written to: io for what the entry returns, a new buffer otherwise."""
        words, rows = (
            self.shared.row_words(value.type.dtype, width(value)),
            row_count(value),
        )
        if value == self.logits:
            self.views[value] = View(self.returned, words, rows)
        else:
            is_viewed = any(op.kind == "reshape" for op in self.readers.get(value, ()))
            words = words if is_viewed else spread(words)
            self.views[value] = View(self.buffer(value.name, words, rows), words, rows)
        return self.views[value]

    def exact(self, op: Op) -> View:
        """Return the exact rows of an op: its first result, or rows that nobody reads if it keeps rounded ones only."""
        first = op.results[0]
        if op.attrs.get("is_kept", True):
            return self.output(first)
        words, rows = spread(width(first)), row_count(first)
        return View(self.buffer(f"{first.name}.exact", words, rows), words, rows)

    def rounded_result(self, op: Op) -> tuple[int, View] | None:
        """Return group and rows of an op that rounds its result itself."""
        if "is_kept" not in op.attrs.to_dict():
            return None
        form = integer_format(op.attrs["dtype"])
        if form is None:
            raise LoweringError("only int8 rows are rounded on the way", got=op.attrs["dtype"])
        return form.group, self.output(op.results[-1])

    def temporary(self, label: str, width: int, rows: Tokens | Int) -> View:
        """Return rows of f32 or i32 that only one op uses."""
        name = f"{len(self.schedule.steps)}.{label}"
        return View(self.buffer(name, width, rows), width, rows)

    def buffer(self, name: str, width: int, rows: Tokens | Int) -> Buffer:
        return Buffer(name, 4 * width * self.most(rows))

    def most(self, rows: Tokens | Int) -> int:
        """Return the most rows that there may be."""
        return self.max_tokens * rows.factor if isinstance(rows, Tokens) else rows.value

    def scratch(self, family: str, **parameters: Any) -> View:
        """Return scratch for every thread of a kernel."""
        size = self.shared.backend.scratch_bytes(family, self.max_tokens, parameters)
        return self.temporary("scratch", -(-size // 4), Int(1))

    def rounded(self, x: View, width: int, dtype: str, pairs: int) -> View:
        """Return the rounded rows of a temporary that has `pairs` rows of `width` for each token."""
        q = self.temporary("rounded", pairs * self.shared.row_words(dtype, width), x.rows)
        self.quantize(x, q, width, dtype, pairs)
        return q

    # --- calls -------------------------------------------------------------------------------

    def call(self, family: str, parameters: Mapping[str, Any], /, **pointers: StepArgument) -> None:
        """Append a kernel call. Pointers go by the names that the kernel has for them; the rest of its arguments follows.

        Views that the family's row does not name as written are read. Raises LoweringError for a name that is unknown or
        missing.
        """
        backend = self.shared.backend
        signature = backend.signature(family, parameters)
        if set(pointers) != set(signature.pointers):
            raise LoweringError(
                "a call does not name what its kernel takes",
                where=f"entry {self.graph.name}, {family}",
                expected=sorted(signature.pointers), got=sorted(pointers),
            )  # fmt: skip
        ordered = {name: pointers[name] for name in signature.pointers}
        views = {name: value for name, value in ordered.items() if isinstance(value, View)}
        scalars = {"tokens": rows_of(views.values()), "worker": Tid()}
        scalars |= {f"ld_{name}": Int(view.stride) for name, view in views.items()}
        args = tuple((ordered | scalars)[name] for name in signature.arguments)
        writes = tuple(views[name] for name in views if name in signature.writes)
        reads = tuple(view for view in views.values() if view not in writes)
        states = (value for value in ordered.values() if isinstance(value, StateRef))
        touched = tuple(name for state in states for name in state.tensors)
        kernel, divided = (
            self.shared.kernel(family, **parameters),
            backend.division(family, parameters),
        )
        self.schedule.steps.append(Step(kernel, args, reads, writes, touched, divided))

    def quantize(self, x: View, q: View, width: int, dtype: str, pairs: int = 1) -> None:
        """Append the rounding of rows; a token has `pairs` of them side by side."""
        x, q = x.split(pairs), q.split(pairs)
        if form := integer_format(dtype):
            parameters = {"K": width, "group": form.group, "pairs": pairs}
            self.call("quantize_rows", parameters, x=x, q=q)
        else:
            self.call("round_rows", {"K": width, "pairs": pairs}, x=x, y=q)


def spread(words: int) -> int:
    """Return the stride of long rows: an odd number of cache lines, so that a column's rows do not share a few cache sets."""
    return words + LINE_WORDS if words >= 512 and words % (2 * LINE_WORDS) == 0 else words


def row_count(value: Value) -> Tokens | Int:
    rows = value.type.shape[0]
    return Tokens(rows.factor) if isinstance(rows, SymDim) else Int(rows)


def width(value: Value) -> int:
    return int(value.type.shape[-1])  # type: ignore[arg-type]


def rows_of(views: Iterable[View]) -> Tokens | Int:
    """Return how many rows a call has: T if any of its views has so many; scratch and the like count as one."""
    return next((view.rows for view in views if isinstance(view.rows, Tokens)), Int(1))
