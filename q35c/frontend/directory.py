"""Read files of a model directory that may be hostile: regular files, by name, links only where they lead nowhere else."""

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from q35c.errors import CheckpointError

_NAME = re.compile(r"[\w.-]+", re.ASCII)


class ModelDirectory:
    """One flat directory. Files are opened by name only; special files are refused.

    A link is followed where the directory itself says nothing else than "there": inside the directory; from a snapshot of
    a hub cache to the cache's own files; and where the directory holds nothing but links to the files of the same names
    in one other directory, for which it then stands. Any other link needs consent, `follow_links`.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        if not root.is_dir():
            raise CheckpointError("is not a directory", where=str(root))
        self.root = root
        self._follow_links = follow_links
        self._link_places = {root.resolve(), *_hub_blobs(root), *_mirrored(root)}

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
        """Return where a link leads. Raises CheckpointError where it must not be followed."""
        try:
            target = path.resolve(strict=True)
        except (
            RuntimeError,
            PermissionError,
            NotADirectoryError,
        ) as error:  # a loop is a RuntimeError
            raise CheckpointError(
                f"is a symbolic link that leads nowhere: {error!s:.200}", where=str(path)
            ) from None
        if self._follow_links or target.parent in self._link_places:
            return target
        raise CheckpointError(
            "is a symbolic link out of the directory, which is not followed unasked",
            where=str(path),
            hint="copy the file itself here, or consent: follow_links=True",
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


def _hub_blobs(root: Path) -> list[Path]:
    """Return the folder of a hub cache that the links of a snapshot lead to: REPOSITORY/snapshots/COMMIT and REPOSITORY/blobs."""
    snapshots = root.resolve().parent
    blobs = snapshots.parent / "blobs"
    # A link there could lead anywhere.
    is_cache = snapshots.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
    return [blobs] if is_cache else []


def _mirrored(root: Path) -> list[Path]:
    """Return the one directory that holds all files of `root` if every entry is a link to its namesake there."""
    with os.scandir(root) as entries:
        found = [(entry.is_symlink(), entry.name, entry.path) for entry in entries]
    if not all(is_link for is_link, _, _ in found):
        return []
    targets = [Path(os.path.realpath(path)) for _, _, path in found]
    places = {target.parent for target in targets}
    is_mirror = len(places) == 1 and [target.name for target in targets] == [
        name for _, name, _ in found
    ]
    return list(places) if is_mirror else []
