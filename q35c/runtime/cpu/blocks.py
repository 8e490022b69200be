"""Blocks of host memory: what programs write to, and the weights."""

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Artifact, Manifest
from q35c.artifact.leaves import StateTensor
from q35c.errors import MemoryRefused, OptionError
from q35c.layouts import blobs
from q35c.runtime.arrays import NUMPY_TYPES
from q35c.runtime.device import Saved

_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.12 on


class Region:
    """A zeroed block of private memory, page aligned, committed on touch.

    It lives as long as something refers to it or to a view of it: there is no explicit close, so that
    no thread can be left with an address that is gone.
    """

    def __init__(self, size: int, *, huge_bytes: int = 0) -> None:
        """Reserve `size` bytes; ask for huge pages in the first `huge_bytes`, for none in the rest.

        Raises MemoryRefused if the address space does not suffice.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryRefused(
                f"cannot reserve memory: {error}", expected=f"{size} bytes of address space"
            ) from None
        self.bytes = size
        self._advise_huge(huge_bytes)
        self._array: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.address: int = self._array.__array_interface__["data"][0]

    def view(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return a writable array over a part of the block; `dtype` is the manifest's name."""
        size = blobs.tensor_bytes(dtype, shape)
        return self._array[offset : offset + size].view(NUMPY_TYPES[dtype]).reshape(shape)

    def memory(self) -> memoryview:
        """Return the whole block as writable bytes."""
        return memoryview(self._map)

    def zero(self, start: int = 0) -> None:
        """Make the block zero and give its memory back, all or from the first whole page behind `start` on."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < self.bytes:
            self._map.madvise(mmap.MADV_DONTNEED, first)

    def _advise_huge(self, huge_bytes: int) -> None:
        border = min(huge_bytes, self.bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            if border:
                self._map.madvise(mmap.MADV_HUGEPAGE, 0, border)
            if border < self.bytes:
                self._map.madvise(mmap.MADV_NOHUGEPAGE, border)


class StateBlock:
    """The state of one sequence, as `device.State`."""

    def __init__(self, manifest: Manifest, context: int) -> None:
        """Reserve the state of up to `context` tokens: one for all is used whole, of others what does not grow."""
        state = manifest.state
        is_full = context == manifest.max_context
        self._manifest = manifest
        self._region = Region(
            state.bytes, huge_bytes=state.bytes if is_full else _fixed_prefix(state.tensors)
        )
        self.address = self._region.address

    def zero(self) -> None:
        self._region.zero()

    def save(self, tokens: int) -> Saved:
        return tuple(part.copy() for part in self._parts(tokens))

    def restore(self, saved: Saved, tokens: int) -> None:
        _fill(self._parts(tokens), saved)

    def save_fixed(self) -> Saved:
        return tuple(view.copy() for tensor, view in self._views() if tensor.growth == "fixed")

    def restore_fixed(self, saved: Saved) -> None:
        _fill((view for tensor, view in self._views() if tensor.growth == "fixed"), saved)

    def save_cells(self, start: int, end: int) -> Saved:
        return tuple(part.copy() for part in self._cells(start, end))

    def restore_cells(self, saved: Saved, start: int, end: int) -> None:
        _fill(self._cells(start, end), saved)

    def _views(self) -> Iterator[tuple[StateTensor, NDArray[Any]]]:
        for tensor in self._manifest.state.tensors:
            yield tensor, self._region.view(tensor.dtype, tensor.shape, tensor.offset)

    def _parts(self, tokens: int) -> Iterator[NDArray[Any]]:
        """Yield views of the state that so many tokens use: along axis 1 where it grows."""
        for tensor, view in self._views():
            if tensor.growth == "context":
                view = view[:, : tensor.used_cells(self._manifest.max_context, tokens)]
            yield view

    def _cells(self, start: int, end: int) -> Iterator[NDArray[Any]]:
        """Yield views of what grows, from one border of blocks to another."""
        for tensor, view in self._views():
            if tensor.growth == "context":
                first, last = (
                    tensor.used_cells(self._manifest.max_context, tokens) for tokens in (start, end)
                )
                yield view[:, first:last]


def _fill(parts: Iterable[NDArray[Any]], saved: Saved) -> None:
    """Copy all, or nothing if one is of another shape: a copy may stem from a file."""
    views = list(parts)
    if [(v.dtype, v.shape) for v in views] != [(copy.dtype, copy.shape) for copy in saved]:
        raise OptionError("the copy is not of this state's shape")
    for view, copy in zip(views, saved, strict=True):
        view[...] = copy


def _fixed_prefix(tensors: Sequence[StateTensor]) -> int:
    """Return the bytes of the leading tensors that do not grow: they are used whole from the start."""
    growing = (tensor.offset for tensor in tensors if tensor.growth == "context")
    return next(growing, 0)


class WeightBlock:
    """The weights in memory, read-only: mapped from the file, or a private copy."""

    def __init__(self, artifact: Artifact, *, mapped: bool) -> None:
        """Map or copy the weights. Raises MemoryRefused where the address space does not suffice."""
        size = artifact.manifest.weights_bytes
        self._weights = {weight.name: weight for weight in artifact.manifest.weights}
        if mapped:
            try:
                block, delta = artifact.map_weights()
            except (OSError, ValueError) as error:
                raise MemoryRefused(f"cannot map the weights: {error}") from None
            self._bytes: NDArray[np.uint8] = np.frombuffer(block, dtype=np.uint8)[
                delta : delta + size
            ]
        else:
            region = Region(size, huge_bytes=size)
            artifact.read_weights_into(region.memory())
            self._bytes = region.view("u8", (size,))
            self._bytes.flags.writeable = False
        self.address: int = self._bytes.__array_interface__["data"][0]

    def buffer(self) -> memoryview:
        """Return all weights as read-only bytes."""
        return self._bytes.data

    def array(self, name: str) -> NDArray[Any]:
        """Return one packed weight, read-only; KeyError if there is none of that name."""
        weight = self._weights[name]
        data = self._bytes[weight.offset : weight.offset + weight.bytes]
        return data.view(NUMPY_TYPES[weight.dtype]).reshape(weight.shape)
