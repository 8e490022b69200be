"""The text form of graphs. `parse_graph(print_graph(g)) == g` for every graph.

graph forward traced {
  input %tokens: i32[T]
  weight @embed_tokens.weight: f32[320, 64]
  %0: f32[T, 64] = embedding(%tokens, @embed_tokens.weight)
  %1: f32[T, 64] = mul_scalar(%0) {value = 2.0}
  return %1
}
"""

from __future__ import annotations

import re

from q35c.errors import VerifyError
from q35c.ir.graph import SIGILS, Attr, Attrs, Graph, Module, Op, Value
from q35c.ir.types import Dim, SymDim, TensorType
from q35c.ir.verify import verify

KINDS = {sigil: kind for kind, sigil in SIGILS.items()}
LINE = re.compile(
    r"(?P<results>.+?) = (?P<kind>\w+)\((?P<operands>[^)]*)\)(?: \{(?P<attrs>.*)\})?$"
)
TYPED = re.compile(r"(?P<sigil>[%@$])(?P<name>[\w.]+): (?P<dtype>\w+)\[(?P<dims>[^\]]*)\]")
TOKEN = re.compile(
    r'\s*(?:(?P<string>"[^"]*")|(?P<number>-?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf)(?!\*|\w))|'
    r"(?P<dim>(?:\d+\*)?[A-Za-z_]\w*)|(?P<mark>[(),=]))"
)


def print_attr(attr: Attr) -> str:
    if isinstance(attr, bool):
        return str(attr).lower()
    if isinstance(attr, str):
        return f'"{attr}"'
    if isinstance(attr, tuple):
        return f"({', '.join(map(print_attr, attr))}{',' if len(attr) == 1 else ''})"
    return repr(attr) if isinstance(attr, int | float) else str(attr)


def print_op(op: Op) -> str:
    results = ", ".join(f"{r}: {r.type}" for r in op.results)
    attrs = ", ".join(f"{name} = {print_attr(value)}" for name, value in op.attrs)
    operands = ", ".join(map(str, op.operands))
    return f"{results} = {op.kind}({operands})" + (f" {{{attrs}}}" if attrs else "")


def print_graph(graph: Graph) -> str:
    """Return the text of a graph."""
    lines = [f"input {v}: {v.type}" for v in graph.inputs]
    lines += [f"weight {v}: {v.type}" for v in graph.leaves("weight")]
    lines += [f"state {v}: {v.type}" for v in graph.leaves("state")]
    lines += map(print_op, graph.ops)
    lines.append(f"return {', '.join(map(str, graph.outputs))}".rstrip())
    body = "".join(f"  {line}\n" for line in lines)
    return f"graph {graph.name} {graph.stage} {{\n{body}}}\n"


def print_module(module: Module) -> str:
    """Return the text of all entries, one after another."""
    return "\n".join(map(print_graph, module))


def parse_dim(text: str) -> Dim:
    if re.fullmatch(r"\d+", text):
        return int(text)
    factor, _, name = text.rpartition("*")
    return SymDim(name, int(factor or 1))


def parse_typed(text: str) -> Value:
    match = TYPED.fullmatch(text)
    if match is None:
        raise VerifyError("cannot parse a typed value", where="IR text", got=text)
    dims = tuple(parse_dim(d) for d in match["dims"].split(", ") if d)
    return Value(match["name"], TensorType(match["dtype"], dims), KINDS[match["sigil"]])  # type: ignore[arg-type]


def parse_attrs(text: str) -> Attrs:
    tokens = [(m.lastgroup, m.group(m.lastgroup)) for m in TOKEN.finditer(text)]  # type: ignore[arg-type]
    attrs: dict[str, Attr] = {}
    position = 0
    while position < len(tokens):
        name = tokens[position][1]
        attrs[name], position = parse_value(tokens, position + 2)
        position += 1  # the comma
    return Attrs.of(attrs)


def parse_value(tokens: list[tuple[str | None, str]], position: int) -> tuple[Attr, int]:
    group, text = tokens[position]
    if group == "string":
        return text[1:-1], position + 1
    if group == "number":
        return (int(text) if re.fullmatch(r"-?\d+", text) else float(text)), position + 1
    if group == "dim":
        return (text == "true" if text in ("true", "false") else parse_dim(text)), position + 1
    items: list[Attr] = []
    position += 1  # the opening bracket
    while tokens[position][1] != ")":
        if tokens[position][1] == ",":
            position += 1
            continue
        item, position = parse_value(tokens, position)
        items.append(item)
    return tuple(items), position + 1


def parse_graph(text: str) -> Graph:
    """Read the text of one graph and verify it; VerifyError names the line that cannot be read."""
    header, *lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    words = header.split()
    if len(words) != 4 or words[0] != "graph" or lines[-1:] != ["}"]:
        raise VerifyError("cannot parse a graph header", where="IR text", got=header)
    known: dict[str, Value] = {}
    inputs: list[Value] = []
    ops: list[Op] = []
    outputs: tuple[Value, ...] = ()
    for line in lines[:-1]:
        word, _, rest = line.partition(" ")
        if word in ("input", "weight", "state"):
            value = parse_typed(rest)
            known[str(value)] = value
            if word == "input":
                inputs.append(value)
        elif word == "return":
            outputs = resolve(line, rest, known)
        else:
            ops.append(op := parse_op(line, known))
            known.update({str(result): result for result in op.results})
    return verify(Graph(words[1], words[2], tuple(inputs), tuple(ops), outputs))


def parse_op(line: str, known: dict[str, Value]) -> Op:
    match = LINE.fullmatch(line)
    if match is None:
        raise VerifyError("cannot parse an op", where="IR text", got=line)
    results = tuple(parse_typed(m.group()) for m in TYPED.finditer(match["results"]))
    operands = resolve(line, match["operands"], known)
    try:
        attrs = parse_attrs(match["attrs"] or "")
    except (IndexError, ValueError) as problem:
        raise VerifyError("cannot parse attributes", where="IR text", got=line) from problem
    return Op(match["kind"], operands, attrs, results)


def resolve(line: str, text: str, known: dict[str, Value]) -> tuple[Value, ...]:
    """Look up a comma-separated list of values."""
    names = [name for name in text.split(", ") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise VerifyError("undefined values", where=f"IR text: {line}", got=unknown)
    return tuple(known[name] for name in names)
