"""Memory: how much there is, and how much a model needs.

The check comes before the first byte of a weight is read: what the plan needs is compared with what the
kernel says is available and with the limits of every cgroup (v1 and v2) that this process is in.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from q35c.artifact import Manifest
from q35c.errors import MemoryRefused
from q35c.layouts.cache import CELLS

_SYSTEM = Path("/")
_RUNTIME_BYTES = 2 << 20  # beside the plan, 0.6 to 1.5 MB measured: manifest, threads, objects
SequenceBytes = Callable[[int], int]  # tokens of a sequence -> bytes of its state
_NO_LIMIT = 2**60  # cgroup v1 says "no limit" with a huge number


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that may still be allocated, who says so, and the error of asking for more."""

    bytes: int
    source: str
    refusal: type[MemoryRefused] = MemoryRefused


def available_memory(root: Path = _SYSTEM) -> Available:
    """Return the least of what the machine and each of our cgroups have left.

    Page cache counts as available, because the kernel drops it first. `root` is for tests.
    """
    found = [Available(_machine_memory(root), "machine")]
    for directory in own_cgroups("memory", root):
        left = _cgroup_memory(directory)
        if left is not None:
            found.append(Available(left, f"cgroup {directory}"))
    return min(found, key=lambda item: item.bytes)


@cache
def own_cgroups(controller: str, root: Path = _SYSTEM) -> tuple[Path, ...]:
    """Return the directories of the cgroups, v1 and v2, that this process is in, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    mounts = root / "sys/fs/cgroup"
    found: dict[Path, None] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            tops = [mounts / controller, mounts / controllers]
        else:
            continue
        for top in tops:
            # In a container the path may be the host's; then only the top is visible.
            inner = top / path.strip("/")
            places = (place for place in (inner, *inner.parents) if place.is_relative_to(top))
            found |= dict.fromkeys(place for place in places if place.is_dir())
    return tuple(found)


def _machine_memory(root: Path) -> int:
    try:
        with open(root / "proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return _NO_LIMIT


def _cgroup_memory(directory: Path) -> int | None:
    """Return the bytes left in a cgroup, None if it sets no limit."""
    for limit_file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            limit = _read(directory, limit_file)
            if limit == "max" or int(limit) >= _NO_LIMIT:
                continue
            usage = int(_read(directory, usage_file))
            lines = _read(directory, "memory.stat").splitlines()
            statistics = dict(line.split() for line in lines)
            cached = sum(
                int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active")
            )
            return max(0, int(limit) - max(0, usage - cached))
        except (OSError, ValueError):
            continue
    return None


def _read(directory: Path, name: str) -> str:
    with open(f"{directory}/{name}") as file:  # much cheaper than pathlib, and every session asks
        return file.read().strip()


def state_bytes(manifest: Manifest, tokens: int) -> int:
    """Return the bytes of one sequence's state that are in use after `tokens` tokens."""
    return manifest.state.used_bytes(manifest.max_context, tokens)


def needed_bytes(
    manifest: Manifest, context: int, batch: int, sequence: SequenceBytes | None = None
) -> int:
    """Return the bytes of the loaded model with `batch` sequences of `context` tokens, before it sees a picture.

    Without a vision tower, at the default context and batch, that is the manifest's peak, the code, and what this runtime adds. `sequence` says what
    a sequence of so many tokens takes where that is more than the manifest's figure.
    """
    fixed = manifest.text_weights_bytes + manifest.arena_bytes + manifest.io.bytes
    own = manifest.segments["code"].bytes + _RUNTIME_BYTES
    each = sequence(context) if sequence else state_bytes(manifest, context)
    return fixed + own + batch * each


