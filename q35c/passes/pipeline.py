"""The pipeline: a flat list of passes, with a dump of the IR after each that changed something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from q35c.ir.graph import Graph, Module
from q35c.ir.precision import Policy
from q35c.ir.text import print_graph, print_module
from q35c.outputs import write_output
from q35c.passes.canonicalize import canonicalize
from q35c.passes.fold_moe import fold_moe
from q35c.passes.fuse_attention import fuse_attention
from q35c.passes.fuse_gated_delta import fuse_gated_delta
from q35c.passes.fuse_linear import fuse_linear
from q35c.passes.fuse_norm import fuse_norm
from q35c.passes.fuse_rotary import fuse_rotary
from q35c.passes.quantize import quantize
from q35c.passes.schedule_attention import schedule_attention
from q35c.passes.split_entries import split_entries
from q35c.passes.thread_state import thread_state

FUSION: tuple[Callable[[Graph], Graph], ...] = (
    canonicalize,
    fuse_norm,
    fuse_rotary,
    fuse_gated_delta,
    fold_moe,
    fuse_attention,
    canonicalize,
    fuse_linear,
    canonicalize,
)


def fuse(graph: Graph, dump: Path | None = None) -> Graph:
    """Take a traced graph to the fused stage: composites only, no state."""
    write_dump(dump, 0, "import", print_graph(graph))
    graph = graph.with_stage("fused")
    for number, step in enumerate(FUSION, 1):
        before, graph = graph, step(graph)
        if graph != before:
            write_dump(dump, number, step.__name__, print_graph(graph))
    return graph


def run_pipeline(graph: Graph, policy: Policy, dump: Path | None = None) -> Module:
    """Take a traced graph to the entries that code generation lowers."""
    graph = thread_state(fuse(graph, dump))
    write_dump(dump, len(FUSION) + 1, "thread_state", print_graph(graph))
    module = split_entries(graph)
    write_dump(dump, len(FUSION) + 2, "split_entries", print_module(module))
    module = quantize(module, policy)
    write_dump(dump, len(FUSION) + 3, "quantize", print_module(module))
    module = schedule_attention(module, policy)
    write_dump(dump, len(FUSION) + 4, "schedule_attention", print_module(module))
    return module


def write_dump(directory: Path | None, number: int, name: str, text: str) -> None:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        write_output(directory / f"{number:02}_{name}.txt", text.encode())
