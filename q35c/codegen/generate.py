"""From the pipeline's entries to machine code, packed weight list and manifest fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from q35c.artifact.entries import Entry, EntrySpec, io_layout
from q35c.artifact.leaves import Io
from q35c.artifact.schema import decode
from q35c.artifact.tower import NAME as VISION
from q35c.artifact.tower import Tower, tower_io
from q35c.artifact.writer import WeightEntry, place_weights
from q35c.codegen.backend import Backend
from q35c.codegen.calls import Pointer, Tokens
from q35c.codegen.pack import PackedWeight
from q35c.codegen.plan_memory import MemoryPlan
from q35c.codegen.requests import Shared
from q35c.codegen.schedule import Places, Schedule, WeightRef
from q35c.ir.graph import Graph, Module, Value
from q35c.ir.precision import Policy
from q35c.ir.types import SymDim
from q35c.layouts import blobs
from q35c.layouts.blobs import GRID
from q35c.layouts.cache import stored_shape
from q35c.vision_config import VisionConfig


@dataclass(frozen=True, slots=True)
class Generated:
    """A compiled model without its weights' data; `fields` are the manifest's code-related fields, `tower` a vision tower's program."""

    segments: Mapping[str, bytes]  # `code`, and what else the target brings
    weights: tuple[PackedWeight, ...]
    entries: tuple[WeightEntry, ...]
    fields: dict[str, Any]
    tower: Tower | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the artifact is compiled for."""

    context: int  # tokens per sequence where the loader does not ask for others, a multiple of 64
    max_context: int  # tokens per sequence that addresses leave room for, a multiple of 64
    batch: int  # sequences per decode step
    vocabulary: int
    hidden: int
    tower: VisionConfig | None = None
    image_tokens: int = 0  # of a picture, a multiple of 16


def generate(
    module: Module,
    backend: Backend,
    policy: Policy,
    limits: Limits,
    progress: Callable[[str, float], None],
    check_weights: Callable[[int], None],
) -> Generated:
    """Lower every entry, plan its memory, build one shared object.

    `check_weights` gets the bytes of the packed weights before any code is made, and may raise.
    """
    progress("lower", 0.0)
    text, towers = split_module(module)
    specs = [entry_spec(graph, backend, limits) for graph in text]
    state = blobs.state_layout(describe_state(module, policy, limits.max_context, backend))
    offsets = {tensor["name"]: tensor["offset"] for tensor in state["tensors"]}
    io = io_layout(specs, limits.vocabulary, limits.hidden, 0)["fields"]
    shared = Shared(backend, limits.max_context, io["positions"]["shape"][-1], offsets)
    schedules = [
        backend.lower(graph, shared, spec.rows) for graph, spec in zip(text, specs, strict=True)
    ]
    first_weight = len(shared.weights)
    seeing = [backend.lower(graph, shared, limits.image_tokens) for graph in towers]
    entries = [
        compiled_entry(spec, schedule, shared)
        for spec, schedule in zip(specs, schedules, strict=True)
    ]
    stored = tuple(map(stored_weight, shared.weights.values()))
    check_weights(sum(weight.bytes for weight in stored))
    places = Places(
        {weight.name: weight.offset for weight in place_weights(stored)},
        io_places(entries, limits, max(len(s.steps) for s in (*schedules, *seeing))),
    )
    plans = {schedule.name: schedule.plan() for schedule in (*schedules, *seeing)}
    clock = Pointer("io", places.io["clock"][0])
    placed = {
        schedule.name: schedule.place(plans[schedule.name], places)
        for schedule in (*schedules, *seeing)
    }
    built = backend.build(shared.kernels, placed, clock, progress)
    fields = {
        "target": built.target,
        "precision": policy.name,
        "context": limits.context,
        "max_context": limits.max_context,
        "batch": limits.batch,
        "entries": entries,
        "row_layouts": shared.row_layouts,
        "arena_bytes": max(plans[schedule.name].bytes for schedule in schedules),
        "max_threads": backend.max_threads,
        "barrier_bytes": barrier_bytes(shared),
        "state": state,
        "kernels": describe_kernels(shared),
        "probes": built.probes,
    }
    segments = {"code": built.code, **built.segments}
    tower = None
    if seeing:
        tower = compiled_tower(seeing[0], plans[VISION], shared, limits, first_weight)
    return Generated(segments, tuple(shared.weights.values()), stored, fields, tower)


def split_module(module: Module) -> tuple[list[Graph], list[Graph]]:
    """Return the entries of text, and the vision tower if there is one."""
    text = [graph for graph in module if graph.name != VISION]
    return text, [graph for graph in module if graph.name == VISION]


def barrier_bytes(shared: Shared) -> int:
    """Return the bytes of the barrier's words and of the counters behind them."""
    return blobs.align(blobs.BARRIER_BYTES + blobs.ELEMENT_BYTES * shared.counters)


