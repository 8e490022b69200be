"""A locked folder beside the output in which files are made before they get their names.

A folder is locked while its maker lives. One that is not locked is left from a killed export: the next
export into the same directory removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _SUFFIX = ".q35c-", ".staging"


@contextlib.contextmanager
def staging_folder(directory: Path) -> Iterator[Path]:
    """Make a folder in `directory`, remove it at the end; raises OSError where that is not possible."""
    sweep_stale(directory)
    folder, lock = _create_locked(directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_stale(directory: Path) -> None:
    """Remove the folders whose makers are dead."""
    for folder in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # a maker lives, or somebody else removed it
            lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _create_locked(directory: Path) -> tuple[Path, int]:
    while True:
        folder = directory / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        folder.mkdir()
        # A sweeper may win the race for the lock, and the folder is gone: then make another.
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(folder, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, lock
            os.close(lock)


def _lock(folder: Path, how: int) -> int:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, how)
    except OSError:
        os.close(file)
        raise
    return file
