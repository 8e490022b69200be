"""Safetensors shards of one checkpoint: which file holds which tensor, and reading rows of it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from q35c import strictjson
from q35c.config import ModelConfig
from q35c.errors import CheckpointError, InternalError, UnsupportedConfig
from q35c.frontend.directory import ModelDirectory
from q35c.frontend.hints import missing_hint, shape_hint, unexpected_hint
from q35c.frontend.tensors import (
    TOWER_PREFIX,
    Shape,
    canonical_name,
    expected_tensors,
    expected_tower_tensors,
    parts_of,
    stored_shape,
)
from q35c.vision_config import VisionConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_INDEX_BYTES = 64 << 20
_MAX_HEADER_BYTES = 64 << 20
_MAX_TENSOR_VALUES = 2_000_000  # an index or header may name a hundred thousand experts
_COMPARED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its shard declares it; `handle` is the open shard."""

    handle: Any
    shard: str
    name: str
    shape: Shape
    dtype: str

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) of axis 0 as float32."""
        return self.handle.get_slice(self.name)[start:stop].float().numpy()


class Shards:
    """All tensors of the text tower, and of a vision tower, checked by name, shape and dtype; data is read on demand."""

    def __init__(
        self, directory: ModelDirectory, config: ModelConfig, tower: VisionConfig | None = None
    ) -> None:
        self._where = str(directory.root)
        self._shapes = expected_tensors(config)
        if tower is not None:
            self._shapes |= expected_tower_tensors(tower)
        self._stored = _stored_tensors(directory, with_tower=tower is not None)
        self._rows: dict[str, list[list[StoredTensor]]] = {}
        unused = dict(self._stored)
        for name, shape in self._shapes.items():
            self._locate(name, shape, unused)
        if config.tie_word_embeddings and "lm_head.weight" in unused:
            self._check_tied(unused.pop("lm_head.weight"))
        for name, tensor in unused.items():
            raise CheckpointError(
                f"unexpected tensor {tensor.name!r:.120}",
                where=f"{self._where}/{tensor.shard}",
                got=f"{tensor.dtype} {list(tensor.shape)}",
                hint=unexpected_hint(name),
            )

    def _locate(self, name: str, shape: Shape, unused: dict[str, StoredTensor]) -> None:
        """Take a tensor, or the parts it is stored as, out of `unused`."""
        parts = [] if name in unused else parts_of(name, shape)
        if not parts:
            self._take(name, shape, unused)
        else:
            self._rows[name] = [
                [self._take(part, size, unused) for part, size in row.items()] for row in parts
            ]

    def _take(self, name: str, shape: Shape, unused: dict[str, StoredTensor]) -> StoredTensor:
        tensor = unused.pop(name, None)
        if tensor is None:
            raise CheckpointError(
                f"missing tensor {name!r}",
                where=self._where,
                expected=list(shape),
                hint=missing_hint(name, unused),
            )
        where = f"{self._where}/{tensor.shard}"
        if tensor.dtype not in DTYPES:
            raise UnsupportedConfig(
                f"tensor {tensor.name!r} is stored as {tensor.dtype}, which is not supported",
                where=where,
                expected=" or ".join(DTYPES),
                hint="use the unquantized checkpoint",
            )
        if stored_shape(name, tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {tensor.name!r} has the wrong shape",
                where=where,
                expected=list(shape),
                got=list(tensor.shape),
                hint=shape_hint(name, shape, tensor.shape),
            )
        return tensor

    def _check_tied(self, head: StoredTensor) -> None:
        """Accept a stored copy of the tied head only if it is one."""
        table = self._take("embed_tokens.weight", head.shape, dict(self._stored))
        for start in range(0, head.shape[0], _COMPARED_ROWS):
            stop = min(start + _COMPARED_ROWS, head.shape[0])
            if not np.array_equal(head.rows(start, stop), table.rows(start, stop)):
                raise CheckpointError(
                    "tie_word_embeddings is true, but lm_head.weight differs from embed_tokens",
                    where=f"{self._where}/{head.shard}",
                    hint="set tie_word_embeddings to false or remove lm_head.weight",
                )

    @property
    def notes(self) -> list[str]:
        """Return what the shards say about themselves that may make the model another one."""
        handles = {tensor.shard: tensor.handle for tensor in self._stored.values()}
        converted = [
            shard
            for shard, handle in handles.items()
            if (handle.metadata() or {}).get("format") == "mlx"
        ]
        said = "an MLX conversion; some of these hold norms that are off by 1: compare with the original"
        return [f"{shard}: {said}" for shard in converted[:1]]

    @property
    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) of axis 0 as float32."""
        if name not in self._rows:
            made = self._stored[name].rows(start, stop)
            return made.reshape(len(made), *self._shapes[name][1:])
        whole = self._rows[name][start:stop]
        made = [np.concatenate([part.rows(0, part.shape[0]) for part in row]) for row in whole]
        return np.stack(made) if made else np.empty((0, *self._shapes[name][1:]), np.float32)


