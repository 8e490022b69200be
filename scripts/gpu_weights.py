"""Random weights behind the head of an artifact (gpu_pack.py): fast, for measuring speed, with numbers of ordinary size.

Of a large matrix one block of 32 rows is packed and repeated: what is read, and where, is as in a real model. Small matrices, as
routers are, are random throughout.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from q35c.artifact.leaves import Weight
from q35c.artifact.manifest import Manifest
from q35c.artifact.reader import parse_manifest
from q35c.codegen.pack import pack_blocks
from q35c.frontend.dummy import DummyWeights
from q35c.layouts.weights import BLOCK

_WHOLE_ROWS = 1024  # matrices of at most so many rows are random throughout
_CHUNK_BYTES = 64 << 20


def manifest_of(head: Path) -> Manifest:
    """Return the manifest of a head."""
    with head.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return parse_manifest(header["__metadata__"]["q35c"].encode())


def fill(head: Path, path: Path, seed: int = 0) -> None:
    """Write an artifact from its head; the hash of its weights is wrong, so it must be loaded with verify=False."""
    manifest = manifest_of(head)
    drawn = DummyWeights(manifest.model, seed)
    shutil.copyfile(head, path)
    start = head.stat().st_size
    with path.open("r+b") as file:
        for weight in manifest.weights:
            file.seek(start + weight.offset)
            written = 0
            for chunk in _chunks(weight, drawn):
                file.write(chunk)
                written += chunk.nbytes
            assert written == weight.bytes, weight.name
    os.truncate(path, start + manifest.weights_bytes)


def _chunks(weight: Weight, drawn: DummyWeights) -> Iterator[np.ndarray]:
    """Yield the bytes of a weight in order."""
    if weight.layout in ("vector", "conv"):
        name = weight.sources[0]
        values = drawn.rows(name, 0, drawn.shapes[name][0])
        if weight.layout == "conv":
            values = np.ascontiguousarray(values[:, 0, :].T)
        yield values
        return
    rows = weight.matrix[-2]
    count = weight.bytes // _packed(weight, 1, drawn).nbytes
    if weight.layout == "linear" and rows <= _WHOLE_ROWS:
        yield _packed(weight, count, drawn)
        return
    one = _packed(weight, 1, drawn)
    most = max(1, _CHUNK_BYTES // one.nbytes)
    many = np.tile(one, (min(most, count), *(1,) * (one.ndim - 1)))
    for first in range(0, count, most):
        yield many[: min(most, count - first)]


def _packed(weight: Weight, count: int, drawn: DummyWeights) -> np.ndarray:
    """Return so many packed blocks of random rows."""
    random = np.random.default_rng([count, *weight.name.encode()])
    rows = 0.02 * random.standard_normal((count * BLOCK, weight.matrix[-1]), np.float32)
    return pack_blocks(rows, weight.format)


def decode_bytes(manifest: Manifest, lengths: Sequence[int]) -> float:
    """Return the bytes that a step of decode must move: weights, recurrent states, keys and values, as the kernels' costs say."""
    entry = manifest.text_entries.batch
    total, batch = 0.0, len(lengths)
    for step, number in zip(entry.steps, entry.step_weights, strict=True):
        cost = manifest.kernels[step].cost
        share = 1 - (1 - cost.weight_share) ** batch
        total += share * (manifest.weights[number].bytes if number >= 0 else 0)
        total += batch * (cost.bytes_per_sequence + cost.bytes_per_token)
        total += cost.bytes_per_cell * sum(lengths)
    return total