def check_memory(
    manifest: Manifest,
    context: int,
    batch: int,
    have: Available,
    sequence: SequenceBytes | None = None,
) -> None:
    """Raise MemoryRefused if the model with its sequences needs more than there is."""

    def need_of(tokens: int, sequences: int) -> int:
        return needed_bytes(manifest, tokens, sequences, sequence)

    need = need_of(context, batch)
    if need <= have.bytes:
        return
    largest = _largest_context(context, lambda tokens: need_of(tokens, batch), have)
    hint = f"load with context={largest} or less"
    if largest == 0 and batch > 1:
        largest = _largest_context(context, lambda tokens: need_of(tokens, 1), have)
        hint = f"load with batch=1, context={largest} or less"
    if largest == 0:
        hint = "free memory, raise the limit, or compile with a smaller precision"
    raise _refusal(f"{batch} x {context} tokens", need, have, hint)


def check_allocation(what: str, need: int, have: Available) -> None:
    """Raise MemoryRefused if `need` more bytes are not there."""
    if need > have.bytes:
        raise _refusal(what, need, have, "ask for less, or free memory")


def _largest_context(context: int, need: Callable[[int], int], have: Available) -> int:
    """Return the largest multiple of 32 tokens that fits, 0 if none does."""
    low, high = 0, context // CELLS
    while low < high:
        middle = (low + high + 1) // 2
        if need(middle * CELLS) <= have.bytes:
            low = middle
        else:
            high = middle - 1
    return low * CELLS


def _refusal(what: str, need: int, have: Available, hint: str) -> MemoryRefused:
    return have.refusal(
        f"not enough memory for {what}",
        where=have.source,
        expected=f"{need} bytes ({need / 2**20:.1f} MiB)",
        got=f"{have.bytes} bytes ({have.bytes / 2**20:.1f} MiB)",
        hint=hint,
    )


class HasState(Protocol):
    """A session, as far as its memory is concerned, in tokens."""

    @property
    def context(self) -> int: ...
    @property
    def high_water(self) -> int: ...
    @property
    def is_closed(self) -> bool: ...


class StateBudget:
    """Admit sessions only while all of them could grow to their context. Thread-safe.

    Closing one takes no lock: the garbage collector may do it at any instant, on the thread that holds it.
    """

    def __init__(self, sequence: SequenceBytes, available: Callable[[], Available]) -> None:
        """Take what says how many bytes a sequence of some tokens takes, and how many are left."""
        self._sequence_bytes = sequence
        self._available = available
        self._lock = threading.RLock()  # a signal handler may open a session, too
        self._live: weakref.WeakSet[HasState] = weakref.WeakSet()

    def admit(self, session: HasState) -> None:
        """Register a session, new or of another context than before.

        Raises MemoryRefused if its context does not fit any more; one that was registered stays so.
        """
        with self._lock:
            is_new = session not in self._live
            self._live.add(
                session
            )  # so that one admitted meanwhile, by a signal handler, counts it
            have = self._available()
            # State is committed when it is touched, so what live sessions still lack is not
            # missing from the kernel's figure yet.
            others = (other for other in self._live if other is not session and not other.is_closed)
            promised = sum(map(self._lacking, others))
            need = promised + self._lacking(session)
            if need > have.bytes:
                if is_new:
                    self._live.discard(session)
                largest = _largest_context(
                    session.context,
                    lambda tokens: promised + self._sequence_bytes(tokens),
                    have,
                )
                hint = f"ask for context={largest} or less" if largest else "close other sessions"
                raise _refusal(f"a session of {session.context} tokens", need, have, hint)

    def _lacking(self, session: HasState) -> int:
        touched = self._sequence_bytes(session.high_water) if session.high_water else 0
        return max(0, self._sequence_bytes(session.context) - touched)


def give_back_memory() -> None:
    """Let the system have what was freed but is still kept for later: only then `available_memory` sees it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def peak_memory(status: Path = Path("/proc/self/status")) -> int:
    """Return this process's largest resident size in bytes, 0 where the kernel does not tell.

    Unlike getrusage's figure it does not include the parent's size at the moment of the fork.
    """
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
