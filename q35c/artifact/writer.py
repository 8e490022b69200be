"""Write an artifact in one streaming pass and publish it atomically.

The header is written first, with zeros where the hash of the weights will be; hashes have a fixed width,
so it is patched in place at the end. The data goes to a temporary file in the target's directory, which is
synced, read back, verified and only then renamed: at any moment the name holds the old file, the new
file or none.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from q35c import strictjson
from q35c.artifact import layout
from q35c.artifact.entries import Entry, io_layout
from q35c.artifact.leaves import Segment, State, Weight
from q35c.artifact.manifest import FORMAT, Manifest
from q35c.artifact.reader import Progress, read_artifact
from q35c.artifact.schema import decode, encode
from q35c.errors import ArtifactError, DiskRefused, InternalError
from q35c.layouts import blobs
from q35c.layouts.weights import WeightLayout, packed_shape
from q35c.outputs import PREFIX, SUFFIX, check_output, check_space, publish
from q35c.temporary import sweep_stale, temporary_file
from q35c.version import __version__

ZERO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """A weight of shape `matrix` to be written in a layout and format; `sources` are the checkpoint's tensors it was made of."""

    name: str
    layout: WeightLayout
    format: str
    matrix: tuple[int, ...]
    sources: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape in the file. Raises InternalError if the layout holds no such weight."""
        found = packed_shape(self.layout, self.format, self.matrix)
        if found is None:
            raise InternalError("a weight's layout holds no such weight", where=self.name, got=self)
        return found

    @property
    def bytes(self) -> int:
        """Return the bytes of the data, without padding."""
        return blobs.tensor_bytes(*self.stored)


def place_weights(entries: Iterable[WeightEntry]) -> tuple[Weight, ...]:
    """Return the entries with their offsets from the first weight."""
    listed = list(entries)
    stored = [entry.stored for entry in listed]
    offsets, _ = blobs.pack_tensors(stored)
    return tuple(
        Weight(
            name=entry.name,
            offset=offset,
            bytes=entry.bytes,
            dtype=cast(Any, dtype),
            shape=shape,
            layout=entry.layout,
            format=entry.format,
            matrix=entry.matrix,
            sources=entry.sources,
        )
        for entry, (dtype, shape), offset in zip(listed, stored, offsets, strict=True)
    )


def complete_manifest(
    fields: Mapping[str, Any], segments: Mapping[str, bytes], weights: Sequence[WeightEntry]
) -> tuple[Manifest, dict[str, bytes]]:
    """Add what follows from the rest (io, memory, weights, segments) and check everything.

    Returns the manifest and the segments as they are to be written: the code with its trailer.

    `fields` holds model, target, precision, context, batch, entries, row_layouts, arena_bytes, max_threads, state, kernels, probes and generation, as JSON values or dataclasses; a derived field may be given and must then
    be right. Raises InternalError, because a wrong manifest is the compiler's mistake.
    """
    try:
        document: dict[str, Any] = json.loads(strictjson.dumps(encode(fields)))
        placed = place_weights(weights)
        _, size = blobs.pack_tensors((weight.dtype, weight.shape) for weight in placed)
        hashed = {name: _describe(data) for name, data in segments.items()}
        hashed["weights"] = {"bytes": size, "sha256": ZERO_HASH}
        document |= {"format": FORMAT, "segments": hashed}
        document |= {"weights": encode(placed), "weights_bytes": size}
        _add_derived(document)
        manifest = Manifest.from_dict(document)
        code = segments["code"] + manifest.code_trailer
        described = {**manifest.segments, "code": Segment(**_describe(code))}
        return replace(manifest, segments=described), {**segments, "code": code}
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise InternalError(f"the compiler made a manifest that is not valid: {error}") from error


def _describe(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _add_derived(document: dict[str, Any]) -> None:
    entries = [decode(Entry, entry, "$.entries") for entry in document["entries"]]
    document.setdefault("producer", f"q35c {__version__}")
    document.setdefault("barrier_bytes", 128)
    document.setdefault("vision", None)  # of a model that reads text alone
    vocab, hidden = document["model"]["vocab_size"], document["model"]["hidden_size"]
    steps = [len(entry.steps) for entry in entries]
    if (vision := document["vision"]) is not None:
        steps.append(len(vision["tower"]["steps"]))
    document.setdefault("io", io_layout(entries, vocab, hidden, max(steps)))
    state = decode(State, document["state"], "$.state")
    memory = layout.memory_plan(
        weights=document["weights_bytes"],
        state=state.used_bytes(document["max_context"], document["context"]),
        arena=document["arena_bytes"],
        io=document["io"]["bytes"],
        batch=document["batch"],
    )
    document.setdefault("memory", memory)


class ArtifactWriter:
    """Write one artifact: `write` every weight in order, then `commit`. Use as a context manager.

    Leaving the block without `commit`, or by an exception, removes the temporary file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fields: Mapping[str, Any],
        segments: Mapping[str, bytes],
        weights: Sequence[WeightEntry],
        progress: Progress | None = None,
    ) -> None:
        """Check the manifest and the disk, then write the header and all segments but the weights.

        `fields` is described at `complete_manifest`. `progress` gets weight bytes done and in all.
        Raises InternalError, DiskRefused, OptionError if the directory cannot be written.
        """
        self.path = Path(path)
        self.manifest, segments = complete_manifest(fields, segments, weights)
        self._progress = progress
        self._digest = hashlib.sha256()
        self._index = self._done_in_weight = self._done = 0
        self._header = self._build_header()
        _, end = layout.segment_offsets(self.manifest.segments)
        self.file_bytes = len(self._header) + end
        check_output(self.path)
        sweep_stale(self.path.parent, PREFIX, SUFFIX)
        check_space(self.path.parent, self.file_bytes)
        self._file, self._temporary = temporary_file(self.path.parent, PREFIX, SUFFIX)
        try:
            self._put(self._header)
            for name in layout.segment_order(segments):
                data = segments[name]
                self._put(data)
                self._put(bytes(blobs.align(len(data)) - len(data)))
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> "ArtifactWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def write(self, name: str, chunk: Any) -> None:
        """Append bytes of weight `name`: any C-contiguous buffer, in the manifest's order.

        Raises InternalError if another weight is due or the chunk runs over its end, DiskRefused if
        the disk is full.
        """
        data = memoryview(chunk).cast("B") if memoryview(chunk).nbytes else memoryview(b"")
        weights = self.manifest.weights
        due = weights[self._index].name if self._index < len(weights) else None
        if name != due:
            raise InternalError("weights must be written in order", expected=due, got=name)
        weight = weights[self._index]
        left = weight.bytes - self._done_in_weight
        if len(data) > left:
            raise InternalError(f"weight {name} is too long", expected=left, got=len(data))
        self._put_weight_bytes(data)
        self._done_in_weight += len(data)
        if self._done_in_weight == weight.bytes:
            self._put_weight_bytes(memoryview(bytes(blobs.align(weight.bytes) - weight.bytes)))
            self._index, self._done_in_weight = self._index + 1, 0
        if self._progress is not None:
            self._progress(self._done, self.manifest.weights_bytes)

    def commit(self) -> Manifest:
        """Patch the hashes, sync, verify what the disk holds, and give the file its name.

        Returns the final manifest. Raises InternalError if weights are missing or the file that was
        read back differs, DiskRefused if the file system fails.
        """
        if self._index != len(self.manifest.weights):
            raise InternalError(
                "not all weights were written", expected=len(self.manifest.weights), got=self._index
            )
        self.manifest = self.manifest.with_weights_hash(self._digest.hexdigest())
        header = self._build_header()
        if len(header) != len(self._header):
            raise InternalError("patching the hashes changed the header's length")
        try:
            os.lseek(self._file, 0, os.SEEK_SET)
            self._put(header)
            os.fsync(self._file)
            # Verify what the disk holds, not the cache. Read back in order, the file is also cached in larger
            # pages than when it was written.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            self._verify()
            # Renamed while still locked, so that no sweeper can take it for stale in between.
            publish(self._temporary, self.path)
            os.close(self._file)
            self._file = -1
        except OSError as error:
            raise DiskRefused(f"cannot publish: {error.strerror}", where=str(self.path)) from None
        return self.manifest

    def abort(self) -> None:
        """Remove the temporary file; after `commit` this does nothing."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            os.close(self._file)
            self._file = -1

    def _build_header(self) -> bytes:
        text = self.manifest.to_json()
        digest = hashlib.sha256(text).hexdigest()
        return layout.build_header(text, digest, self.manifest.segments, self.manifest.weights)

    def _verify(self) -> None:
        try:
            with read_artifact(self._temporary) as artifact:
                artifact.verify_segments()
                artifact.verify_weights()
                is_same = artifact.manifest == self.manifest
        except ArtifactError as error:
            raise InternalError(f"the written file does not verify: {error}") from error
        if not is_same:
            raise InternalError("the written file has another manifest")

    def _put_weight_bytes(self, data: memoryview) -> None:
        self._digest.update(data)
        self._put(data)
        self._done += len(data)

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            try:
                view = view[os.write(self._file, view) :]
            except OSError as error:
                raise DiskRefused(
                    f"cannot write: {error.strerror}",
                    where=str(self.path.parent),
                    hint="free some disk space or write elsewhere",
                ) from None
