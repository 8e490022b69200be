"""A model on host threads, in host memory. All pointers are 64-byte aligned; generated code relies on it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from q35c.artifact import Artifact, Manifest
from q35c.artifact.entries import Entry as EntryPlan
from q35c.artifact.leaves import Probe
from q35c.artifact.target import CpuTarget, Target
from q35c.artifact.tower import EMBEDDINGS, Tower
from q35c.errors import InternalError
from q35c.layouts import blobs
from q35c.runtime import memory
from q35c.runtime.arrays import fill_inputs
from q35c.runtime.cpu.blocks import Region, StateBlock, WeightBlock
from q35c.runtime.cpu.library import Arguments, Entry, Library, Workers
from q35c.runtime.cpu.machine import THREADS, check_target, choose_threads
from q35c.runtime.cpu.pace import Pace
from q35c.runtime.device import Device, HasState, Logits, Media, Record, Rows


class Cpu:
    """This machine, as `device.Machine`. By default its steps use fewer threads while others need the cores."""

    reads_all = False

    def __init__(self, manifest: Manifest, threads: int | None) -> None:
        self.threads = choose_threads(threads, manifest.max_threads)
        self._manifest = manifest
        self._yields = threads is None and THREADS not in os.environ

    def check(self, target: Target) -> None:
        assert isinstance(target, CpuTarget)  # `runtime/targets.py` chooses by the target
        check_target(target)

    def available_memory(self) -> memory.Available:
        return memory.available_memory()

    def sequence_bytes(self, tokens: int) -> int:
        return memory.state_bytes(self._manifest, tokens)

    def load(self, artifact: Artifact, *, mapped: bool, is_verified: bool) -> Device:
        weights = _load_weights(artifact, mapped=mapped, is_verified=is_verified)
        code = Library(artifact.code())
        return CpuDevice(artifact.manifest, code, weights, self.threads, yields=self._yields)


class CpuDevice:
    """Code, weights, working memory and threads of one model, as `device.Device`."""

    name = "cpu"

    def __init__(
        self,
        manifest: Manifest,
        library: Library,
        weights: WeightBlock,
        threads: int,
        *,
        yields: bool,
    ) -> None:
        """Start the threads. With `yields`, steps use fewer of them while others need the cores."""
        self.threads = threads
        self._manifest = manifest
        self._weights = weights
        self._entries: dict[str, Entry] = {
            entry.name: library.entry(entry.symbol) for entry in manifest.entries
        }
        self._library = library
        self._workers = Workers(threads)
        self._pace = Pace(threads) if yields and threads > 1 else None
        arena_bytes, io_bytes = _with_tower(manifest)
        self._arena = Region(arena_bytes, huge_bytes=arena_bytes)
        self._io = Region(io_bytes, huge_bytes=io_bytes)
        self._barrier = Region(manifest.barrier_bytes)
        self._fields = {
            name: self._io.view(field.dtype, field.shape, field.offset)
            for name, field in manifest.io.fields.items()
        }
        for block in (weights, self._arena, self._io, self._barrier):
            _check_aligned(block.address)

    def reserve(self, context: int) -> StateBlock:
        state = StateBlock(self._manifest, context)
        _check_aligned(state.address)
        return state

    def block(self, size: int) -> Region:
        return Region(size, huge_bytes=size)

    def run(
        self,
        entry: EntryPlan,
        sequences: Sequence[HasState],
        tokens: Sequence[int],
        media: Media | None = None,
        record: Record | None = None,
    ) -> Logits:
        fields, count = self._fields, len(tokens)
        states = [sequence.state for sequence in sequences]
        first = states[0].address
        fill_inputs(fields, first, sequences, tokens, media)
        fields["clock"][0] = record is not None
        arguments = Arguments(
            self._weights.address,
            first,
            self._arena.address,
            self._io.address,
            self._barrier.address,
            count,
        )
        # What is recorded is what all threads do.
        pace = self._pace if record is None else None
        begin, cpu = time.perf_counter(), time.process_time()
        self._workers.run(self._entries[entry.name], arguments, pace and pace.threads)
        seconds = time.perf_counter() - begin
        if pace is not None:
            pace.note((entry.name, count), seconds, time.process_time() - cpu)
        if record is not None:
            record(begin, seconds, fields["clock"][1 : len(entry.steps) + 2].copy())
        return fields["logits"][: entry.logits_rows(len(states), count)].copy()

    def see(
        self,
        tower: Tower,
        inputs: Mapping[str, NDArray[Any]],
        tokens: int,
        record: Record | None = None,
    ) -> Rows:
        start, made = self._manifest.io.bytes, tower.io.fields
        fields = {
            name: self._io.view(field.dtype, field.shape, start + field.offset)
            for name, field in made.items()
        }
        for name, array in inputs.items():
            fields[name][: len(array)] = array
        clock = self._fields["clock"]
        clock[0] = record is not None
        arguments = Arguments(
            self._weights.address, 0, self._arena.address, self._io.address, self._barrier.address, tokens
        )  # fmt: skip
        pace = self._pace if record is None else None
        begin, cpu = time.perf_counter(), time.process_time()
        self._workers.run(self._library.entry(tower.symbol), arguments, pace and pace.threads)
        seconds = time.perf_counter() - begin
        if record is not None:
            record(begin, seconds, clock[1 : len(tower.steps) + 2].copy())
        if pace is not None:
            pace.note((tower.symbol, tokens), seconds, time.process_time() - cpu)
        rows = fields[EMBEDDINGS][:tokens].copy()
        # Of a picture nothing is kept: the next may be long in coming.
        self._arena.zero(self._manifest.arena_bytes)
        self._io.zero(start)
        return rows

    def run_probe(self, probe: Probe, address: int, amount: int) -> float:
        _check_aligned(address)
        arguments = Arguments(0, address, 0, 0, self._barrier.address, amount)
        entry = self._library.entry(probe.symbol)
        begin = time.perf_counter()
        self._workers.run(entry, arguments)
        return time.perf_counter() - begin

    def close(self) -> None:
        if self._entries:
            self._workers.close()
            # Both are unmapped when the worker threads have let go of them, too.
            self._entries.clear()
            del self._library, self._weights


def _with_tower(manifest: Manifest) -> tuple[int, int]:
    """Return the bytes of arena and io, those of a vision tower behind the text's; who sees nothing touches none of them."""
    arena, io = manifest.arena_bytes, manifest.io.bytes
    if manifest.vision is None:
        return arena, io
    tower = manifest.vision.tower
    return max(arena, tower.arena_bytes), io + tower.io.bytes


def _load_weights(artifact: Artifact, *, mapped: bool, is_verified: bool) -> WeightBlock:
    if mapped:
        if is_verified:
            artifact.verify_weights()
        return WeightBlock(artifact, mapped=True)
    weights = WeightBlock(artifact, mapped=False)
    if is_verified:  # what is in memory, so that nothing can change after the check
        artifact.check_weights_hash(hashlib.sha256(weights.buffer()).hexdigest())
    return weights


def _check_aligned(address: int) -> None:
    if address % blobs.ALIGNMENT:
        raise InternalError("a block is not 64-byte aligned", got=hex(address))
