"""This machine's limits: bandwidths and peaks, measured by an artifact's own probes and kept in a cache file.

Of many short samples the one counts that a twentieth surpass: whatever else runs here only makes samples slower, but a
few are faster than what lasts. Of reads the best counts, because other machines on the same host may take bandwidth
for seconds. Threads that read are timed together, because they share it; the others each by itself, so that it does
not matter whether all have a core at the same moment. The file lies in the user's cache directory and holds the limits by processor, target and threads; a damaged or unwritable one is no error.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from q35c import arguments
from q35c.cpuinfo import CPUINFO, read_cpuinfo
from q35c.errors import ExecutionError, InputError, UnsupportedMachine
from q35c.layouts.blobs import STAMP_BYTES
from q35c.outputs import write_output
from q35c.roofline.cost import Cost
from q35c.user_cache import cache_directory

if TYPE_CHECKING:
    from q35c.artifact.leaves import Probe
    from q35c.runtime import Model
    from q35c.runtime.device import Block

Progress = Callable[[str, float], None]

READ_BYTES = 512 << 20  # larger than any cache
_SLICE_BYTES = 64 << 20  # read in one sample: of shorter ones some are much faster than what lasts
_SAMPLE_SECONDS = 1e-3
_PROBE_SECONDS = 1.5
_PERCENT = 5  # of the samples are faster
_CALIBRATION_SECONDS = 0.2
_PAGE_BYTES = 4096
_STAMP_WORD = STAMP_BYTES // 8
_UNKNOWN = "unknown processor"
_PROBES = 2  # raised when a probe changes what it measures: limits of before are measured again
_MEASURED = ("read", "cache", "int8", "bf16", "f32")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a second of memory and of the caches, operations a second by type; all threads together."""

    read: float
    cache: float
    int8: float
    bf16: float
    f32: float

    def seconds(self, cost: Cost) -> float:
        """Return the least time that a kernel with this cost can take."""
        return max(self.parts(cost).values())

    def parts(self, cost: Cost) -> dict[str, float]:
        """Return what each limit alone demands, in seconds: memory, cache, compute."""
        return {
            "memory": cost.memory_bytes / self.read,
            "cache": (cost.memory_bytes + cost.cache_bytes) / self.cache,
            "compute": cost.operations / getattr(self, cost.peak),
        }


def find_limits(model: Model, *, again: bool = False, progress: Progress | None = None) -> Limits:
    """Return the limits for a model's target and threads, from the cache or measured (`again`: always)."""
    again = arguments.flag("again", again)
    arguments.callback("progress", progress)
    key = limits_key(model.manifest.target.name, model.threads)
    known = None if again else _read_cache().get(key)
    if known is None:
        known = measure_limits(model, progress)
        _write_cache(_read_cache() | {key: known})
    return known


def cached_limits(target: str, threads: int) -> Limits | None:
    """Return the limits that were measured here before, None if there are none."""
    return _read_cache().get(limits_key(target, threads))


def limits_key(target: str, threads: int) -> str:
    return f"{processor_name()}, {target}, {threads} threads, probes {_PROBES}"


def processor_name(path: Path = CPUINFO) -> str:
    """Return the processor's name as the kernel knows it."""
    with contextlib.suppress(UnsupportedMachine):
        return read_cpuinfo(path).get("model name", _UNKNOWN)
    return _UNKNOWN


def cache_path() -> Path:
    """Return the file of known limits: in $XDG_CACHE_HOME, or in ~/.cache."""
    return cache_directory() / "limits.json"


