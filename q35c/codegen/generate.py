"""From the pipeline's entries to machine code, packed weight list and manifest fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from q35c.artifact.writer import WeightEntry, place_weights
from q35c.codegen.backend import Backend
from q35c.codegen.calls import Pointer, Tokens
from q35c.codegen.pack import PackedWeight
from q35c.codegen.requests import Shared
from q35c.codegen.schedule import Places, Schedule, WeightRef
from q35c.ir.graph import Module, Value
from q35c.ir.precision import Policy
from q35c.layouts import blobs
from q35c.layouts.blobs import GRID
from q35c.layouts.cache import stored_shape
from q35c.layouts.weights import BLOCK

LAYOUT_NOTES = {
    "vector": "as in the checkpoint",
    "conv": "taps by channels",
    "linear": f"blocks of {BLOCK} rows, input-major",
    "swiglu": f"blocks of {BLOCK // 2} gate and {BLOCK // 2} up rows, input-major",
    "experts": f"per expert: blocks of {BLOCK} rows, input-major",
    "experts_swiglu": f"per expert: blocks of {BLOCK // 2} gate and {BLOCK // 2} up rows, input-major",
}


@dataclass(frozen=True, slots=True)
class Generated:
    """A compiled model without its weights' data; `fields` are the manifest's code-related fields."""

    code: bytes
    weights: tuple[PackedWeight, ...]
    entries: tuple[WeightEntry, ...]
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the artifact is compiled for."""

    context: int  # tokens per sequence, a multiple of 64
    batch: int  # sequences per decode step
    vocabulary: int


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
    entries = describe_entries(module, backend, limits)
    state = blobs.state_layout(describe_state(module, policy, limits.context, backend))
    tokens = max(entry["max_tokens"] for entry in entries)
    offsets = {tensor["name"]: tensor["offset"] for tensor in state["tensors"]}
    shared = Shared(backend, limits.context, tokens, offsets)
    schedules = [
        backend.lower(graph, shared, entry["max_tokens"])
        for graph, entry in zip(module, entries, strict=True)
    ]
    for entry, schedule in zip(entries, schedules, strict=True):
        entry |= describe_steps(schedule, shared)
    stored = tuple(stored_weight(weight) for weight in shared.weights.values())
    check_weights(sum(weight.bytes for weight in stored))
    places = Places(
        {weight.name: weight.offset for weight in place_weights(stored)},
        io_places(limits, tokens, entries),
    )
    plans = [schedule.plan() for schedule in schedules]
    clock = Pointer("io", places.io["clock"][0])
    placed = {
        schedule.name: schedule.place(plan, places)
        for schedule, plan in zip(schedules, plans, strict=True)
    }
    built = backend.build(shared.kernels, placed, clock, progress)
    fields = {
        "target": backend.describe(),
        "precision": policy.name,
        "context": limits.context,
        "batch": limits.batch,
        "entries": entries,
        "arena_bytes": max(plan.bytes for plan in plans),
        "max_threads": backend.max_threads,
        "barrier_bytes": barrier_bytes(shared),
        "state": state,
        "kernels": describe_kernels(shared),
        "probes": built.probes,
    }
    return Generated(built.code, tuple(shared.weights.values()), stored, fields)


def barrier_bytes(shared: Shared) -> int:
    """Return the bytes of the barrier's words and of the counters behind them."""
    return blobs.align(blobs.BARRIER_BYTES + blobs.ELEMENT_BYTES * shared.counters)


def stored_weight(weight: PackedWeight) -> WeightEntry:
    note = f"{LAYOUT_NOTES[weight.layout]}, {weight.dtype}"
    return WeightEntry(weight.name, weight.stored_dtype, weight.shape, note, weight.sources)


def describe_entries(module: Module, backend: Backend, limits: Limits) -> list[dict[str, Any]]:
    """Return name, symbol, rows, most tokens and logits of each entry. One sequence takes whole chunks of the grid, so that
    a long one is cut where it changes no bit.
    """
    score_tokens = backend.logits_bytes // (4 * limits.vocabulary) // GRID * GRID
    kinds = {
        "prefill": ("sequence", backend.prefill_tokens, "last"),
        "decode": ("batch", limits.batch, "all"),
        "score": ("sequence", min(max(GRID, score_tokens), backend.prefill_tokens), "all"),
        "extend": ("sequence", backend.prefill_tokens, "none"),
    }
    names = ("rows", "max_tokens", "logits")
    return [
        {
            "name": graph.name,
            "symbol": graph.name,
            **dict(zip(names, kinds[graph.name], strict=True)),
        }
        for graph in module
    ]


def describe_state(
    module: Module, policy: Policy, context: int, backend: Backend
) -> list[dict[str, Any]]:
    """Return the stored shape of every state tensor, in the layout that the backend uses.

    What does not grow comes first, so that a short session keeps it together in huge pages.
    """
    tensors = [stored_state(v, policy, context, backend) for v in module.entries[0].leaves("state")]
    return sorted(tensors, key=lambda tensor: tensor["growth"] == "context")


def stored_state(value: Value, policy: Policy, context: int, backend: Backend) -> dict[str, Any]:
    kind = value.name.rpartition(".")[2]
    dims = value.type.shape[1:]
    if kind not in ("keys", "values"):
        return {"name": value.name, "dtype": "f32", "shape": list(dims), "growth": "fixed"}
    heads, head_dim = (int(d) for d in dims[1:])  # type: ignore[arg-type]
    layout = backend.cache_layout(policy.cache)
    return {
        "name": value.name,
        "dtype": {"int8": "i8"}.get(policy.cache, policy.cache),
        "shape": stored_shape(kind, heads, head_dim, context, layout),
        "growth": "context",
    }


def io_places(
    limits: Limits, tokens: int, entries: list[dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """Return offset and bytes of each io field."""
    rows = max(blobs.logits_rows(entry["logits"], entry["max_tokens"]) for entry in entries)
    steps = max(len(entry["steps"]) for entry in entries)
    fields = blobs.io_layout(tokens, limits.batch, rows, limits.vocabulary, steps)["fields"]
    return {
        name: (field["offset"], blobs.tensor_bytes(field["dtype"], field["shape"]))
        for name, field in fields.items()
    }


def describe_steps(schedule: Schedule, shared: Shared) -> dict[str, list[int]]:
    """Return each step's kernel and packed weight (its largest; -1 for none), and the steps of one row."""
    kernels = {name: number for number, name in enumerate(shared.kernels.values())}
    weights = {name: number for number, name in enumerate(shared.weights)}
    sizes = [math.prod(weight.shape) for weight in shared.weights.values()]
    largest = []
    for step in schedule.steps:
        used = [weights[a.name] for a in step.args if isinstance(a, WeightRef)]
        largest.append(max(used, key=lambda number: sizes[number], default=-1))
    return {
        "steps": [kernels[step.kernel] for step in schedule.steps],
        "step_weights": largest,
        "single_row_steps": [n for n, s in enumerate(schedule.steps) if Tokens() not in s.args],
    }


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
