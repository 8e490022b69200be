"""Targets: the names users give, and the backend that each means."""

from __future__ import annotations

from collections.abc import Callable

from q35c import arguments
from q35c.codegen.backend import Backend
from q35c.codegen.cpu.backend import cpu_names, find_cpu
from q35c.codegen.cuda.backend import cuda_names, find_cuda

# Kind of machine -> the backend of a level (None if there is no such level), and all names.
_KINDS: dict[str, tuple[Callable[[str], Backend], Callable[[], list[str]]]] = {
    "cpu": (find_cpu, cpu_names),
    "cuda": (find_cuda, cuda_names),
}


def find_target(name: str) -> Backend:
    """Return the target called `cpu` (this machine), `cpu:LEVEL`, `cuda` (several devices) or `cuda:ARCHITECTURE`, or raise OptionError."""
    known = [known for _, names in _KINDS.values() for known in names()]
    kind, _, level = arguments.choice("target", name, known, "target").partition(":")
    return _KINDS[kind][0](level)
