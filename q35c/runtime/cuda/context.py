"""One device of the driver: its name, what it can run, and the context in which this process uses it."""

from __future__ import annotations

import contextlib
import ctypes
import re
import uuid
import weakref
from collections.abc import Generator, Iterable

from q35c.artifact.target import EMULATED, CudaImage
from q35c.errors import (
    DeviceError,
    DeviceFault,
    IncompatibleDevice,
    NoDevice,
    OutOfDeviceMemory,
    Q35CError,
)
from q35c.runtime.cuda.driver import Driver
from q35c.runtime.memory import Available
from q35c.runtime.process import Origin

# Numbers of CUdevice_attribute.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_SHARED_BYTES_OPT_IN = 97
_HAS_VIRTUAL_MEMORY = 102
_NO_HARDWARE = (0, 0)  # the compute capability of the tests' emulated device


class Context:
    """A device's primary context, which other libraries of this process share. Thread-safe."""

    def __init__(self, ordinal: int) -> None:
        """Find the device. Nothing is allocated on it yet. Raises NoDevice."""
        self.driver = Driver()
        self.origin = Origin()
        self.ordinal = ordinal
        self.title = f"cuda:{ordinal}"
        self._fault: DeviceFault | None = None
        self._handle = 0
        with self._named():
            self._find()

    def _find(self) -> None:
        count = self.driver.integer("cuDeviceGetCount")
        if self.ordinal >= count:
            raise NoDevice(
                "no such device",
                expected=f"cuda:0 to cuda:{count - 1}" if count else "a device",
                got=self.title,
                hint="`nvidia-smi -L` lists them; CUDA_VISIBLE_DEVICES hides and renumbers them",
            )
        self.device = self.driver.integer("cuDeviceGet", self.ordinal)
        self.title = f"cuda:{self.ordinal} ({self._name()})"
        self.capability = (self.attribute(_CAPABILITY_MAJOR), self.attribute(_CAPABILITY_MINOR))
        self.shared_bytes = self.attribute(_SHARED_BYTES_OPT_IN)
        if not self.attribute(_HAS_VIRTUAL_MEMORY):
            raise NoDevice(
                "the device cannot map memory by use",
                expected="virtual memory management",
                got=f"compute capability {self.capability[0]}.{self.capability[1]}",
                hint="use another device, or compile with --target cpu",
            )

    def _name(self) -> str:
        """Return the device's name and its UUID, as `nvidia-smi -L` has them: numbers change with CUDA_VISIBLE_DEVICES."""
        name, identity = ctypes.create_string_buffer(100), ctypes.create_string_buffer(16)
        self.driver.call("cuDeviceGetName", name, len(name), self.device)
        self.driver.call("cuDeviceGetUuid_v2", identity, self.device)
        return f"{name.value.decode('ascii', 'replace')}, GPU-{uuid.UUID(bytes=identity.raw)}"

    def attribute(self, number: int) -> int:
        """Return one of the device's attributes."""
        return self.driver.integer("cuDeviceGetAttribute", number, self.device)

    def choose(self, images: Iterable[CudaImage]) -> CudaImage:
        """Return the image that fits best. Raises IncompatibleDevice if none does."""
        images = list(images)
        fitting = [image for image in images if fits(image.architecture, self.capability)]
        if not fitting:
            major, minor = self.capability
            raise IncompatibleDevice(
                "the artifact holds no code for this device",
                where=self.title,
                expected=", ".join(image.architecture for image in images),
                got=f"compute capability {major}.{minor}",
                hint=f"compile the model with --target cuda:sm_{major}{minor}",
            )
        return max(fitting, key=lambda image: _rank(image.architecture))

    def open(self) -> None:
        """Create the primary context, or take part in it; it is given back with this object."""
        if not self._handle:
            with self._named():
                self._handle = self.driver.size("cuDevicePrimaryCtxRetain", self.device)
            self._finalizer = weakref.finalize(self, _release, self.driver, self.device, self.origin)  # fmt: skip
            self._finalizer.atexit = False  # the driver does it

    def close(self) -> None:
        """Give the context back. Closing twice is harmless."""
        if self._handle:
            self._handle = 0
            self._finalizer()

    @contextlib.contextmanager
    def current(self, doing: str = "") -> Generator[None]:
        """Let this thread use the device; errors say which device, and what was being done.

        Raises DeviceFault at once if the device has failed before.
        """
        if (fault := self._fault) is not None:
            got = f"{fault.where}: {fault.got}"
            raise DeviceFault(
                "the device has failed before",
                where=self.title,
                code=fault.code,
                got=got,
                hint=fault.hint,
            )
        with self._named(doing), self.driver.current(self._handle):
            yield

    @contextlib.contextmanager
    def _named(self, doing: str = "") -> Generator[None]:
        try:
            yield
        except (DeviceError, OutOfDeviceMemory) as error:
            error.where = error.where or ", ".join(filter(None, (self.title, doing)))
            if isinstance(error, DeviceFault):
                self._fault = error
            raise

    def available_memory(self) -> Available:
        """Return the bytes that the device has left."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self.current("memory"):
            self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return Available(free.value, self.title, OutOfDeviceMemory)


def _release(driver: Driver, device: int, origin: Origin) -> None:
    if not origin.is_elsewhere:
        with contextlib.suppress(Q35CError):
            driver.call("cuDevicePrimaryCtxRelease_v2", device)


_ARCHITECTURE = re.compile(r"sm_([0-9]+)([0-9])([af]?)")


def fits(architecture: str, capability: tuple[int, int]) -> bool:
    """Say whether a device of this compute capability runs code of an architecture.

    Code runs on the same and later minor versions of one major version; with the suffix `a` on one version alone.
    """
    found = _ARCHITECTURE.fullmatch(architecture)
    if found is None or capability == _NO_HARDWARE:
        return architecture == EMULATED and capability == _NO_HARDWARE
    major, minor = int(found[1]), int(found[2])
    if found[3] == "a":
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _rank(architecture: str) -> tuple[str, str]:
    """Return what the best of fitting architectures has the most of: a late version, and a suffix."""
    return architecture.rstrip("af"), architecture
