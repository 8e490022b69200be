"""Change a detail of a graph: what a pass looks for becomes what it only resembles."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from q35c.errors import VerifyError
from q35c.ir import Attrs, Builder, Graph, Op, Value
from q35c.ir.text import parse_graph, print_graph

ALIKE = (
    ("neg", "exp", "sigmoid", "silu", "softplus", "rsqrt", "cos", "sin"),
    ("add", "mul", "div"),
    ("add_scalar", "mul_scalar"),
    ("mean", "sum", "softmax"),
)
TRIES = 60


def fixed_tokens(graph: Graph, tokens: int) -> Graph:
    """Give T a size: now T may be mistaken for any dimension that is as large."""
    text = re.sub(r"(\d+)\*T\b", lambda m: str(int(m[1]) * tokens), print_graph(graph))
    return parse_graph(re.sub(r"(?<![%@.\w])T\b", str(tokens), text))


def mutants(graph: Graph, rng: np.random.Generator, count: int) -> Iterator[Graph]:
    """Yield up to `count` well-typed graphs with one to three details changed."""
    for _ in range(count * TRIES):
        if count == 0:
            return
        try:
            changed = graph
            if rng.random() < 0.4:
                changed = fixed_tokens(graph, int(rng.choice([1, 2, 4])))
            for _ in range(rng.integers(1, 4)):
                changed = mutate(changed, rng)
        except VerifyError:
            continue
        if print_graph(changed) != print_graph(graph):
            count -= 1
            yield changed


def mutate(graph: Graph, rng: np.random.Generator) -> Graph:
    """Change one op and build the graph anew; VerifyError if it does not fit any more."""
    builder = Builder(graph.name, graph.stage)
    for value in graph.inputs:
        builder.input(value.name, value.type)
    target = int(rng.integers(len(graph.ops)))
    known = [*graph.inputs, *graph.leaves("weight"), *graph.leaves("state")]
    renamed: dict[Value, Value] = {}
    for number, op in enumerate(graph.ops):
        changed = change(op, known, rng) if number == target else op
        operands = [renamed.get(v, v) for v in changed.operands]
        results = builder.append(changed.kind, operands, changed.attrs)
        renamed.update(zip(op.results, results, strict=True))
        known += op.results
    outputs = [*graph.outputs]
    if rng.random() < 0.2:  # let a value in the middle be read elsewhere
        outputs.append(graph.ops[int(rng.integers(len(graph.ops)))].results[0])
    return builder.finish(renamed.get(v, v) for v in dict.fromkeys(outputs))


def change(op: Op, known: list[Value], rng: np.random.Generator) -> Op:
    """Return an op with another operand, attribute or kind."""
    kind, operands, attrs = op.kind, list(op.operands), op.attrs.to_dict()
    options = ["operand"] * bool(operands) + ["attribute"] * bool(attrs)
    alike = next((group for group in ALIKE if kind in group), ())
    options += ["kind"] * bool(alike) + ["order"] * (len(operands) > 1)
    option = rng.choice(options)
    if option == "kind":
        kind = str(rng.choice(alike))
        attrs = attrs if kind != "softmax" else {"axis": -1}
    elif option == "order":
        i, j = rng.choice(len(operands), 2, replace=False)
        operands[i], operands[j] = operands[j], operands[i]
    elif option == "operand":
        i = int(rng.integers(len(operands)))
        fitting = [v for v in known if v.type == operands[i].type]
        operands[i] = fitting[rng.integers(len(fitting))]
    else:
        name = str(rng.choice(sorted(attrs)))
        attrs[name] = other_attribute(attrs[name], rng)
    return Op(kind, tuple(operands), Attrs.of(attrs), op.results)


def other_attribute(attr, rng: np.random.Generator):
    """Return an attribute nearby: other numbers, another order, one dimension split in two."""
    if isinstance(attr, int):
        moved = attr + int(rng.choice([-2, -1, 1, 2]))
        return moved if moved > 0 or attr <= 0 else attr
    if isinstance(attr, float):
        return attr * float(rng.choice([0.5, 2.0])) + float(rng.choice([0.0, 1.0]))
    if isinstance(attr, tuple) and attr:
        items = list(attr)
        i, j = rng.integers(0, len(items), 2)
        items[i], items[j] = items[j], items[i]
        return tuple(items[1:] + items[:1]) if rng.random() < 0.3 else tuple(items)
    return attr
