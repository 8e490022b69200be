"""Targets: the names users give, and the backend that each means."""

from __future__ import annotations

from q35c import arguments
from q35c.codegen.backend import Backend
from q35c.codegen.cpu.backend import cpu_names, find_cpu

# Kind of machine -> the backend of a level (None if there is no such level), and all names.
_KINDS = {"cpu": (find_cpu, cpu_names)}


def find_target(name: str) -> Backend:
    """Return the target called `cpu` (this machine) or `cpu:LEVEL`, or raise OptionError."""
    known = [known for _, names in _KINDS.values() for known in names()]
    kind, _, level = arguments.choice("target", name, known, "target").partition(":")
    return _KINDS[kind][0](level)
