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
_POLL_SHARE = 0.02  # of the time gone: looking takes a core from what is measured
_LOOK_SECONDS = 0.7
_SETTLE_SECONDS = 1.0  # the kernel counts in hundredths: too coarse before
_PROBE_SOURCE = Path(__file__).with_name("probe.c")


class ChildError(Exception):
    """A child process failed; the message is the end of what it wrote."""


class Disturbed(Exception):
    """A sample was given up, because others used the machine or because it took too long."""


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


class Watch:
    """How much of this machine others use, from now on: all that is used, less this family's part."""

    def __init__(self) -> None:
        self._begin, self._busy, self._own = time.perf_counter(), busy_seconds(), _own_seconds()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def others_share(self, child: int = 0) -> float:
        """Return the share of all processors' time; `child` is a process of ours that still runs."""
        own = _own_seconds() - self._own + (_process_seconds(child) if child else 0.0)
        others = max(0.0, busy_seconds() - self._busy - own)
        return others / (max(self.elapsed, 1e-3) * (os.cpu_count() or 1))


def wait_until_quiet(patience: float, share: float) -> bool:
    """Wait until others use at most `share` of this machine; return False where patience ends."""
    end = time.monotonic() + patience
    while True:
        watch = Watch()
        time.sleep(_LOOK_SECONDS)
        if watch.others_share() <= share:
            return True
        if time.monotonic() > end:
            return False


def run_child(
    command: Sequence[str], environment: Mapping[str, str], timeout: float, most_others: float
) -> ChildResult:
    """Run a command that prints lines of JSON; return the last, with time and memory.

    Raises Disturbed as soon as others have used more than the share `most_others` of the machine or
    `timeout` seconds have passed, ChildError if the command fails or prints no result.
    """
    watch, first, peak = Watch(), 0.0, 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=output, stderr=errors, env={**os.environ, **environment}
        )
        try:
            while child.poll() is None:
                peak = max(peak, _peak_memory(child.pid))
                if not first and os.fstat(output.fileno()).st_size:
                    first = watch.elapsed
                is_settled = watch.elapsed > _SETTLE_SECONDS
                if watch.elapsed > timeout:
                    raise Disturbed(f"took longer than {timeout:.0f} s")
                if is_settled and (share := watch.others_share(child.pid)) > most_others:
                    raise Disturbed(f"others used {share:.0%} of the machine")
                time.sleep(max(_POLL_SECONDS, _POLL_SHARE * watch.elapsed))
        finally:
            child.kill()
            child.wait()
        share = watch.others_share()
        lines = [line for line in _text(output).splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            tail = " / ".join(_text(errors).strip().splitlines()[-4:])
            raise ChildError(f"exit code {child.returncode}: {tail[-600:]}")
    return ChildResult(lines[-1], first or watch.elapsed, peak, share)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _own_seconds() -> float:
    """Return the processor time of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _process_seconds(process: int) -> float:
    """Return the processor time of one running process, 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _peak_memory(process: int) -> int:
    """Return a process's largest resident size in bytes so far, 0 if it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
