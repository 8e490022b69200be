"""Targets: the machine that runs what was compiled for each kind."""

from __future__ import annotations

from q35c.artifact import Manifest
from q35c.errors import UnsupportedMachine
from q35c.runtime.cpu.device import Cpu
from q35c.runtime.device import Machine

_MACHINES = {"cpu": Cpu}  # by the backend that an artifact's target names


def find_machine(manifest: Manifest, threads: int | None = None) -> Machine:
    """Return the machine for an artifact's target, with as many threads as asked for. Raises OptionError or UnsupportedMachine."""
    machine = _MACHINES.get(manifest.target.backend)
    if machine is None:
        raise UnsupportedMachine(
            "no runtime for this target",
            expected=", ".join(_MACHINES),
            got=manifest.target.name,
        )
    return machine(manifest, threads)
