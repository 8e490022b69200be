"""Where everything lies: tensors in a block, fields of the io block, segments of the file.

Every block starts at a multiple of 64 bytes and every tensor in it too, so that generated code may
load whole cache lines and vectors. The compiler and the reader use the same functions.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

ALIGNMENT = 64
CELL = 32  # tokens per block of the key cache: one vector load serves 32 tokens
GRID = 32  # tokens: cutting a sequence at a multiple of this into calls changes no bit of a result
SCALE_ROWS = 4  # rows of 32 bytes behind a block of an int8 cache: an f32 scale for each token
MAX_HEADER_BYTES = 16 << 20
MAX_BARRIER_BYTES = 1 << 20  # with a counter for each group of each expert's inner rows

_DTYPES = {  # name -> (safetensors name, bytes)
    "f32": ("F32", 4),
    "bf16": ("BF16", 2),
    "i64": ("I64", 8),
    "i32": ("I32", 4),
    "i8": ("I8", 1),
    "u8": ("U8", 1),
}
_FIRST_SEGMENTS = ("code", "tokenizer")


class HasMaxTokens(Protocol):
    """Anything that says how many tokens a call takes."""

    @property
    def max_tokens(self) -> int: ...


class HasBytes(Protocol):
    """Anything that says how many bytes it has."""

    @property
    def bytes(self) -> int: ...


class HasTensor(Protocol):
    """Anything that lies at an offset with a type and a shape."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def align(size: int) -> int:
    """Round up to a multiple of 64."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a dense tensor, without padding."""
    return math.prod(shape) * _DTYPES[dtype][1]


def pack_tensors(specs: Iterable[tuple[str, Sequence[int]]]) -> tuple[list[int], int]:
    """Place (dtype, shape) tensors one after another; return their offsets and the block's bytes."""
    offsets: list[int] = []
    end = 0
    for dtype, shape in specs:
        offsets.append(end)
        end += align(tensor_bytes(dtype, shape))
    return offsets, end


def max_tokens(entries: Iterable[HasMaxTokens]) -> int:
    """Return the tokens of the largest call, which is the width of the io block's token fields."""
    return max(entry.max_tokens for entry in entries)


def logits_rows(logits: str, tokens: int) -> int:
    """Return how many rows of logits an entry writes for so many tokens."""
    return {"none": 0, "last": 1, "all": tokens}[logits]


def io_layout(tokens: int, batch: int, logits_rows: int, vocab: int, steps: int) -> dict[str, Any]:
    """Return the manifest's `io`: tokens, three position axes, slots, starts, logits, clock.

    `positions` has a row stride of `tokens` elements, whatever a call's token count. `clock` is a switch, then the
    cycle counter before each of at most `steps` kernels and after the last.
    """
    specs: dict[str, tuple[str, list[int]]] = {
        "tokens": ("i32", [tokens]),
        "positions": ("i32", [3, tokens]),
        "slots": ("i64", [batch]),
        "starts": ("i32", [batch]),
        "logits": ("f32", [logits_rows, vocab]),
        "clock": ("i64", [steps + 2]),
    }
    offsets, total = pack_tensors(specs.values())
    fields = {
        name: {"offset": offset, "dtype": dtype, "shape": shape}
        for offset, (name, (dtype, shape)) in zip(offsets, specs.items(), strict=True)
    }
    return {"bytes": total, "fields": fields}


def state_layout(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the manifest's `state` from tensors with name, dtype, shape and growth."""
    listed = [dict(tensor) for tensor in tensors]
    offsets, total = pack_tensors((tensor["dtype"], tensor["shape"]) for tensor in listed)
    placed = [{**tensor, "offset": at} for tensor, at in zip(listed, offsets, strict=True)]
    return {"bytes": total, "tensors": placed}


def memory_plan(*, weights: int, state: int, arena: int, io: int, batch: int) -> dict[str, int]:
    """Return the manifest's `memory`; the peak holds `batch` sequences at the full context."""
    return {
        "weights": weights,
        "state_per_sequence": state,
        "arena": arena,
        "io": io,
        "peak": weights + batch * state + arena + io,
    }


def segment_order(names: Iterable[str]) -> list[str]:
    """Return segment names in file order: code, tokenizer, the others by name, weights last."""
    rest = sorted(set(names) - {*_FIRST_SEGMENTS, "weights"})
    return [name for name in _FIRST_SEGMENTS if name in names] + rest


def segment_offsets(segments: Mapping[str, HasBytes]) -> tuple[dict[str, int], int]:
    """Return each segment's offset from the data start, and where the weights end."""
    offsets: dict[str, int] = {}
    end = 0
    for name in [*segment_order(segments), "weights"]:
        offsets[name] = end
        end += align(segments[name].bytes)
    return offsets, end


def build_header(
    manifest_json: bytes,
    digest: str,
    segments: Mapping[str, HasBytes],
    weights: Iterable[HasTensor],
) -> bytes:
    """Return the file up to the data start: the one safetensors header this manifest implies.

    A tensor whose bytes are not a multiple of 64 is listed as U8 with its zero padding; its true type is
    in the manifest. So the tensors fill the file without holes, as the format demands.
    """
    header: dict[str, Any] = {
        "__metadata__": {"q35c": manifest_json.decode("ascii"), "q35c.sha256": digest}
    }
    offsets, _ = segment_offsets(segments)
    for name in segment_order(segments):
        header[name] = _tensor("u8", [segments[name].bytes], offsets[name])
    for weight in weights:
        start = offsets["weights"] + weight.offset
        header[weight.name] = _tensor(weight.dtype, list(weight.shape), start)
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    padding = align(8 + len(text)) - 8 - len(text)
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


def _tensor(dtype: str, shape: list[int], start: int) -> dict[str, Any]:
    size = tensor_bytes(dtype, shape)
    if size % ALIGNMENT:
        dtype, shape = "u8", [align(size)]
    return {
        "dtype": _DTYPES[dtype][0],
        "shape": shape,
        "data_offsets": [start, start + align(size)],
    }