def stored_weight(weight: PackedWeight) -> WeightEntry:
    return WeightEntry(weight.name, weight.layout, weight.dtype, weight.matrix, weight.sources)


def entry_spec(graph: Graph, backend: Backend, limits: Limits) -> EntrySpec:
    """Return what an entry takes and returns, as its graph says: B sequences or one, T tokens of each or one.

    T is in whole chunks of the grid, so that a long sequence is cut where it changes no bit, and bounded by the bytes of
    logits of all.
    """
    dims = {dim.name for v in graph.inputs for dim in v.type.shape if isinstance(dim, SymDim)}
    sequences = limits.batch if "B" in dims else 1
    rows = [value.type.shape[0] for value in graph.outputs]
    logits = "none" if not rows else "all" if isinstance(rows[0], SymDim) else "last"
    tokens = backend.prefill_tokens if "T" in dims else 1
    if logits == "all" and tokens > 1:
        fitting = backend.logits_bytes // (4 * limits.vocabulary * sequences) // GRID * GRID
        tokens = min(max(GRID, fitting), tokens)
    inputs: Any = tuple(value.name for value in graph.inputs)
    return EntrySpec(graph.name, sequences, tokens, inputs, logits)


def describe_state(
    module: Module, policy: Policy, context: int, backend: Backend
) -> list[dict[str, Any]]:
    """Return the stored shape of every state tensor, in the layout that the backend uses.

    What does not grow comes first, so that a short session keeps it together in huge pages.
    """
    tensors = [stored_state(v, policy, context, backend) for v in module.entries[0].leaves("state")]
    return sorted(tensors, key=lambda tensor: tensor["layout"] != "plain")


def stored_state(value: Value, policy: Policy, context: int, backend: Backend) -> dict[str, Any]:
    kind = value.name.rpartition(".")[2]
    dims = value.type.shape[1:]
    if kind not in ("keys", "values"):
        return {"name": value.name, "dtype": "f32", "layout": "plain", "shape": list(dims)}
    heads, head_dim = (int(d) for d in dims[1:])  # type: ignore[arg-type]
    layout = backend.cache_layout(policy.cache)
    return {
        "name": value.name,
        "dtype": {"int8": "i8"}.get(policy.cache, policy.cache),
        "layout": layout,
        "shape": stored_shape(kind, heads, head_dim, context, layout),
    }


def io_places(entries: list[Entry], limits: Limits, steps: int) -> dict[str, tuple[int, int]]:
    """Return offset and bytes of each io field, where programs have so many steps at most."""
    text = io_layout(entries, limits.vocabulary, limits.hidden, steps)
    tower = {} if limits.tower is None else tower_io(limits.tower, limits.image_tokens)["fields"]
    return {
        name: (start + field["offset"], blobs.tensor_bytes(field["dtype"], field["shape"]))
        for start, fields in ((0, text["fields"]), (text["bytes"], tower))
        for name, field in fields.items()
    }


def compiled_entry(spec: EntrySpec, schedule: Schedule, shared: Shared) -> Entry:
    """Return an entry with its steps, and which of them are of one row."""
    steps, weights = described_steps(schedule, shared)
    is_single = [not any(isinstance(a, Tokens) for a in step.args) for step in schedule.steps]
    return Entry(
        **asdict(spec),
        symbol=schedule.name,
        steps=steps,
        step_weights=weights,
        single_row_steps=tuple(number for number, single in enumerate(is_single) if single),
    )


def compiled_tower(
    schedule: Schedule, plan: MemoryPlan, shared: Shared, limits: Limits, first_weight: int
) -> Tower:
    """Return a tower's program with its steps and memory."""
    assert limits.tower is not None  # who compiles a tower says which
    steps, weights = described_steps(schedule, shared)
    io = decode(Io, tower_io(limits.tower, limits.image_tokens), "$.vision.tower.io")
    return Tower(limits.image_tokens, schedule.name, steps, weights, first_weight, io, plan.bytes)


def described_steps(schedule: Schedule, shared: Shared) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return each step's kernel and packed weight (its largest; -1 for none), by number."""
    kernels = {name: number for number, name in enumerate(shared.kernels.values())}
    weights = {name: number for number, name in enumerate(shared.weights)}
    sizes = [math.prod(weight.shape) for weight in shared.weights.values()]
    largest: list[int] = []
    for step in schedule.steps:
        used = [weights[a.name] for a in step.args if isinstance(a, WeightRef)]
        largest.append(max(used, key=lambda number: sizes[number], default=-1))
    return tuple(kernels[step.kernel] for step in schedule.steps), tuple(largest)


def describe_kernels(shared: Shared) -> list[dict[str, Any]]:
    """Return each kernel's family and parameters, for `inspect`, and its cost, for the roofline."""
    return [
        {
            "name": name,
            "family": family,
            "parameters": {k: plain(v) for k, v in parameters},
            "cost": asdict(shared.backend.cost(family, dict(parameters))),
        }
        for (family, parameters), name in shared.kernels.items()
    ]


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
