"""This machine while it is measured: its two limits, who else uses it, and one child process at a time."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TICKS = os.sysconf("SC_CLK_TCK")
_POLL_SECONDS = 0.02
_PROBE_SOURCE = Path(__file__).with_name("probe.c")


class ChildError(Exception):
    """A child process failed; the message is the end of what it wrote."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the probe found: bytes read and int8 operations per second; 0 where it cannot tell."""

    bandwidth: float
    int8: float


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What a child printed and took. `first_output` is the wall time to its first output."""

    line: str
    first_output: float
    peak_bytes: int
    others_share: float


class Probe:
    """A process that waits for a line and then measures this machine's limits for a quarter second."""

    def __init__(self, cache: Path, threads: int) -> None:
        binary = cache / "probe"
        command = ["gcc", "-O3", "-march=native", "-pthread", str(_PROBE_SOURCE), "-o", str(binary)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        self._child = subprocess.Popen(
            [str(binary), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self) -> Limits:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        bandwidth, int8 = self._child.stdout.readline().split()
        return Limits(float(bandwidth) * 1e9, float(int8) * 1e9)

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def busy_seconds() -> float:
    """Return the processor time that all processes of this machine, and its host, have used."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def wait_until_quiet(patience: float, share: float) -> float:
    """Wait until others use at most `share` of this machine; return the share at the last look."""
    end = time.monotonic() + patience
    while True:
        busy, begin = busy_seconds(), time.monotonic()
        time.sleep(0.4)
        elapsed = time.monotonic() - begin
        used = (busy_seconds() - busy) / (elapsed * (os.cpu_count() or 1))
        if used <= share or time.monotonic() > end:
            return used


def run_child(
    command: Sequence[str], environment: Mapping[str, str], timeout: float = 3600
) -> ChildResult:
    """Run a command that prints lines of JSON; return the last, with time and memory.

    Raises ChildError if it fails, prints none, or takes longer than `timeout` seconds.
    """
    busy, own = busy_seconds(), _own_seconds()
    begin, first, peak = time.perf_counter(), 0.0, 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=output, stderr=errors, env={**os.environ, **environment}
        )
        while child.poll() is None:
            peak = max(peak, _peak_memory(child.pid))
            elapsed = time.perf_counter() - begin
            if not first and os.fstat(output.fileno()).st_size:
                first = elapsed
            if elapsed > timeout:
                child.kill()
            time.sleep(_POLL_SECONDS)
        elapsed = time.perf_counter() - begin
        lines = [line for line in _text(output).splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            tail = " / ".join(_text(errors).strip().splitlines()[-4:])
            raise ChildError(f"exit code {child.returncode}: {tail[-600:]}")
    others = busy_seconds() - busy - (_own_seconds() - own)
    share = max(0.0, others) / (elapsed * (os.cpu_count() or 1))
    return ChildResult(lines[-1], first or elapsed, peak, share)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _own_seconds() -> float:
    """Return the processor time of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_memory(process: int) -> int:
    """Return a process's largest resident size in bytes so far, 0 if it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