def measure_limits(model: Model, progress: Progress | None = None) -> Limits:
    """Run every probe of a model's code for a while. Raises MemoryRefused without 512 MiB free."""
    from q35c.runtime.memory import available_memory, check_allocation

    check_allocation("measuring the memory bandwidth", READ_BYTES, available_memory())
    block = model.probe_memory(READ_BYTES)
    # Ordinary numbers as f32 and no runs of equal pages, which a hypervisor may merge.
    words = block.view("f32", (READ_BYTES // 4,))
    words.reshape(-1, 1 << 20)[:] = np.random.default_rng(0).uniform(0.5, 0.9, 1 << 20)
    words[::1024] = np.arange(len(words) // 1024)
    found: dict[str, float] = {}
    period = seconds_per_cycle(model)
    probes = {probe.name: probe for probe in model.manifest.probes}
    for number, name in enumerate(_MEASURED):
        probe = probes.get(name)
        if probe is None:
            continue
        if progress is not None:
            progress(f"measure {name}", number / len(_MEASURED))
        sample = _reading if name == "read" else _repeating
        found[name] = sample(model, probe, block) / period
    if missing := {*_MEASURED} - {*found, "bf16"}:
        raise ExecutionError("the compiled code lacks probes", expected=sorted(missing))
    f32 = found["f32"]  # a target without bf16 products computes them in f32
    return Limits(found["read"], found["cache"], found["int8"], found.get("bf16", f32), f32)


def _reading(model: Model, probe: Probe, block: Block) -> float:
    """Return the bytes per cycle over slices of the block, in turn, so that none is left in a cache."""
    amount = max(1, _SLICE_BYTES // (probe.work * model.threads))
    step = amount * probe.work * model.threads
    slices = block.bytes // step
    stamps = _stamps(block, slices * model.threads, amount * probe.work)
    stamps = stamps.reshape(slices, model.threads, 2)
    cycles: list[int] = []
    end = time.perf_counter() + 2 * _PROBE_SECONDS
    while len(cycles) < slices or time.perf_counter() < end:
        number = len(cycles) % slices
        model.run_probe(probe, block.address + number * step, amount)
        cycles.append(int(stamps[number, :, 1].max() - stamps[number, :, 0].min()))
    return step / min(cycles)


def _repeating(model: Model, probe: Probe, block: Block) -> float:
    """Return the work per cycle of a probe that leaves memory alone, summed over the threads."""
    amount = 64
    while min(model.run_probe(probe, block.address, amount) for _ in range(3)) < _SAMPLE_SECONDS:
        amount *= 2
    stamps = _stamps(block, model.threads, probe.work if probe.name == "cache" else _PAGE_BYTES)
    cycles: list[NDArray[np.int64]] = []
    end = time.perf_counter() + _PROBE_SECONDS
    while not cycles or time.perf_counter() < end:
        model.run_probe(probe, block.address, amount)
        cycles.append(stamps[:, 1] - stamps[:, 0])
    return float((amount * probe.work / np.percentile(cycles, _PERCENT, axis=0)).sum())


def _stamps(block: Block, parts: int, part_bytes: int) -> NDArray[np.int64]:
    """Return the cycle counts, begin and end, that a probe leaves in each thread's part of the block."""
    words = block.view("i64", (parts, part_bytes // 8))
    return words[:, _STAMP_WORD : _STAMP_WORD + 2]


def seconds_per_cycle(model: Model) -> float:
    """Compare the code's cycle counter with the clock. Raises ExecutionError if the code keeps none."""
    probe = next((probe for probe in model.manifest.probes if probe.name == "clock"), None)
    if probe is None:
        raise ExecutionError("the compiled code lacks a probe", expected="clock")
    block = model.probe_memory(4096)
    words = block.view("i64", (2,))
    words[0] = 1

    def read() -> tuple[float, int]:
        """Return both clocks at one moment, from the shortest of some calls."""
        found: list[tuple[float, float, int]] = []
        for _ in range(20):
            begin = time.perf_counter()
            seconds = model.run_probe(probe, block.address, 1)
            found.append((seconds, begin + seconds / 2, int(words[1])))
        return min(found)[1:]

    first = read()
    time.sleep(_CALIBRATION_SECONDS)
    last = read()
    if last[1] <= first[1]:
        raise ExecutionError("the cycle counter stands still", got=last[1] - first[1])
    return (last[0] - first[0]) / (last[1] - first[1])


def _read_cache() -> dict[str, Limits]:
    names = {field.name for field in fields(Limits)}
    found: dict[str, Limits] = {}
    try:
        document = json.loads(cache_path().read_text())
        for key, values in document.items():
            if set(values) == names and all(0 < value < math.inf for value in values.values()):
                found[key] = Limits(**{name: float(value) for name, value in values.items()})
    except (InputError, OSError, ValueError, TypeError, AttributeError):
        return {}
    return found


def _write_cache(known: dict[str, Limits]) -> None:
    text = json.dumps({key: asdict(limits) for key, limits in known.items()}, indent=2)
    with contextlib.suppress(OSError, InputError):
        cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_output(cache_path(), text.encode())
