"""What q35c keeps on this machine because it can be made again: where, and how machine code is kept there.

Machine code that is read back is run, so a `PrivateFolder` belongs to this user alone, and an entry is used only if it
is whole: a file of the user's own whose first bytes are the hash of its name and of the rest. Nothing that goes wrong
with the folder stops a compilation: what cannot be read is made again, and what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from q35c.errors import OptionError

SWITCH = "Q35C_CACHE"
MOST_BYTES = 512 << 20
_ENTRY_BYTES = 64 << 20  # no object comes near
_HASH = hashlib.sha256
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def cache_directory() -> Path:
    """Return where things that can be made again are kept. Raises OptionError."""
    # The specification says that a relative path must be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "q35c"
    try:
        return Path.home() / ".cache" / "q35c"
    except RuntimeError:
        raise OptionError(
            "this user has no home directory to keep files in",
            hint="set HOME or XDG_CACHE_HOME to a directory",
        ) from None


class PrivateFolder:
    """Keep bytes by name for this user alone. Threads and processes may share it."""

    def __init__(self, descriptor: int) -> None:
        self._folder = descriptor
        self._has_grown = False

    def load(self, name: str) -> bytes | None:
        """Return what is kept under a name; None for nothing, and for what is damaged or somebody else's."""
        try:
            file = os.open(name, _READ_FLAGS, dir_fd=self._folder)
        except OSError:
            return None
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
            os.close(file)
            return None
        with os.fdopen(file, "rb") as stream:
            entry = stream.read(_ENTRY_BYTES)
        data = entry[_HASH().digest_size :]
        if entry[: _HASH().digest_size] != _checksum(name, data):
            return None
        with contextlib.suppress(OSError):
            os.utime(name, dir_fd=self._folder)  # the least recently used go first
        return data

    def store(self, name: str, data: bytes) -> None:
        """Keep bytes under a name, whole or not at all, or do nothing where they cannot be kept."""
        unfinished = f"{name}.{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            file = os.open(unfinished, _WRITE_FLAGS, 0o600, dir_fd=self._folder)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(_checksum(name, data) + data)
                os.rename(unfinished, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except BaseException:
                os.unlink(unfinished, dir_fd=self._folder)
                raise
            self._has_grown = True

    def trim(self, most_bytes: int = MOST_BYTES) -> None:
        """Delete the least recently used until the rest fits; unfinished files of killed processes age out likewise."""
        if not self._has_grown:
            return
        with contextlib.suppress(OSError):
            files = [
                (entry.name, entry.stat(follow_symlinks=False))
                for entry in os.scandir(self._folder)
            ]
            excess = sum(status.st_size for _, status in files) - most_bytes
            for name, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
                if excess <= 0:
                    break
                os.unlink(name, dir_fd=self._folder)
                excess -= status.st_size


@contextlib.contextmanager
def private_folder(name: str) -> Iterator[PrivateFolder | None]:
    """Open a folder of the cache directory, made if need be.

    None where the environment turns caching off, where it cannot be made and where others may write to it.
    OptionError for a switch that is neither on nor off.
    """
    descriptor = _open(name) if _is_on() else None
    if descriptor is None:
        yield None
        return
    try:
        folder = PrivateFolder(descriptor)
        yield folder
        folder.trim()
    finally:
        os.close(descriptor)


def _is_on() -> bool:
    switch = os.environ.get(SWITCH, "on")
    if switch not in ("on", "off"):
        raise OptionError("no such setting", where=SWITCH, expected="on or off", got=switch)
    return switch == "on"


def _open(name: str) -> int | None:
    try:
        path = cache_directory() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = os.open(path, _FOLDER_FLAGS)
    except (OSError, OptionError):
        return None
    if _is_ours(os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    return None


def _is_ours(status: os.stat_result) -> bool:
    """Return whether the file is this user's and nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _checksum(name: str, data: bytes) -> bytes:
    return _HASH(name.encode() + b"\0" + data).digest()
