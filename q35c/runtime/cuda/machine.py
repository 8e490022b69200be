"""An NVIDIA device, before a model is loaded."""

from __future__ import annotations

from q35c.artifact import Artifact, Manifest
from q35c.artifact.target import CudaTarget, Target
from q35c.errors import IncompatibleDevice
from q35c.runtime.cuda.context import Context
from q35c.runtime.cuda.device import CudaDevice
from q35c.runtime.cuda.states import StateMemory, StatePlan, granularity_of
from q35c.runtime.device import Device
from q35c.runtime.memory import Available


class Cuda:
    """One device of the driver, as `device.Machine`."""

    threads = 1
    reads_all = True

    def __init__(self, manifest: Manifest, ordinal: int) -> None:
        """Take the number of a device; the driver is loaded by `check`."""
        self._manifest, self._ordinal = manifest, ordinal
        self._states: StateMemory | None = None

    def check(self, target: Target) -> None:
        """Find the device and the image that fits it, then take part in the device's context."""
        assert isinstance(target, CudaTarget)  # `runtime/targets.py` chooses by the target
        self._context = Context(self._ordinal)
        self._context.choose(target.images)
        most = max(kernel.shared_bytes for kernel in target.kernels)
        if most > self._context.shared_bytes:
            raise IncompatibleDevice(
                "the device has too little shared memory for the artifact's kernels",
                where=self._context.title,
                expected=f"{most} bytes of a block",
                got=self._context.shared_bytes,
                hint="compile the model for this device alone",
            )
        self._context.open()
        self._plan = StatePlan(self._manifest, granularity_of(self._context))

    def available_memory(self) -> Available:
        if self._states is not None:
            self._states.reclaim()
        return self._context.available_memory()

    def sequence_bytes(self, tokens: int) -> int:
        return self._plan.state_bytes(tokens)

    def load(self, artifact: Artifact, *, mapped: bool, is_verified: bool) -> Device:
        device = CudaDevice(self._context, artifact, self._plan, is_verified=is_verified)
        self._states = device.states
        return device
