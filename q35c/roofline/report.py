"""Tests as tables: steps summed by kernel, beside the machine's limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from q35c.artifact.kernels import Kernel
from q35c.roofline.cost import Cost
from q35c.roofline.machine import Limits

_SHAPE = ("N", "K", "V", "H", "I", "E", "top_k", "D", "C", "R", "Hq", "Hkv", "Hk", "Hv", "Dk", "Dv", "splits", "group", "pairs")  # fmt: skip
_WORDS = ("dtype", "epilogue", "kv_dtype", "rows")


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel call: its entry, kernel, main weight, cost, and seconds where measured."""

    entry: str
    kernel: Kernel
    weight: str
    cost: Cost
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Test:
    """A prompt of `size` tokens ("pp") or one decoded token ("tg") behind `depth` tokens.

    `outside_seconds` is what passes before the first and after the last step of every call, `median_seconds` the
    median of whole runs.
    """

    kind: str
    size: int
    depth: int
    steps: tuple[Step, ...]
    outside_seconds: float | None = None
    median_seconds: float | None = None

    @property
    def name(self) -> str:
        """Return the name as llama-bench writes it."""
        return f"{self.kind}{self.size}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """Return the tokens that the steps compute."""
        return self.size if self.kind == "pp" else 1

    @property
    def seconds(self) -> float | None:
        """Return the measured time, None if there is none."""
        if self.outside_seconds is None:
            return None
        return self.outside_seconds + sum(step.seconds or 0.0 for step in self.steps)

    def limit_seconds(self, limits: Limits) -> float:
        """Return the sum of the steps' limits."""
        return sum(limits.seconds(step.cost) for step in self.steps)

    @property
    def memory_bytes(self) -> float:
        return sum(step.cost.memory_bytes for step in self.steps)


@dataclass(slots=True)
class KernelRow:
    """All calls of one kernel within a test."""

    kernel: Kernel
    calls: int = 0
    weights: dict[str, None] = field(default_factory=dict)  # names without their layer
    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    operations: float = 0.0
    limit_seconds: float = 0.0
    seconds: float | None = None
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, step: Step, limits: Limits | None) -> None:
        self.calls += 1
        if step.weight:
            self.weights[role_of(step.weight)] = None
        self.memory_bytes += step.cost.memory_bytes
        self.cache_bytes += step.cost.cache_bytes
        self.operations += step.cost.operations
        if step.seconds is not None:
            self.seconds = (self.seconds or 0.0) + step.seconds
        if limits is not None:
            self.limit_seconds += limits.seconds(step.cost)
            for name, seconds in limits.parts(step.cost).items():
                self.parts[name] = self.parts.get(name, 0.0) + seconds

    @property
    def bound(self) -> str:
        """Return what bounds the kernel: memory, cache or compute."""
        return max(self.parts, key=lambda name: self.parts[name], default="")

    @property
    def lost_seconds(self) -> float:
        """Return what a perfect kernel would save; before measuring, the limit."""
        return self.limit_seconds if self.seconds is None else self.seconds - self.limit_seconds

    @property
    def shape(self) -> str:
        """Return the parameters that say how large the kernel is."""
        return shape_text(self.kernel.parameters)


def role_of(weight: str) -> str:
    """Return a weight's name without its layer: layers.3.mlp.down_proj -> down_proj."""
    return weight.rpartition(".")[2]


def shape_text(parameters: Mapping[str, Any]) -> str:
    numbers = [f"{name}={parameters[name]}" for name in _SHAPE if name in parameters]
    words = [str(parameters[name]) for name in _WORDS if parameters.get(name, "none") != "none"]
    return " ".join(numbers + words)


def kernel_rows(steps: Iterable[Step], limits: Limits | None) -> list[KernelRow]:
    """Sum the steps by kernel; what loses the most time comes first."""
    rows: dict[str, KernelRow] = {}
    for step in steps:
        rows.setdefault(step.kernel.name, KernelRow(step.kernel)).add(step, limits)
    return sorted(rows.values(), key=lambda row: (-row.lost_seconds, -row.memory_bytes))


def table_of(test: Test, limits: Limits | None) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a test's table; times in microseconds."""
    header = ["kernel", "weight", "shape", "calls", "MB", "cache MB", "Gop"]
    header += ["bound", "limit us"] if limits else []
    total = test.seconds
    header += ["us", "of limit", "share", "lost us"] if total and limits else []
    return header, [_cells(row, limits, total) for row in kernel_rows(test.steps, limits)]


