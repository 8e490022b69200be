"""Blocks of memory: on the device, and on the host where the device may copy by itself; weights on their way there."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Artifact
from q35c.errors import Q35CError
from q35c.layouts import blobs
from q35c.runtime.arrays import NUMPY_TYPES
from q35c.runtime.cuda.driver import Driver
from q35c.runtime.cuda.stream import Stream

STAGING_BYTES = 64 << 20  # of each buffer that weights pass through


class Memory:
    """What a model takes of a device: all of it is given back at once, whatever part of loading it was taken in."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._undo = contextlib.ExitStack()

    def allocate(self, size: int) -> int:
        """Return the address of memory on the device. Raises OutOfDeviceMemory."""
        return self.take("cuMemFree_v2", self.driver.size("cuMemAlloc_v2", size))

    def pin(self, size: int) -> PinnedBlock:
        """Return memory of the host that the device reaches. Raises OutOfDeviceMemory."""
        return PinnedBlock(
            self.take("cuMemFreeHost", self.driver.size("cuMemHostAlloc", size, 0)), size
        )

    def stream(self) -> Stream:
        """Return a new stream."""
        stream = Stream(self.driver)
        self.take("cuStreamDestroy_v2", stream.handle)
        return stream

    def take(self, give_back: str, handle: int) -> int:
        """Have something given back by a function of the driver; return it."""
        self._undo.callback(self.driver.function(give_back), handle)
        return handle

    def defer(self, give_back: Callable[[], None]) -> None:
        """Have something else done in its turn."""

        def attempt() -> None:
            with contextlib.suppress(Q35CError):
                give_back()

        self._undo.callback(attempt)

    def close(self) -> None:
        """Give everything back, the last first. Nothing can be done about what fails."""
        self._undo.close()


class PinnedBlock:
    """Memory of the host at a place that the device knows. It does not outlive what allocated it."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.bytes = address, size
        self.memory = memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B")
        self._array = np.frombuffer(self.memory, np.uint8)

    def view(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return a writable array over a part of the block; `dtype` is the manifest's name."""
        size = blobs.tensor_bytes(dtype, shape)
        return self._array[offset : offset + size].view(NUMPY_TYPES[dtype]).reshape(shape)


class _Stage:
    """A buffer that weights pass through: read into, then copied to the device and hashed at once."""

    def __init__(self, memory: Memory, size: int) -> None:
        self.block = memory.pin(size)
        self._driver = memory.driver
        self._stream = memory.stream()
        self._hashed: Future[None] | None = None

    def send(self, part: memoryview, address: int, hashed: Future[None] | None) -> None:
        """Start to copy a part of the buffer; `hashed` tells when it is in the hash."""
        self._hashed = hashed
        copy, stream = "cuMemcpyHtoDAsync_v2", self._stream.handle
        self._driver.call(copy, address, self.block.address, len(part), stream)

    def wait(self) -> None:
        """Wait until the buffer may be written to again."""
        if self._hashed is not None:
            self._hashed.result()
        self._stream.synchronize()

    def settle(self) -> None:
        """Wait, where something has failed that is worth more words than what fails now."""
        with contextlib.suppress(Q35CError):
            self.wait()


def upload_weights(artifact: Artifact, address: int, driver: Driver, *, is_verified: bool) -> None:
    """Copy the weights from the file to the device, through two buffers; the context must be current.

    While one is read into, the other is copied and, `is_verified`, hashed: what is hashed is what the device gets. Raises
    ArtifactError for a file that is damaged or cannot be read, OutOfDeviceMemory, DeviceError.
    """
    total = artifact.manifest.weights_bytes
    size = min(STAGING_BYTES, total)
    digest = hashlib.sha256()
    with contextlib.closing(Memory(driver)) as memory, ThreadPoolExecutor(1) as hasher:
        stages = [_Stage(memory, size) for _ in range(min(2, -(-total // size)))]
        try:
            for start, stage in zip(range(0, total, size), itertools.cycle(stages)):
                stage.wait()
                part = stage.block.memory[: total - start]
                artifact.read_weights_into(part, start)
                hashed = hasher.submit(digest.update, part) if is_verified else None
                stage.send(part, address + start, hashed)
            for stage in stages:
                stage.wait()
        except BaseException:  # the buffers must not go before
            for stage in stages:
                stage.settle()
            raise
    if is_verified:
        artifact.check_weights_hash(digest.hexdigest())
