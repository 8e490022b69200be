"""A model on an NVIDIA device: weights, working memory, states and programs there, tokens and logits through pinned memory."""

from __future__ import annotations

import contextlib
import ctypes
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q35c.artifact import Artifact
from q35c.artifact.entries import ROWS, Entry
from q35c.artifact.leaves import Probe
from q35c.artifact.target import CudaTarget
from q35c.artifact.tower import Tower
from q35c.errors import OptionError, Q35CError
from q35c.layouts.blobs import tensor_bytes
from q35c.runtime.arrays import fill_inputs
from q35c.runtime.cuda.blocks import Memory, upload_weights
from q35c.runtime.cuda.context import Context
from q35c.runtime.cuda.program import load_programs
from q35c.runtime.cuda.states import DeviceState, StateMemory, StatePlan
from q35c.runtime.cuda.stream import Stream
from q35c.runtime.device import Block, HasState, Logits, Media, Record, Rows

_NO_PROBES = "a CUDA artifact has no probes"


class CudaDevice:
    """A model on its device, as `device.Device`."""

    threads = 1

    def __init__(
        self, context: Context, artifact: Artifact, plan: StatePlan, *, is_verified: bool
    ) -> None:
        """Take memory, load code and weights. Raises OutOfDeviceMemory, DeviceError, ArtifactError."""
        self._context, self._driver = context, context.driver
        self._manifest = artifact.manifest
        self.name = context.title
        self._memory = Memory(context.driver)
        self._finalizer = weakref.finalize(self, _close, self._memory, context)
        self._finalizer.atexit = False  # the driver does it
        try:
            with context.current("loading"):
                self._load(artifact, plan, is_verified=is_verified)
        except BaseException:
            self.close()
            raise

    def _load(self, artifact: Artifact, plan: StatePlan, *, is_verified: bool) -> None:
        manifest, memory, driver = artifact.manifest, self._memory, self._driver
        target = manifest.target
        assert isinstance(target, CudaTarget)
        image = artifact.segment(self._context.choose(target.images).segment)
        module = memory.take("cuModuleUnload", driver.size("cuModuleLoadData", image))
        self._steps, self._captures, copies = (memory.stream() for _ in range(3))
        self._io = memory.allocate(manifest.io.bytes)
        blobs = {
            "weights": memory.allocate(manifest.weights_bytes),
            "arena": memory.allocate(manifest.arena_bytes),
            "io": self._io,
            "barrier": memory.allocate(manifest.barrier_bytes),
        }
        self.states = StateMemory(self._context, plan, self._steps, copies)
        memory.defer(self.states.close)
        blobs["state"] = self.states.origin
        self._programs = load_programs(driver, memory, module, target, manifest.entries, blobs)
        self._host = memory.pin(manifest.io.bytes)
        for stream in (self._steps, copies):  # first of all: what was cut short may still go on
            memory.defer(stream.settle)
        self._fields = {
            name: self._host.view(field.dtype, field.shape, field.offset)
            for name, field in manifest.io.fields.items()
        }
        with self._steps.work(blobs):
            sizes = {"io": manifest.io.bytes, "barrier": manifest.barrier_bytes}
            for blob, size in sizes.items():
                driver.call("cuMemsetD8Async", blobs[blob], 0, size, self._steps.handle)
        upload_weights(artifact, blobs["weights"], driver, is_verified=is_verified)

    def reserve(self, context: int) -> DeviceState:
        return self.states.reserve()

    def block(self, size: int) -> Block:
        raise OptionError(_NO_PROBES, where=self._context.title)

    def run(
        self,
        entry: Entry,
        sequences: Sequence[HasState],
        tokens: Sequence[int],
        media: Media | None = None,
        record: Record | None = None,
    ) -> Logits:
        count, each = len(tokens), len(tokens) // len(sequences)
        rows = entry.logits_rows(len(sequences), count)
        states = [_of_device(sequence) for sequence in sequences]
        with self._context.current(f"entry {entry.name}"):
            self._steps.settle()
            self.states.reclaim()
            fill_inputs(self._fields, self.states.origin, sequences, tokens, media)
            begin = time.perf_counter()
            with self._steps.work(states):
                for sequence, state in zip(sequences, states, strict=True):
                    state.commit(sequence.length + each, self._steps)
                has_rows = media is not None and len(media.rows) > 0
                events = self._enqueue(
                    entry, count, rows, has_rows=has_rows, is_recorded=record is not None
                )
            seconds = time.perf_counter() - begin
            if record is not None:
                record(begin, seconds, self._nanoseconds(events))
        return self._fields["logits"][:rows].copy()

    def see(
        self,
        tower: Tower,
        inputs: Mapping[str, NDArray[Any]],
        tokens: int,
        record: Record | None = None,
    ) -> Rows:
        raise OptionError("this device sees no pictures", where=self._context.title)

    def _enqueue(
        self, entry: Entry, count: int, rows: int, *, has_rows: bool, is_recorded: bool
    ) -> Sequence[int]:
        """Add a step to the stream; return the events before each of its launches and after the last, if it is recorded."""
        program = self._programs[entry.name]
        is_usual = entry.tokens == 1 or count == entry.rows
        if is_usual and not has_rows and not is_recorded:
            captures = self._captures
            graph = program.graph(
                count,
                captures,
                lambda: self._upload(entry, captures),
                lambda: self._download(rows, captures),
            )
            self._driver.call("cuGraphLaunch", graph, self._steps.handle)
            return ()
        events: Sequence[int] = ()
        self._upload(entry, self._steps, has_rows=has_rows)
        if is_recorded:
            events = program.record(count, self._steps)
        else:
            program.enqueue(count, self._steps)
        self._download(rows, self._steps)
        return events

    def _upload(self, entry: Entry, stream: Stream, *, has_rows: bool = False) -> None:
        """Add a copy of what an entry reads: of pictures' rows, which are large, only if there are some."""
        names = [name for name in entry.inputs if has_rows or name != ROWS]
        fields = [self._manifest.io.fields[name] for name in names]
        start = min(field.offset for field in fields)
        end = max(field.offset + tensor_bytes(field.dtype, field.shape) for field in fields)
        self._driver.call(
            "cuMemcpyHtoDAsync_v2",
            self._io + start,
            self._host.address + start,
            end - start,
            stream.handle,
        )

    def _download(self, rows: int, stream: Stream) -> None:
        """Add a copy of rows of logits."""
        field = self._manifest.io.fields["logits"]
        size = tensor_bytes(field.dtype, (rows, *field.shape[1:]))
        if size:
            host, device = self._host.address + field.offset, self._io + field.offset
            self._driver.call("cuMemcpyDtoHAsync_v2", host, device, size, stream.handle)

    def _nanoseconds(self, events: Sequence[int]) -> NDArray[np.int64]:
        """Return when each event came, counted from the first."""
        times = np.zeros(len(events), np.int64)
        for number, event in enumerate(events):
            milliseconds = ctypes.c_float()
            self._driver.call("cuEventElapsedTime", ctypes.byref(milliseconds), events[0], event)
            times[number] = round(milliseconds.value * 1e6)
        return times

    def run_probe(self, probe: Probe, address: int, amount: int) -> float:
        raise OptionError(_NO_PROBES, where=self._context.title)

    def close(self) -> None:
        self._finalizer()


def _of_device(sequence: HasState) -> DeviceState:
    state = sequence.state
    assert isinstance(state, DeviceState)  # `Session` takes it from this device
    return state


def _close(memory: Memory, context: Context) -> None:
    """Give back all that a model has taken. Nothing can be done about errors, and where the context is lost, nothing need be."""
    if not context.origin.is_elsewhere:
        with contextlib.suppress(Q35CError), context.current("closing"):
            memory.close()
        context.close()
