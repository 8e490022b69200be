"""Targets: the machine that runs what was compiled for each kind."""

from __future__ import annotations

from q35c.artifact import Manifest
from q35c.errors import UnsupportedMachine
from q35c.runtime.cpu.device import Cpu
from q35c.runtime.device import Machine

_KINDS = {"cpu": Cpu}


def find_machine(manifest: Manifest, threads: int | None = None) -> Machine:
    """Return the machine for an artifact's target, with as many threads as asked for. Raises OptionError or UnsupportedMachine."""
    name = manifest.target.name
    kind, _, _ = name.partition(":")
    if kind not in _KINDS:
        raise UnsupportedMachine("no runtime for this target", expected=", ".join(_KINDS), got=name)
    return _KINDS[kind](manifest, threads)
