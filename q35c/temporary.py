"""Files and folders that are made, used and removed. Each is locked while its owner lives.

Unlocked ones are stale: whoever makes the next one removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from q35c.errors import OptionError

_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STALE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TRIES = 20


def temporary_file(directory: Path, prefix: str, suffix: str) -> tuple[int, Path]:
    """Create and lock a file; return its descriptor and its path. Raises OptionError."""
    return _create(directory, prefix, suffix, lambda place: os.open(place, _FILE, 0o666))


def system_directory() -> Path:
    """Return where the system keeps temporary files. Raises OptionError."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise OptionError(
            f"no directory for temporary files: {error.strerror}",
            where="TMPDIR",
            hint="let TMPDIR name a directory that can be written",
        ) from None


@contextlib.contextmanager
def temporary_folder(directory: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """Make a locked folder, remove it at the end; sweep stale ones. Raises OptionError."""
    sweep_stale(directory, prefix, suffix)
    lock, folder = _create(directory, prefix, suffix, _make_folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_stale(directory: Path, prefix: str, suffix: str) -> list[Path]:
    """Remove the temporaries in a directory whose owners are dead; return what was removed."""
    removed: list[Path] = []
    for place in sorted(directory.glob(f"{prefix}*{suffix}")):
        with contextlib.suppress(OSError):
            # Some network file systems lock only what is open for writing, which a folder cannot be.
            mode = os.O_RDONLY if place.is_dir() else os.O_RDWR
            file = os.open(place, mode | _STALE)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, place):
                    _remove(place, os.fstat(file))
                    removed.append(place)
            finally:
                os.close(file)
    return removed


def _remove(place: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        os.unlink(place)
    elif stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
        shutil.rmtree(place)
    else:
        raise OSError(errno.EPERM, "not a temporary of ours")


def _make_folder(place: Path) -> int:
    os.mkdir(place, 0o700)
    return os.open(place, _FOLDER)


def _create(
    directory: Path, prefix: str, suffix: str, make: Callable[[Path], int]
) -> tuple[int, Path]:
    """Create and lock something new; where a sweeper wins the race for the lock, try again."""
    error: OSError | None = None
    for _ in range(_TRIES):
        place = directory / f"{prefix}{secrets.token_hex(8)}{suffix}"
        try:
            file = make(place)
        except FileNotFoundError as missing:
            error = missing
            continue
        except OSError as other:
            error = other
            break
        with contextlib.suppress(OSError):  # where nothing can be locked, nothing is swept either
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, place):
            return file, place
        os.close(file)
    reason = "it is swept all the time" if error is None else error.strerror
    raise OptionError(f"cannot write here: {reason}", where=str(directory))


def _is_at(file: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(place))
    except FileNotFoundError:
        return False
