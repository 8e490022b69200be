"""What is kept of prompts, in files: a folder for each model, a file for each checkpoint.

A file holds a checkpoint, and the keys and values from the checkpoint before it on: files that share a beginning share the
files of it. A file's name says what is in it, so that nothing is written twice. What cannot be used is skipped with a line
in the log; it is removed when the folder is written next.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from q35c.artifact import Manifest
from q35c.errors import OptionError, Q35CError, StateError
from q35c.runtime.prefix_tree import RUN, Node, PrefixTree
from q35c.runtime.saved import Cells, Checkpoint, number_of
from q35c.runtime.state_file import read_state, write_state

log = logging.getLogger("q35c.cache")
SUFFIX = ".q35c-prefix"


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A checkpoint and the cells that lead to it from `start` on."""

    salt: str
    start: int
    checkpoint: Checkpoint
    runs: tuple[Cells, ...]


class PrefixFiles:
    """The folder of one model."""

    def __init__(self, directory: Path, manifest: Manifest, digest: str) -> None:
        """Make the folder below a directory. Raises OptionError if others could write to it."""
        self._manifest, self._digest = manifest, digest
        self.folder = directory / digest[:32]
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
        except OSError as error:
            raise OptionError(
                f"cannot keep files here: {error.strerror}", where=str(directory)
            ) from None
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise OptionError(
                "others can write to this folder",
                where=str(self.folder),
                hint="name one of your own",
            )

    def save(self, tree: PrefixTree) -> int:
        """Write what is in a tree and remove what is not; return the files written. Raises DiskRefused, OptionError."""
        wanted: dict[str, tuple[Node, str]] = {}
        for node, salt in tree.marked().items():
            if node.checkpoint is not None:
                wanted[self._name(node.checkpoint, salt)] = node, salt
        there = {path.name for path in self._files()}
        for name in there - wanted.keys():
            (self.folder / name).unlink(missing_ok=True)
        missing = sorted(wanted.keys() - there)
        for name in missing:
            self._write(self.folder / name, *wanted[name])
        return len(missing)

    def load(self, tree: PrefixTree, max_bytes: int) -> int:
        """Add to a tree what is in the folder, the newest first, within so many bytes; return the checkpoints added."""
        parts: list[tuple[int, _Part]] = []
        newest_first = sorted(self._files(), key=lambda path: -path.stat().st_mtime_ns)
        for age, path in enumerate(newest_first):
            max_bytes -= path.stat().st_size
            if max_bytes < 0:
                log.info("%s: no room for more", path)
                break
            try:
                parts.append((-age, self._read(path)))
            except Q35CError as error:
                log.warning("skipped: %s", str(error).replace("\n", " "))
        before = len(tree)
        for used, part in sorted(parts, key=lambda item: item[1].checkpoint.length):
            _attach(tree, part, used)
        return len(tree) - before

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.glob(f"*{SUFFIX}") if path.is_file())

    def _name(self, checkpoint: Checkpoint, salt: str) -> str:
        text = f"{self._digest} {len(salt)} {salt} ".encode() + checkpoint.ids
        return hashlib.sha256(text).hexdigest()[:40] + SUFFIX

    def _write(self, path: Path, node: Node, salt: str) -> None:
        checkpoint = node.checkpoint
        assert checkpoint is not None
        runs: list[Cells] = []
        for step in node.path():
            if step.cells is None or (step is not node and step.checkpoint is not None):
                break
            runs.insert(0, step.cells)
        columns = zip(*(run.tensors for run in runs), strict=True)
        metadata = {
            "kind": "prefix",
            "digest": self._digest,
            "salt": salt,
            "start": str(runs[0].start),
            "length": str(checkpoint.length),
            "position": str(checkpoint.position),
        }
        cells = [np.concatenate(column, axis=1) for column in columns]
        ids = np.frombuffer(checkpoint.ids, np.int64)
        write_state(path, metadata, [ids, *checkpoint.tensors, *cells])

    def _read(self, path: Path) -> _Part:
        """Return what is in a file. Raises StateError if it is damaged or not of this model, MemoryRefused."""
        metadata, arrays = read_state(path)
        start, length, position = (
            number_of(metadata.get(name)) for name in ("start", "length", "position")
        )
        shapes = [(length,), *self._shapes(start, length)]
        is_ours = metadata.get("kind") == "prefix" and metadata.get("digest") == self._digest
        is_right = 0 <= start < length and start % RUN == length % RUN == 0 and position >= 0
        if not (is_ours and is_right) or [array.shape for array in arrays] != shapes:
            raise StateError("not a part of this model's cache", where=str(path))
        if arrays[0].dtype != np.int64:
            raise StateError("not a part of this model's cache", where=str(path))
        fixed = sum(tensor.growth == "fixed" for tensor in self._manifest.state.tensors)
        checkpoint = Checkpoint(
            self._digest, length, position, tuple(arrays[1 : 1 + fixed]), arrays[0].tobytes()
        )
        count = (length - start) // RUN
        columns = [np.split(array, count, axis=1) for array in arrays[1 + fixed :]]
        runs = tuple(
            Cells(
                self._digest,
                start + index * RUN,
                start + (index + 1) * RUN,
                tuple(np.ascontiguousarray(column[index]) for column in columns),
            )
            for index in range(count)
        )
        return _Part(metadata.get("salt", ""), start, checkpoint, runs)

    def _shapes(self, start: int, end: int) -> Iterator[tuple[int, ...]]:
        """Yield the shapes of what does not grow, then of what does, for a range of tokens."""
        tensors = self._manifest.state.tensors
        yield from (tensor.shape for tensor in tensors if tensor.growth == "fixed")
        for tensor in tensors:
            if tensor.growth == "context":
                first, last = (
                    tensor.used_cells(self._manifest.max_context, at) for at in (start, end)
                )
                yield (tensor.shape[0], last - first, *tensor.shape[2:])


def _attach(tree: PrefixTree, part: _Part, used: int) -> None:
    """Add a part to a tree, unless what it stands on is missing."""
    ids = np.frombuffer(part.checkpoint.ids, np.int64)
    if tree.known_tokens(ids, part.salt) < part.start:
        log.info("skipped a checkpoint at token %d: its beginning is missing", len(ids))
        return

    def run_at(start: int, end: int) -> Cells:
        return part.runs[(start - part.start) // RUN]

    tree.add([part.checkpoint], run_at, part.salt, used)
