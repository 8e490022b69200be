"""Files that we write: checked before the work, made under another name, published by a rename.

At any moment the name holds the old file, the new one or none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from q35c.errors import DiskRefused, OptionError
from q35c.temporary import sweep_stale, temporary_file

PREFIX, SUFFIX = ".q35c-", ".partial"
_PRODUCTS = {".q35c", ".onnx", ".data"}  # suffixes of what may be made again where it lies
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # file systems that cannot sync a directory


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse a path that no file can be published at, or that is one of the inputs. Raises OptionError.

    Of an input that is a directory every file in it counts, except those that look like products of ours.
    """
    try:
        if not path.parent.is_dir():
            raise OptionError("no such directory", where=str(path.parent), hint="create it first")
        _check_name(path, inputs)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot be written: {_reason(error)}", where=_shown(path)) from None
    # What the directory's permissions say does not hold for everyone, nor on every file system.
    file, temporary = temporary_file(path.parent, PREFIX, SUFFIX)
    os.close(file)
    temporary.unlink(missing_ok=True)


def _check_name(path: Path, inputs: Iterable[Path]) -> None:
    if path.name.startswith(PREFIX) and path.name.endswith(SUFFIX):
        raise _bad_name(path, "temporary files of q35c, which are removed, have such names")
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise _bad_name(path, "a link that leads nowhere has this name") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise _bad_name(path, f"{kind} has this name")
    _check_replaceable(path)
    for place in inputs:
        files = place.iterdir() if place.is_dir() else [place]
        for file in files:
            is_product = file != place and file.suffix in _PRODUCTS
            if not is_product and file.exists() and os.path.samestat(file.stat(), status):
                raise _bad_name(path, "this is a file that is read, and it would be replaced")


def _check_replaceable(path: Path) -> None:
    """Refuse a file whose name cannot be given to another: a mounted one, or in a sticky directory."""
    file, parent = os.lstat(path), os.stat(path.parent)
    if file.st_dev != parent.st_dev:
        raise _bad_name(path, "a file is mounted here")
    owners = (0, file.st_uid, parent.st_uid)
    if parent.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        raise _bad_name(path, "another user's file has this name")


def _bad_name(path: Path, what: str) -> OptionError:
    return OptionError(what, where=str(path), hint="name another file")


def _reason(error: OSError | ValueError) -> str:
    return str(error) if isinstance(error, ValueError) else error.strerror or str(error)


def _shown(path: Path) -> str:
    """Return a path that may be overlong or hold a null."""
    return ascii(str(path))[1:-1][:300]


def check_folder(path: Path, pattern: str) -> None:
    """Make a directory for outputs. Raises OptionError where it cannot be made or written.

    What is there already under a name like `pattern` may be replaced.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        what = f"cannot make the directory: {_reason(error)}"
        raise OptionError(what, where=_shown(path)) from None
    for place in (path / "output", *path.glob(pattern)):
        check_output(place)


def check_space(directory: Path, need: int) -> None:
    """Refuse a file of `need` bytes that does not fit. Raises DiskRefused, OptionError."""
    try:
        status = os.statvfs(directory)
    except OSError as error:
        raise OptionError(f"cannot write here: {error.strerror}", where=str(directory)) from None
    have = status.f_bavail * status.f_frsize
    if need > have:
        raise DiskRefused(
            "not enough free disk space for the file",
            where=str(directory),
            expected=f"{need} bytes free",
            got=f"{have} bytes free",
            hint="free some disk space or write elsewhere",
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and need > limit:
        raise DiskRefused(
            "this process may not write files that large",
            where=str(directory),
            expected=f"{need} bytes",
            got=f"a limit of {limit} bytes",
            hint="raise the limit (ulimit -f)",
        )


def write_output(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a small file as a whole; `mode` are its permissions where the user's own must not decide.

    Raises OptionError, DiskRefused; the old file then stays.
    """
    with writing(path, mode) as stream:
        stream.write(data)


@contextlib.contextmanager
def writing(path: Path, mode: int | None = None, size: int = 0) -> Iterator[BinaryIO]:
    """Yield what a file of so many bytes is written to, which gets its name at the end; else as `write_output`."""
    check_output(path)
    sweep_stale(path.parent, PREFIX, SUFFIX)
    if size:
        check_space(path.parent, size)
    file, temporary = temporary_file(path.parent, PREFIX, SUFFIX)
    try:
        if mode is not None:
            os.fchmod(file, mode)
        with open(file, "wb", closefd=False) as stream:
            yield stream
        os.fsync(file)
        publish(temporary, path)
    except OSError as error:
        raise DiskRefused(f"cannot write: {error.strerror}", where=str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(file)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished, synced file its name, and make the name last. Raises OSError."""
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(directory)
