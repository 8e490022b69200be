"""Read files of a model directory that may be hostile: regular files, by name, never by link."""

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from q35c.errors import CheckpointError

_NAME = re.compile(r"[\w.-]+", re.ASCII)


class ModelDirectory:
    """One flat directory. Files are opened by name only; links and special files are refused.

    A cache that the hub client filled keeps its files as links into `links_into`; only there may
    links point.
    """

    def __init__(self, root: Path, links_into: Path | None = None) -> None:
        if not root.is_dir():
            raise CheckpointError("is not a directory", where=str(root))
        self.root = root
        self._links_into = links_into.resolve() if links_into else None

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        return sorted(entry.name for entry in os.scandir(self.root))

    def path(self, name: str) -> Path:
        """Return the path of a regular file. Raises CheckpointError if it is missing or unsafe."""
        path = self.root / name
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise CheckpointError(f"unsafe file name {name!r:.80}", where=str(self.root))
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                path = self._followed(path)
                mode = path.lstat().st_mode
        except FileNotFoundError:
            raise CheckpointError("file is missing", where=str(path)) from None
        if not stat.S_ISREG(mode):
            raise CheckpointError("is not a regular file", where=str(path))
        return path

    def _followed(self, path: Path) -> Path:
        if self._links_into is not None:
            target = path.resolve(strict=True)
            if target.is_relative_to(self._links_into):
                return target
        raise CheckpointError(
            "is a symbolic link; links are not followed",
            where=str(path),
            hint="copy the file itself here, or give the hub id instead of a cache path",
        )

    def open(self, name: str) -> BinaryIO:
        """Open a regular file for reading."""
        path = self.path(name)
        # O_NOFOLLOW and O_NONBLOCK: the file may have been exchanged since it was looked at.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise CheckpointError("is not a regular file", where=str(path))
        return file

    def read(self, name: str, limit: int) -> bytes:
        """Return a whole file of at most `limit` bytes."""
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > limit else file.read(limit + 1)
        if max(size, len(data)) > limit:
            raise CheckpointError(
                "file is too large", where=f"{self.root}/{name}", expected=f"at most {limit} bytes"
            )
        return data
