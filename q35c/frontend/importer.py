"""Turn an exported program into an IR graph of stage "traced": walk it once, in order, by a rule for each op."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from q35c.frontend.aten_rules import IGNORED, RULES, VIEWS
from q35c.frontend.import_state import ImportState
from q35c.ir import Graph


def import_program(program: ExportedProgram, name: str = "forward", prefix: str = "") -> Graph:
    """Convert a program made by `trace_model`, (tokens i32[T], positions i32[3, T]) -> f32[T, V], or by `trace_tower`.

    Weights carry canonical names, behind a prefix. Raises InternalError, naming node and op, for an op without an
    import rule.
    """
    state = ImportState(program, name, prefix)
    nodes = list(program.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            state.declare_input(node)
        elif node.op == "call_function" and not _is_symbolic(node):
            _import_call(state, node)
        elif node.op not in ("call_function", "output"):
            raise state.error(node, f"unexpected node kind {node.op}")
    (result,) = nodes[-1].args[0]
    return state.builder.finish([state.item(result, nodes[-1]).value])


def _import_call(state: ImportState, node: Node) -> None:
    name = str(node.target)
    if name in IGNORED:
        return
    if name not in RULES:
        raise state.error(node, f"no import rule for op {name}")
    made = RULES[name](state, node)
    # The results of top-k are memory of their own, those of a split are not.
    source: Any = node.args[0] if name in VIEWS else None  # of a view it is a node
    is_own = node.target is getitem and str(source.target) not in VIEWS
    state.keep(node, made, None if is_own else source)


def _is_symbolic(node: Node) -> bool:
    """Tell whether a node computes a size; sizes are read from the tensors' shapes instead."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int, torch.SymBool, bool))