def has_tower(directory: ModelDirectory) -> bool:
    """Tell whether a directory holds tensors of a vision tower. Raises CheckpointError where it cannot be read."""
    names = directory.names()
    if INDEX in names:
        stored = list(_read_index(directory))
    else:
        shard = _only_shard(directory, names)
        _check_header(directory, shard)
        stored = [tensor.name for tensor in _open_shard(directory, shard)]
    canonical = (canonical_name(name, with_tower=True) for name in stored)
    return any(name is not None and name.startswith(TOWER_PREFIX) for name in canonical)


def _stored_tensors(directory: ModelDirectory, *, with_tower: bool) -> dict[str, StoredTensor]:
    """Open every shard and return its tensors that are read, by canonical name."""
    read = functools.partial(canonical_name, with_tower=with_tower)
    names = directory.names()
    placed = _read_index(directory) if INDEX in names else None
    if placed is not None and SINGLE in names and SINGLE not in placed.values():
        raise CheckpointError(
            f"ambiguous weights: both {SINGLE} and {INDEX}", where=str(directory.root)
        )
    if placed is not None:  # a shard that only holds other towers need not be there
        placed = {name: shard for name, shard in placed.items() if read(name) is not None}
    shards = sorted(set(placed.values())) if placed is not None else [_only_shard(directory, names)]
    for shard in shards:
        _check_header(directory, shard)
    stored: dict[str, StoredTensor] = {}
    seen: set[str] = set()
    for shard in shards:
        for tensor in _open_shard(directory, shard):
            if (name := read(tensor.name)) is None:
                continue
            seen.add(tensor.name)
            _check_placed(placed, tensor, directory)
            if name in stored:
                raise CheckpointError(
                    f"two tensors for {name!r:.120}",
                    where=str(directory.root),
                    got=f"{stored[name].name!r:.120} and {tensor.name!r:.120}",
                )
            stored[name] = tensor
    for name in sorted(set(placed or ()) - seen):
        raise CheckpointError(
            f"the index lists {name!r:.120}, which its shard does not hold",
            where=str(directory.root),
        )
    return stored


def _only_shard(directory: ModelDirectory, names: list[str]) -> str:
    """Return the single weight file of a directory without an index."""
    found = [name for name in names if name.endswith(".safetensors")]
    if SINGLE in found or len(found) == 1:
        return SINGLE if SINGLE in found else found[0]
    if found:
        raise CheckpointError(f"several shards but no {INDEX}", where=str(directory.root))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            "only pickled weights, which can run code and are never opened",
            where=str(directory.root),
            got=", ".join(pickles[:4]),
            hint="convert them to safetensors",
        )
    raise CheckpointError("no .safetensors file", where=str(directory.root))


def _read_index(directory: ModelDirectory) -> dict[str, str]:
    """Return which shard holds which tensor, by stored name."""
    where = f"{directory.root}/{INDEX}"
    index = strictjson.loads(
        directory.read(INDEX, _MAX_INDEX_BYTES),
        where=where,
        limit=_MAX_INDEX_BYTES,
        error=CheckpointError,
        max_values=_MAX_TENSOR_VALUES,
    )
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError("has no weight_map", where=where)
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"unsafe shard name for {name!r:.120}",
                where=where,
                expected=_SHARD_NAME.pattern,
                got=f"{shard!r:.120}",
            )
    return placed


def _check_placed(
    placed: dict[str, str] | None, tensor: StoredTensor, directory: ModelDirectory
) -> None:
    """Refuse a tensor that the index places elsewhere or does not know."""
    if placed is not None and placed.get(tensor.name) != tensor.shard:
        raise CheckpointError(
            f"the index and the shard disagree about {tensor.name!r:.120}",
            where=f"{directory.root}/{tensor.shard}",
            expected=f"in {placed.get(tensor.name)!r:.120}",
            got=f"in {tensor.shard!r:.120}",
        )


def _check_header(directory: ModelDirectory, shard: str) -> None:
    """Refuse a header that strict JSON refuses: safetensors lets the last of two equal names win."""
    where = f"{directory.root}/{shard}"
    with directory.open(shard) as file:
        remaining = os.fstat(file.fileno()).st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(remaining, _MAX_HEADER_BYTES):
            raise CheckpointError(
                "damaged safetensors file: the header does not fit",
                where=where,
                expected=f"2 to {max(0, min(remaining, _MAX_HEADER_BYTES))} bytes",
                got=length,
            )
        header = file.read(length)
    strictjson.loads(
        header,
        where=where,
        limit=_MAX_HEADER_BYTES,
        error=CheckpointError,
        max_values=_MAX_TENSOR_VALUES,
    )


def _open_shard(directory: ModelDirectory, shard: str) -> Iterator[StoredTensor]:
    """Yield what a shard declares. The container is parsed and bounds-checked by safetensors."""
    from safetensors import SafetensorError, safe_open

    path = directory.path(shard)
    broken = partial(CheckpointError, where=str(path))
    try:
        handle = safe_open(path, framework="pt")
        declared = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise broken(
            f"damaged safetensors file: {error}", hint="download or copy the file again"
        ) from None
    for name, part in declared:
        shape = tuple(part.get_shape())
        if not all(type(size) is int for size in shape):
            raise InternalError("safetensors returned a shape that is not integers", where=name)
        yield StoredTensor(handle, shard, name, shape, part.get_dtype())
