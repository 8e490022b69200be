"""Turn samples into the tables that docs/measurements.md quotes, and into JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from peer import sizes
from peer.rounds import Sample, median_limits
from peer.systems import START, System, Test
from q35c.cli.text import table_text
from q35c.config import ModelConfig

_FEW = 2  # fewer clean samples than this are marked


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """The median of one system's samples of one test, and how near it came to the machine's limit."""

    value: float
    share: float | None
    spread: float
    samples: int
    is_clean: bool


class Results:
    """The samples of a run, asked by system and test."""

    def __init__(
        self, config: ModelConfig, systems: Sequence[System], samples: Sequence[Sample]
    ) -> None:
        self.systems = systems
        self._samples = samples
        self._operations = 2 * sizes.linear_parameters(config)
        self._state_bytes = sizes.state_bytes(config)

    def samples(self, system: System, test: str) -> list[Sample]:
        """Return the clean samples, or all of them where none is."""
        found = [item for item in self._samples if (item.system, item.test) == (system.name, test)]
        return [item for item in found if item.is_clean] or found

    def figure(self, system: System, test: Test) -> Figure | None:
        """Return the rate of a test in tokens per second."""
        samples = self.samples(system, test.name)
        if not samples:
            return None
        rates = [sample.rate for sample in samples]
        shares = [self._share(system, test, sample) for sample in samples]
        known = [share for share in shares if share is not None]
        return Figure(
            statistics.median(rates),
            statistics.median(known) if known else None,
            (max(rates) - min(rates)) / 2,
            len(samples),
            samples[0].is_clean,
        )

    def moved_bytes(self, system: System, depth: int) -> float:
        """Return what a token moves behind `depth` others: weights, state there and back, keys and values."""
        return system.token_bytes + 2 * self._state_bytes + depth * system.cache_bytes

    def median(self, system: System, test: str, get: Callable[[Sample], float | None]) -> float:
        """Return the median of another figure of the samples, 0 where there is none."""
        found = [value for item in self.samples(system, test) if (value := get(item)) is not None]
        return statistics.median(found) if found else 0.0

    def _share(self, system: System, test: Test, sample: Sample) -> float | None:
        if test.is_prefill:
            limit = sample.limits.int8
            return sample.rate * self._operations / limit if limit else None
        depth = test.depth + test.decode // 2
        return sample.rate * self.moved_bytes(system, depth) / sample.limits.bandwidth


def main_table(results: Results, tests: Sequence[Test]) -> str:
    """Return one row for each system."""
    shown = [test for test in tests if test.name != START]
    header = ["system", "file MB", "MB a token", *(_title(test) for test in shown)]
    header += ["load s", "start s", "peak MB"]
    return table_text(header, [_row(results, system, shown) for system in results.systems])


def _row(results: Results, system: System, shown: Sequence[Test]) -> list[str]:
    row = [system.name, f"{system.file_bytes / 1e6:.0f}"]
    row.append(f"{results.moved_bytes(system, 0) / 1e6:.0f}")
    row += [_cell(results.figure(system, test)) for test in shown]
    load = results.median(system, START, lambda sample: sample.load_seconds)
    start = results.median(system, START, lambda sample: sample.start_seconds)
    peaks = [sample.peak_bytes for test in shown for sample in results.samples(system, test.name)]
    row += [f"{load:.2f}" if load else "", f"{start:.2f}" if start else ""]
    return [*row, f"{max(peaks, default=0) / 1e6:.0f}"]


def _title(test: Test) -> str:
    kind = f"prefill {test.prompt}" if test.prompt else f"decode at {test.depth}"
    return f"{kind}, tok/s (of {'int8 peak' if test.prompt else 'bandwidth'})"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    mark = "" if figure.is_clean and figure.samples >= _FEW else "~"
    digits = 1 if figure.value < 100 else 0
    share = "" if figure.share is None else f" ({figure.share:.0%})"
    return f"{mark}{figure.value:.{digits}f}{share}"


def ratio_table(results: Results, tests: Sequence[Test]) -> str:
    """Return how many times faster each of our precisions is than the best peer, and than each one."""
    shown = [test for test in tests if test.name != START]
    peers = [system for system in results.systems if not system.is_ours]
    rows: list[list[str]] = []
    for system in results.systems:
        if system.is_ours:
            rows.append(
                [f"{system.name} / best peer", *_best_ratios(results, system, peers, shown)]
            )
            for peer in peers:
                cells = [_ratio(results, system, peer, test) for test in shown]
                rows.append([f"{system.name} / {peer.name}", *cells])
    header = ["ratio", *(test.name for test in shown)]
    return table_text(header, rows) if rows else ""


def _best_ratios(
    results: Results, system: System, peers: Sequence[System], shown: Sequence[Test]
) -> list[str]:
    cells: list[str] = []
    for test in shown:
        rates = {peer.name: figure for peer in peers if (figure := results.figure(peer, test))}
        own = results.figure(system, test)
        if own is None or not rates:
            cells.append("")
            continue
        best = max(rates, key=lambda name: rates[name].value)
        cells.append(f"{own.value / rates[best].value:.2f} ({best})")
    return cells


def _ratio(results: Results, system: System, peer: System, test: Test) -> str:
    own, other = results.figure(system, test), results.figure(peer, test)
    return f"{own.value / other.value:.2f}" if own and other else ""


def write_markdown(
    results: Results,
    tests: Sequence[Test],
    samples: Sequence[Sample],
    facts: dict[str, Any],
    notes: dict[str, str],
) -> str:
    """Return the whole report for people."""
    limits = median_limits(samples)
    dropped = sum(not sample.is_clean for sample in samples)
    lines = [
        f"{facts['model']} with random weights on {facts['cpu']}, {facts['threads']} threads; "
        f"{facts['time']}. Medians of samples taken in turn; read bandwidth {limits.bandwidth / 1e9:.1f} "
        f"GB/s and int8 peak {limits.int8 / 1e9:.0f} GOPS (median of the probes around the samples); "
        f"{dropped} of {len(samples)} samples were disturbed and do not count. ~ marks a figure of "
        f"fewer than {_FEW} undisturbed samples.",
        "",
        main_table(results, tests),
        "",
        "MB a token: weights that one decoded token reads and state that it reads and writes; deeper, keys and values "
        "come on top in the fraction. Start: from launching the process to 16 tokens' logits.",
    ]
    if ratios := ratio_table(results, tests):
        lines += ["", ratios]
    lines += ["", *(f"- {name}: {why}" for name, why in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def write_json(
    results: Results,
    tests: Sequence[Test],
    samples: Sequence[Sample],
    facts: dict[str, Any],
    notes: dict[str, str],
) -> dict[str, Any]:
    """Return the report as data, with every sample."""
    limits = median_limits(samples)
    figures: dict[str, Any] = {}
    for system in results.systems:
        found = {test.name: results.figure(system, test) for test in tests}
        figures[system.name] = {
            "file_bytes": system.file_bytes,
            "token_bytes": system.token_bytes,
            "cache_bytes_per_position": system.cache_bytes,
            "tests": {name: dataclasses.asdict(item) for name, item in found.items() if item},
        }
    return {
        **facts,
        "limits": dataclasses.asdict(limits),
        "systems": figures,
        "notes": notes,
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }
