"""Open an artifact for generating, on the machine that it was compiled for."""

from __future__ import annotations

import os

from q35c import arguments
from q35c.artifact import read_artifact
from q35c.errors import MemoryRefused
from q35c.runtime.executor import Executor
from q35c.runtime.memory import StateBudget, check_memory
from q35c.runtime.model import Model
from q35c.runtime.targets import find_machine

VERIFY_BYTES = 256 << 20
MAX_BATCH = 1024


def load_model(
    path: str | os.PathLike[str],
    threads: int | None = None,
    verify: bool | None = None,
    *,
    context: int | None = None,
    batch: int | None = None,
    mmap: bool = True,
    device: str | None = None,
) -> Model:
    """Open an artifact for generating.

    threads   worker threads, at most one for each CPU (more are not started: Q35CWarning); None: Q35C_THREADS,
              else the physical cores this process may use, and fewer while other processes use them
    verify    check the hash of the weights; None: if they have at most 256 MiB, or are copied to a device
    context   tokens per sequence, by default as compiled, at most what the model can take
    batch     sequences decoded together, by default the compiled batch; more than that are decoded by several steps
    mmap      map the weights from the file (shared, lazy), or read them into private memory; a device gets a copy
    device    `cpu`, or `cuda:N` for the Nth NVIDIA device; None: what the artifact was compiled for, the first of its kind

    Raises ArtifactError (damaged or no artifact, other version, CPU lacks instructions), MemoryRefused
    (before any weight is read), OptionError. For a device NoDevice (no driver, too old, no device), IncompatibleDevice (the
    artifact has no code for it), OutOfDeviceMemory, DeviceError.
    """
    place = arguments.path("path", path)
    verify = None if verify is None else arguments.flag("verify", verify)
    mapped = arguments.flag("mmap", mmap)
    artifact = read_artifact(place)
    try:
        manifest = artifact.manifest
        context = _choose("context", context, manifest.context, manifest.max_context)
        batch = _choose("batch", batch, manifest.batch, MAX_BATCH)
        machine = find_machine(manifest, threads, device)
        machine.check(manifest.target)
        have = machine.available_memory()
        check_memory(manifest, context, batch, have, machine.sequence_bytes)
        artifact.verify_segments()
        if verify is None:
            verify = machine.reads_all or manifest.weights_bytes <= VERIFY_BYTES
        loaded = machine.load(artifact, mapped=mapped, is_verified=verify)
        budget = StateBudget(machine.sequence_bytes, machine.available_memory)
        return Model(artifact, Executor(manifest, loaded), budget, context, batch)
    except BaseException as error:
        artifact.close()
        if isinstance(error, MemoryError):
            raise MemoryRefused("not enough memory to load the model", where=str(place)) from None
        raise


def _choose(name: str, asked: int | None, default: int, limit: int) -> int:
    return default if asked is None else arguments.integer(name, asked, 1, limit)
