"""Write an artifact in one streaming pass and publish it atomically.

The header is written first, with zeros where the hash of the weights will be; hashes have a fixed width,
so it is patched in place at the end. The data goes to a temporary file in the target's directory, which is
synced, read back, verified and only then renamed: at any moment the name holds the old file, the new
file or none. A temporary is locked while its writer lives; unlocked ones are stale and are removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from q35c import strictjson
from q35c.artifact import layout
from q35c.artifact.manifest import FORMAT, Manifest, Segment, Weight
from q35c.artifact.reader import Progress, read_artifact
from q35c.artifact.schema import encode
from q35c.errors import ArtifactError, DiskRefused, InternalError, OptionError
from q35c.layouts import blobs

ZERO_HASH = "0" * 64
_PREFIX, _SUFFIX = ".q35c-", ".partial"


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """A packed weight to be written; `sources` are the checkpoint's tensors it was made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    sources: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Return the bytes of the data, without padding."""
        return blobs.tensor_bytes(self.dtype, self.shape)


def place_weights(entries: Iterable[WeightEntry]) -> tuple[Weight, ...]:
    """Return the entries with their offsets from the first weight."""
    listed = list(entries)
    offsets, _ = blobs.pack_tensors((entry.dtype, entry.shape) for entry in listed)
    return tuple(
        Weight(
            name=entry.name,
            offset=offset,
            bytes=entry.bytes,
            dtype=cast(Any, entry.dtype),
            shape=entry.shape,
            layout=entry.layout,
            sources=entry.sources,
        )
        for entry, offset in zip(listed, offsets, strict=True)
    )


def complete_manifest(
    fields: Mapping[str, Any], segments: Mapping[str, bytes], weights: Sequence[WeightEntry]
) -> tuple[Manifest, dict[str, bytes]]:
    """Add what follows from the rest (io, memory, weights, segments) and check everything.

    Returns the manifest and the segments as they are to be written: the code with its trailer.

    `fields` holds model, target, precision, context, batch, entries, arena_bytes, max_threads, state,
    kernels, probes and generation, as JSON values or dataclasses; a derived field may be given and must then
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
    from q35c import __version__

    entries = document["entries"]
    tokens = max(entry["max_tokens"] for entry in entries)
    rows = max(blobs.logits_rows(entry["logits"], entry["max_tokens"]) for entry in entries)
    document.setdefault("producer", f"q35c {__version__}")
    document.setdefault("barrier_bytes", 128)
    vocab = document["model"]["vocab_size"]
    steps = max(len(entry["steps"]) for entry in entries)
    document.setdefault("io", blobs.io_layout(tokens, document["batch"], rows, vocab, steps))
    memory = layout.memory_plan(
        weights=document["weights_bytes"],
        state=document["state"]["bytes"],
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
        sweep_stale(self.path.parent)
        _check_disk(self.path.parent, self.file_bytes)
        self._file, self._temporary = _create_temporary(self.path.parent)
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
            os.replace(self._temporary, self.path)
            os.close(self._file)
            self._file = -1
            _sync_directory(self.path.parent)
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


def sweep_stale(directory: Path) -> list[Path]:
    """Remove temporaries in a directory whose writers are dead; return what was removed."""
    removed: list[Path] = []
    for place in sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}")):
        with contextlib.suppress(OSError):
            file = os.open(place, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISREG(os.fstat(file).st_mode) and _is_at(file, place):
                    os.unlink(place)
                    removed.append(place)
            finally:
                os.close(file)
    return removed


def _create_temporary(directory: Path) -> tuple[int, Path]:
    """Create and lock a temporary file. A sweeper may win the race for the lock: then try again."""
    while True:
        place = directory / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            file = os.open(place, flags, 0o666)
        except OSError as error:
            raise OptionError(
                f"cannot write here: {error.strerror}", where=str(directory)
            ) from None
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, place):
            return file, place
        os.close(file)


def _is_at(file: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(place))
    except FileNotFoundError:
        return False


def check_output(path: Path) -> None:
    """Refuse a path that no artifact can be published at. Raises OptionError."""
    if not path.parent.is_dir():
        raise OptionError("no such directory", where=str(path.parent), hint="create it first")
    if path.is_dir():
        raise OptionError("a directory has this name", where=str(path), hint="name a file")
    if not os.access(path.parent, os.W_OK):
        raise OptionError("cannot write here", where=str(path.parent), hint="write elsewhere")


def _check_disk(directory: Path, need: int) -> None:
    status = os.statvfs(directory)
    have = status.f_bavail * status.f_frsize
    if need > have:
        raise DiskRefused(
            "not enough free disk space for the artifact",
            where=str(directory),
            expected=f"{need} bytes free",
            got=f"{have} bytes free",
            hint="free some disk space or write elsewhere",
        )


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
