"""Targets: the machine that runs what was compiled for each kind."""

from __future__ import annotations

from q35c import arguments
from q35c.artifact import Manifest
from q35c.errors import OptionError, UnsupportedMachine
from q35c.runtime.cpu.device import Cpu
from q35c.runtime.device import Machine

_BACKENDS = ("cpu", "cuda")
_MAX_ORDINAL = 999


def find_machine(
    manifest: Manifest, threads: int | None = None, device: str | None = None
) -> Machine:
    """Return the machine for an artifact's target: as many threads of the CPU as asked for, or a device.

    `device` is `cpu`, `cuda` or `cuda:N`. Raises OptionError, for a device of another kind than the artifact's too,
    UnsupportedMachine or NoDevice.
    """
    backend = manifest.target.backend
    kind, ordinal = parse_device(backend if device is None else device)
    if backend not in _BACKENDS:
        raise UnsupportedMachine(
            "no runtime for this target", expected=", ".join(_BACKENDS), got=manifest.target.name
        )
    if kind != backend:
        raise OptionError(
            "the artifact was compiled for another kind of device",
            where="device",
            expected=manifest.target.name,
            got=device,
            hint=f"compile the model with --target {kind}",
        )
    if kind == "cpu":
        return Cpu(manifest, threads)
    if threads is not None:
        raise OptionError("threads are of the CPU, the artifact is not", where="threads")
    from q35c.runtime.cuda.machine import Cuda  # most processes have no use for it

    return Cuda(manifest, ordinal)


def parse_device(text: str) -> tuple[str, int]:
    """Return the kind and the number of a device. Raises OptionError."""
    kind, colon, number = arguments.text("device", text).partition(":")
    is_number = number.isascii() and number.isdigit() and len(number) <= len(str(_MAX_ORDINAL))
    if kind not in _BACKENDS or (colon and (kind == "cpu" or not is_number)):
        raise OptionError(
            "no such device", where="device", expected="cpu, cuda or cuda:N", got=text
        )
    return kind, int(number or 0)
