"""The pipeline: one flat list of passes, with a dump of the IR after each that changed something."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from q35c.ir.graph import Graph, Module
from q35c.ir.precision import POLICIES, Policy
from q35c.ir.text import print_module
from q35c.ir.verify import verify
from q35c.outputs import write_output
from q35c.passes.accept_rows import accept_rows
from q35c.passes.canonicalize import canonicalize
from q35c.passes.fold_moe import fold_moe
from q35c.passes.fold_shared_expert import fold_shared_expert
from q35c.passes.fuse_attention import fuse_attention
from q35c.passes.fuse_bias import fuse_bias
from q35c.passes.fuse_gated_delta import fuse_gated_delta
from q35c.passes.fuse_interpolation import fuse_interpolation
from q35c.passes.fuse_linear import fuse_linear
from q35c.passes.fuse_norm import fuse_norm
from q35c.passes.fuse_picture_attention import fuse_picture_attention
from q35c.passes.fuse_pixels import fuse_pixels
from q35c.passes.fuse_rotary import fuse_rotary
from q35c.passes.fuse_rounding import fuse_rounding
from q35c.passes.introduce_state import introduce_state
from q35c.passes.quantize import quantize
from q35c.passes.schedule_attention import schedule_attention
from q35c.passes.split_entries import split_entries


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller decides.

    The precision, into how many parts decode splits the cells of so many key heads, and whether rows of images may
    stand in place of tokens.
    """

    policy: Policy
    decode_splits: Callable[[int], int] = lambda kv_heads: 1
    takes_rows: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """A row of the pipeline: what is done to a module, and the stage at which that is."""

    name: str
    stage: str
    run: Callable[[Module, Choices], Module]


def each(stage: str, step: Callable[[Graph], Graph]) -> Pass:
    """Return the pass that changes every graph by itself."""
    return Pass(step.__name__, stage, lambda module, _: module.map(step))


FUSED, STATEFUL, QUANTIZED, SCHEDULED = "fused", "stateful", "quantized", "scheduled"
PIPELINE: tuple[Pass, ...] = (
    each(FUSED, canonicalize),
    each(FUSED, fuse_norm),
    each(FUSED, fuse_rotary),
    each(FUSED, fuse_gated_delta),
    each(FUSED, fold_moe),
    each(FUSED, fuse_attention),
    # Of a vision tower.
    each(FUSED, fuse_pixels),
    each(FUSED, fuse_interpolation),
    each(FUSED, fuse_picture_attention),
    each(FUSED, fuse_bias),
    each(FUSED, canonicalize),
    each(FUSED, fuse_linear),
    each(FUSED, canonicalize),
    Pass("accept_rows", FUSED, lambda module, to: module.map(accept_rows) if to.takes_rows else module),
    each(STATEFUL, introduce_state),
    Pass("split_entries", STATEFUL, lambda module, _: module.map_to_several(split_entries)),
    Pass("quantize", QUANTIZED, lambda module, to: quantize(module, to.policy)),
    Pass(
        "schedule_attention",
        SCHEDULED,
        lambda module, to: schedule_attention(
            module, to.policy.cache, to.decode_splits, to.policy.picture_cache
        ),
    ),
    each(SCHEDULED, fold_shared_expert),
    each(SCHEDULED, fuse_rounding),
)  # fmt: skip
FUSION = tuple(row for row in PIPELINE if row.stage == FUSED)


def fuse(graph: Graph, passes: Iterable[Pass] = FUSION) -> Graph:
    """Take a traced graph to the fused stage: composites only, no state."""
    (fused,) = run_passes(Module((graph,)), passes, Choices(POLICIES["f32"]))
    return fused


def run_pipeline(
    graph: Graph, choices: Choices, dump: Path | None = None, tower: Graph | None = None
) -> Module:
    """Take a traced graph, and a vision tower's behind it, to the entries that code generation lowers."""
    graphs = (graph,) if tower is None else (graph, tower)
    return run_passes(Module(graphs), PIPELINE, choices, dump)


def run_passes(
    module: Module, passes: Iterable[Pass], choices: Choices, dump: Path | None = None
) -> Module:
    """Run passes one after another; every graph between two of them is verified."""
    write_dump(dump, 0, "import", module)
    for number, row in enumerate(passes, 1):
        before = module.map(lambda graph, stage=row.stage: graph.with_stage(stage))
        module = row.run(before, choices).map(verify)
        if module != before:
            write_dump(dump, number, row.name, module)
    return module


def write_dump(directory: Path | None, number: int, name: str, module: Module) -> None:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        text = print_module(module)
        write_output(directory / f"{number:02}_{name}.txt", text.encode())
