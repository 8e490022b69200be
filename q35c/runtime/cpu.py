"""What this process may use of the CPU: instruction sets, cores, cgroup quota."""

import math
import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from q35c.artifact.manifest import Target
from q35c.errors import IncompatibleCPU, OptionError
from q35c.runtime.memory import own_cgroups

_SYSTEM = Path("/")
THREADS = "Q35C_THREADS"  # the environment variable that says how many threads


@cache
def cpu_features(root: Path = _SYSTEM) -> frozenset[str]:
    """Return the CPU's features as the kernel names them in /proc/cpuinfo."""
    try:
        with open(root / "proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def check_target(target: Target, features: Iterable[str] | None = None) -> None:
    """Raise IncompatibleCPU if this machine lacks an instruction set that the code needs."""
    have = cpu_features() if features is None else frozenset(features)
    missing = [feature for feature in target.cpu_features if feature not in have]
    if target.name.startswith("cpu:x86") and platform.machine() not in ("x86_64", "AMD64"):
        missing = [platform.machine() + " is not x86-64"]
    if missing:
        raise IncompatibleCPU(
            "this machine cannot run the artifact",
            where=target.name,
            expected=f"a CPU with {' '.join(target.cpu_features)}",
            got=f"missing: {' '.join(missing)}",
            hint="compile the model for a target that this CPU supports",
        )


def choose_threads(asked: int | None, max_threads: int) -> int:
    """Return the thread count: as asked, else Q35C_THREADS, else the physical cores we may use.

    Raises OptionError for a count below 1, above `max_threads` or above the machine's CPUs.
    """
    source = "threads"
    if asked is None and THREADS in os.environ:
        source, text = THREADS, os.environ[THREADS]
        if not (text.isascii() and text.isdigit()):
            raise OptionError("not a number", where=source, got=text)
        asked = int(text)
    if asked is None:
        return min(default_threads(), max_threads)
    limit = min(max_threads, os.cpu_count() or 1)
    if type(asked) is not int or not 1 <= asked <= limit:
        raise OptionError(
            "thread count is not allowed",
            where=source,
            expected=f"1 to {limit} ({os.cpu_count()} CPUs here, compiled for {max_threads})",
            got=asked,
        )
    return asked


def default_threads(root: Path = _SYSTEM) -> int:
    """Return the physical cores this process may run on, at most its cgroups' CPU quota.

    Two hyper-threads of a core share its vector units, and a thread beyond the quota would be put to
    sleep while the others spin at a barrier.
    """
    cores = {_siblings(root, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, int(min(len(cores), _quota(root))))


def _siblings(root: Path, cpu: int) -> str:
    place = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return place.read_text()
    except OSError:
        return str(cpu)


def _quota(root: Path) -> float:
    """Return the CPUs that the cgroups allow, infinity if they do not limit."""
    quota = math.inf
    for directory in own_cgroups("cpu", root):
        try:
            if (directory / "cpu.max").exists():
                limit, period = (directory / "cpu.max").read_text().split()
            else:
                limit = (directory / "cpu.cfs_quota_us").read_text().strip()
                period = (directory / "cpu.cfs_period_us").read_text().strip()
            if limit not in ("max", "-1"):
                quota = min(quota, int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return quota
