"""States in files: arrays behind a JSON header, in the layout of safetensors, with a hash over all of it.

The metadata says what the arrays are. The hash is of the whole file with zeros in its own place, so that a file that was cut
off, damaged or put together by hand in part is told from one that was written here. Files are readable by their owner alone,
as they hold what was said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from q35c import strictjson
from q35c.errors import StateError
from q35c.runtime.memory import available_memory, check_allocation

FORMAT = "q35c state 1"
MOST_HEADER_BYTES = 1 << 20
_MOST_AXES, _MOST_SIZE = 8, 2**40
_ZERO_HASH = "0" * 64
# bfloat16 has no numpy type of its own: its bits are handled as uint16.
_TYPES = {"F32": "<f4", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "|i1", "U8": "|u1"}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
Arrays = Sequence[NDArray[Any]]
Spec = tuple[np.dtype[Any], tuple[int, ...]]


def write_state(path: Path, metadata: Mapping[str, str], arrays: Arrays) -> None:
    """Write a file as a whole. Raises OptionError, DiskRefused; the old file then stays."""
    from q35c.outputs import writing  # loading and answering write nothing

    header = _header(metadata, arrays)
    size = len(header) + sum(array.nbytes for array in arrays)
    with writing(path, 0o600, size) as stream:
        digest = hashlib.sha256(header)
        stream.write(header)
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            digest.update(data)
            stream.write(data)
        stream.seek(header.index(_ZERO_HASH.encode()))
        stream.write(digest.hexdigest().encode())


def read_state(path: Path) -> tuple[dict[str, str], list[NDArray[Any]]]:
    """Return metadata and arrays. Raises StateError for a file that is damaged or none, MemoryRefused."""
    try:
        with path.open("rb") as file:
            header, metadata, specs = _read_header(path, file)
            size = sum(math.prod(shape) * kind.itemsize for kind, shape in specs)
            if os.fstat(file.fileno()).st_size != len(header) + size:
                raise _damaged(path, "it is too short or too long")
            check_allocation("a saved state", size, available_memory())
            digest = hashlib.sha256(
                header.replace(metadata["sha256"].encode(), _ZERO_HASH.encode(), 1)
            )
            arrays: list[NDArray[Any]] = []
            for kind, shape in specs:
                arrays.append(np.empty(shape, kind))
                view = arrays[-1].reshape(-1).view(np.uint8).data
                if file.readinto(view) != len(view):
                    raise _damaged(path, "it is too short")
                digest.update(view)
    except OSError as error:
        raise StateError(f"cannot read: {error.strerror}", where=str(path)) from None
    if digest.hexdigest() != metadata["sha256"]:
        raise _damaged(path, "its hash is another one")
    return metadata, arrays


def _header(metadata: Mapping[str, str], arrays: Arrays) -> bytes:
    own = {"sha256": _ZERO_HASH, "format": FORMAT, **metadata}
    document: dict[str, Any] = {"__metadata__": own}
    end = 0
    for number, array in enumerate(arrays):
        begin, end = end, end + array.nbytes
        document[str(number)] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, str], list[Spec]]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) != 8 or not 2 <= length <= MOST_HEADER_BYTES:
        raise _damaged(path, "it has no header")
    text = file.read(length)
    if len(text) != length:
        raise _damaged(path, "it is too short")
    found = strictjson.loads(text, where=str(path), limit=MOST_HEADER_BYTES, error=StateError)
    document = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    own = document.pop("__metadata__", None)
    metadata = cast(dict[str, Any], own) if isinstance(own, dict) else {}
    is_ours = metadata.get("format") == FORMAT
    if not is_ours or not all(isinstance(item, str) for item in metadata.values()):
        raise _damaged(path, "it is no state of this version")
    if len(metadata.get("sha256", "")) != len(_ZERO_HASH):
        raise _damaged(path, "it has no hash")
    return start + text, metadata, _read_specs(path, document)


def _read_specs(path: Path, document: dict[str, Any]) -> list[Spec]:
    """Return type and shape of each array; they follow each other without a gap."""
    specs: list[Spec] = []
    end = 0
    for number in range(len(document)):
        spec = _read_spec(document.get(str(number)))
        begin, end = end, end + (0 if spec is None else math.prod(spec[1]) * spec[0].itemsize)
        if spec is None or document[str(number)].get("data_offsets") != [begin, end]:
            raise _damaged(path, f"its array {number} is malformed")
        specs.append(spec)
    return specs


def _read_spec(item: Any) -> Spec | None:
    if not isinstance(item, dict):
        return None
    fields = cast(dict[str, Any], item)
    kind, shape = fields.get("dtype"), fields.get("shape")
    if not isinstance(kind, str) or kind not in _TYPES or not isinstance(shape, list):
        return None
    sizes = cast(list[Any], shape)
    if len(sizes) > _MOST_AXES or not all(type(n) is int and 0 <= n < _MOST_SIZE for n in sizes):
        return None
    return np.dtype(_TYPES[kind]), tuple(sizes)


def _damaged(path: Path, why: str) -> StateError:
    return StateError(f"not a saved state: {why}", where=str(path))