def _cells(row: KernelRow, limits: Limits | None, total: float | None) -> list[str]:
    cells = [row.kernel.name, " ".join(row.weights), row.shape, str(row.calls)]
    cells += [number(row.memory_bytes / 1e6), number(row.cache_bytes / 1e6)]
    cells.append(number(row.operations / 1e9))
    if limits:
        cells += [row.bound, microseconds(row.limit_seconds)]
    if total and limits and row.seconds is not None:
        cells += [microseconds(row.seconds), percent(row.limit_seconds, row.seconds)]
        cells += [percent(row.seconds, total), microseconds(row.lost_seconds)]
    return cells


def summary_of(test: Test, limits: Limits | None) -> str:
    """Return one line: the step's time, its limit, the fraction, rates."""
    facts = f"{test.memory_bytes / 1e6:.1f} MB from memory"
    unit = "a token" if test.kind == "tg" else "a prompt"
    if limits is None:
        return f"{test.name}: {facts} {unit}"
    limit, seconds = test.limit_seconds(limits), test.seconds
    rate = f"{test.tokens / limit:.1f} tok/s"
    if seconds is None:
        return f"{test.name}: {facts}, limit {1e3 * limit:.2f} ms {unit} ({rate})"
    return (
        f"{test.name}: {1e3 * seconds:.2f} ms {unit} ({test.tokens / seconds:.1f} tok/s), "
        f"limit {1e3 * limit:.2f} ms ({rate}): {percent(limit, seconds)}; {facts}; "
        f"{1e6 * (test.outside_seconds or 0):.0f} us outside the kernels; "
        f"median of whole runs {1e3 * (test.median_seconds or 0):.2f} ms"
    )


def limits_text(limits: Limits, threads: int) -> str:
    return (
        f"limits of {threads} threads: memory {limits.read / 1e9:.1f} GB/s, cache {limits.cache / 1e9:.0f} GB/s, "
        f"int8 {limits.int8 / 1e9:.0f}, bf16 {limits.bf16 / 1e9:.0f}, f32 {limits.f32 / 1e9:.0f} Gop/s"
    )


def report_text(tests: Sequence[Test], limits: Limits | None, threads: int, table: Any) -> str:
    """Return the whole report; `table` writes a table from a header and rows."""
    parts = [limits_text(limits, threads)] if limits else []
    for test in tests:
        parts += [summary_of(test, limits), table(*table_of(test, limits))]
    return "\n\n".join(parts)


def report_json(tests: Sequence[Test], limits: Limits | None) -> dict[str, Any]:
    """Return the report as JSON values: times in seconds, rates per second."""
    return {
        "limits": asdict(limits) if limits else None,
        "tests": [_test_json(test, limits) for test in tests],
    }


def _test_json(test: Test, limits: Limits | None) -> dict[str, Any]:
    return {
        "test": test.name,
        "tokens": test.tokens,
        "depth": test.depth,
        "seconds": test.seconds,
        "outside_seconds": test.outside_seconds,
        "median_seconds": test.median_seconds,
        "limit_seconds": test.limit_seconds(limits) if limits else None,
        "kernels": [_kernel_json(row, limits) for row in kernel_rows(test.steps, limits)],
        "steps": [
            {"entry": step.entry, "kernel": step.kernel.name, "weight": step.weight}
            | asdict(step.cost)
            | {
                "limit_seconds": limits.seconds(step.cost) if limits else None,
                "seconds": step.seconds,
            }
            for step in test.steps
        ],
    }


def _kernel_json(row: KernelRow, limits: Limits | None) -> dict[str, Any]:
    return {
        "kernel": row.kernel.name,
        "family": row.kernel.family,
        "shape": row.shape,
        "weights": list(row.weights),
        "calls": row.calls,
        "memory_bytes": row.memory_bytes,
        "cache_bytes": row.cache_bytes,
        "operations": row.operations,
        "bound": row.bound,
        "limit_seconds": row.limit_seconds if limits else None,
        "seconds": row.seconds,
    }


def number(value: float) -> str:
    """Return a figure with three digits, or what is before its point."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if abs(seconds) < 1e-5 else f"{1e6 * seconds:.0f}"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"
