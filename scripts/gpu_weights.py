"""Random weights behind the head of an artifact (gpu_pack.py): fast, for measuring speed, with numbers of ordinary size.

Of a matrix one block of 32 rows is packed and repeated: what is read, and where, is as in a real model. Small ones that are no integers,
as routers are, are random throughout.
"""

from __future__ import annotations

import functools
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

_WHOLE_ROWS = 1024  # the most that are random throughout
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
    one = _packed(weight.format, weight.matrix[-1], 1, "")
    count = weight.bytes // one.nbytes
    if count * BLOCK <= _WHOLE_ROWS and weight.format in ("f32", "bf16"):
        yield _packed(weight.format, weight.matrix[-1], count, weight.name)
        return
    most = max(1, _CHUNK_BYTES // one.nbytes)
    many = np.tile(one, (min(most, count), *(1,) * (one.ndim - 1)))
    for first in range(0, count, most):
        yield many[: min(most, count - first)]


@functools.cache
def _packed(form: str, inputs: int, count: int, name: str) -> np.ndarray:
    """Return so many packed blocks of random rows; other names, other rows."""
    random = np.random.default_rng([count, inputs, *name.encode()])
    rows = np.float32(0.02) * random.standard_normal((count * BLOCK, inputs), np.float32)
    return pack_blocks(rows, form)


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
