"""Open an artifact, trusting nothing in it.

There is exactly one file layout per manifest: the reader extracts the manifest from the header, checks
it, rebuilds the header from it and requires the same bytes and the implied file length. Nothing is
allocated or read before its size has been compared with the bytes that are there.
"""

import contextlib
import functools
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from q35c import strictjson
from q35c.artifact import layout
from q35c.artifact.manifest import TRAILER_BYTES, Manifest
from q35c.errors import ArtifactError
from q35c.layouts import blobs

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

_CHUNK_BYTES = 1 << 20
_MAX_VALUES = 500_000  # launch tables of the largest models have about 200,000
_METADATA = re.compile(
    rb'\{"__metadata__":\{"q35c":"([^"\\]*+(?:\\.[^"\\]*+)*+)","q35c\.sha256":"([0-9a-f]{64})"\}'
)
_NOT_OURS = "not a q35c artifact"


class Artifact:
    """An open, checked artifact file. Use it as a context manager or call `close`."""

    def __init__(self, path: Path, file: int, manifest: Manifest, digest: str, start: int) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self._file = file
        offsets, end = layout.segment_offsets(manifest.segments)
        self._offsets = {name: start + offset for name, offset in offsets.items()}
        self.file_bytes = start + end

    def __enter__(self) -> "Artifact":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Closing twice is harmless; a mapping of the weights stays valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def has_segment(self, name: str) -> bool:
        """Say whether the artifact holds a segment of that name."""
        return name in self.manifest.segments

    def segment(self, name: str) -> bytes:
        """Return the bytes of a segment other than the weights, its hash matched.

        Raises ArtifactError if it is absent or damaged.
        """
        if name == "weights" or name not in self.manifest.segments:
            known = layout.segment_order(self.manifest.segments)
            raise ArtifactError(
                f"no segment {name!r}", where=str(self.path), expected=known, got=name
            )
        return b"".join(self._checked_chunks(name))

    def code(self) -> bytes:
        """Return the shared object, its hash and its plan matched. Raises ArtifactError."""
        data = self.segment("code")
        self._check_plan(data)
        return data[:-TRAILER_BYTES]

    def verify_segments(self) -> None:
        """Check every segment but the weights: hashes, and the code's plan. Raises ArtifactError."""
        for name in layout.segment_order(self.manifest.segments):
            end = b""
            for chunk in self._checked_chunks(name):
                end = (end + chunk)[-TRAILER_BYTES:]
            if name == "code":
                self._check_plan(end)

    @functools.cached_property
    def _code_trailer(self) -> bytes:
        return self.manifest.code_trailer

    def _check_plan(self, data: bytes) -> None:
        if not data.endswith(self._code_trailer):
            raise self._damaged("code", "it was made for another manifest")

    def _checked_chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a segment; they are right only if no ArtifactError follows the last."""
        segment = self.manifest.segments[name]
        digest = hashlib.sha256()
        for chunk in self._chunks(name, 0, segment.bytes):
            digest.update(chunk)
            yield chunk
        padding = blobs.align(segment.bytes) - segment.bytes
        if any(b"".join(self._chunks(name, segment.bytes, padding))):
            raise self._damaged(name, "padding is not zero")
        if digest.hexdigest() != segment.sha256:
            raise self._damaged(name, "hash does not match")

    def verify_weights(self, progress: Progress | None = None) -> None:
        """Read all weights and check their hash. Raises ArtifactError."""
        total, done = self.manifest.weights_bytes, 0
        digest = hashlib.sha256()
        for chunk in self._chunks("weights", 0, total):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        self.check_weights_hash(digest.hexdigest())

    def check_weights_hash(self, sha256: str) -> None:
        """Compare a hash of the weights with the manifest's. Raises ArtifactError."""
        if sha256 != self.manifest.segments["weights"].sha256:
            raise self._damaged("weights", "hash does not match")

    def map_weights(self) -> tuple[mmap.mmap, int]:
        """Map the weights read-only and privately; return the map and the first weight's offset in it.

        Raises OSError where the address space does not suffice.
        """
        start = self._offsets["weights"]
        delta = start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(
            self._file,
            self.manifest.weights_bytes + delta,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ,
            offset=start - delta,
        )
        # A token reads all weights, and with 4 KiB pages misses the TLB all the time. Where the file system can cache
        # in huge pages (ext4 from Linux 6.16 on) decoding took 3 % less time, 10 % on fast memory.
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        return mapped, delta

    def read_weights_into(self, block: memoryview, start: int = 0) -> None:
        """Copy the weights from byte `start` on into a writable block, as many as there are and fit."""
        done = 0
        total = min(self.manifest.weights_bytes - start, len(block))
        at = self._offsets["weights"] + start
        while done < total:
            part = block[done : min(done + _CHUNK_BYTES, total)]
            try:
                count = os.preadv(self._file, [part], at + done)
            except OSError as error:
                raise self._unreadable("weights", error) from None
            if count == 0:
                raise self._damaged("weights", "file became shorter while it was read")
            done += count

    def _chunks(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """Yield `size` bytes of a segment, from its byte `start`."""
        at = self._offsets[name] + start
        end = at + size
        while at < end:
            try:
                chunk = os.pread(self._file, min(_CHUNK_BYTES, end - at), at)
            except OSError as error:
                raise self._unreadable(name, error) from None
            if not chunk:
                raise self._damaged(name, "file became shorter while it was read")
            at += len(chunk)
            yield chunk

    def _unreadable(self, name: str, error: OSError) -> ArtifactError:
        what = f"cannot read segment {name!r}: {error.strerror}"
        return ArtifactError(what, where=str(self.path), hint="copy the artifact elsewhere")

    def _damaged(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"segment {name!r} is damaged: {what}",
            where=str(self.path),
            hint="copy or compile the artifact again",
        )


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact and check its manifest and layout; data hashes are checked on use.

    Raises ArtifactError if the file is missing, damaged or no artifact, ArtifactVersionError if its
    format is another one.
    """
    place = Path(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        file = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "path is not valid"
        hint = (
            "give the file that compiling has written"
            if isinstance(error, FileNotFoundError)
            else None
        )
        raise ArtifactError(f"cannot open: {reason}", where=str(place), hint=hint) from None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, file)
        try:
            artifact = _read(place, file)
        except OSError as error:
            raise ArtifactError(f"cannot read: {error.strerror}", where=str(place)) from None
        except MemoryError:
            raise ArtifactError("header is too large for memory", where=str(place)) from None
        undo.pop_all()
    return artifact


def _read(path: Path, file: int) -> Artifact:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        is_directory = stat.S_ISDIR(status.st_mode)
        raise ArtifactError(
            _NOT_OURS,
            where=str(path),
            expected="a regular file",
            hint="compile the model in this directory first" if is_directory else None,
        )
    header = _read_header(path, file, status.st_size)
    found = _METADATA.match(header, 8)
    if found is None:
        raise ArtifactError(_NOT_OURS, where=str(path), expected="q35c metadata in the header")
    # The string is JSON escaped inside JSON; escapes other than \" and \\ cannot stem from the writer.
    text = found[1].replace(rb"\"", b'"').replace(rb"\\", b"\\")
    digest = hashlib.sha256(text).hexdigest()
    if digest != found[2].decode():
        raise ArtifactError(
            "manifest is damaged: hash does not match",
            where=str(path),
            hint="copy or compile the artifact again",
        )
    try:
        manifest = parse_manifest(text)
    except ArtifactError as error:
        where = f"{path}: {error.where}"
        raise type(error)(
            error.what, where=where, expected=error.expected, got=error.got, hint=error.hint
        ) from None
    _check_file(path, header, digest, text, manifest, status.st_size)
    return Artifact(path, file, manifest, digest, len(header))


def parse_manifest(text: bytes) -> Manifest:
    """Parse canonical manifest JSON strictly. Raises ArtifactError naming the place in it."""
    document = strictjson.loads(
        text,
        where="manifest",
        limit=layout.MAX_HEADER_BYTES,
        error=ArtifactError,
        max_values=_MAX_VALUES,
    )
    manifest = Manifest.from_dict(document)
    if manifest.to_json() != text:
        raise ArtifactError("manifest is not in canonical form", where="manifest")
    return manifest


def _read_header(path: Path, file: int, size: int) -> bytes:
    """Return the length prefix and the header, bounded before they are read."""
    prefix = os.pread(file, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(layout.MAX_HEADER_BYTES, size - 8):
        raise ArtifactError(
            _NOT_OURS if size else "file is empty",
            where=str(path),
            expected=f"a header of 2 to {min(layout.MAX_HEADER_BYTES, size)} bytes",
            got=length,
        )
    header = os.pread(file, 8 + length, 0)
    if len(header) != 8 + length:
        raise ArtifactError("file became shorter while it was read", where=str(path))
    return header


def _check_file(
    path: Path, header: bytes, digest: str, text: bytes, manifest: Manifest, size: int
) -> None:
    """Compare the header and the file's length with what the manifest implies, sizes with what can be."""
    for name, segment in manifest.segments.items():
        most = layout.most_segment_bytes(name)
        if name != "weights" and segment.bytes > most:
            raise ArtifactError(
                f"segment {name!r} is too large",
                where=str(path),
                expected=f"at most {most} bytes",
                got=segment.bytes,
            )
    implied = layout.build_header(text, digest, manifest.segments, manifest.weights)
    if header != implied:
        pairs = zip(header, implied, strict=False)
        at = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), len(implied))
        raise ArtifactError(
            f"header differs at byte {at} from the one its manifest implies",
            where=str(path),
            expected=implied[at : at + 60],
            got=header[at : at + 60],
        )
    _, end = layout.segment_offsets(manifest.segments)
    if size != len(header) + end:
        raise ArtifactError(
            "file is truncated" if size < len(header) + end else "file is too long",
            where=str(path),
            expected=f"{len(header) + end} bytes",
            got=size,
        )
