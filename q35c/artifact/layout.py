"""Where the segments of the file lie, and the header that says so. The compiler and the reader use the same functions."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from q35c import limits
from q35c.layouts.blobs import ALIGNMENT, DTYPES, align, tensor_bytes

MAX_HEADER_BYTES = 16 << 20

_FIRST_SEGMENTS = ("code", "tokenizer")
_MOST_BYTES = {
    "tokenizer": limits.MAX_TOKENIZER_BYTES,
    "tokenizer_config": limits.MAX_TOKENIZER_CONFIG_BYTES,
    "chat_template": limits.MAX_TEMPLATE_BYTES,
}
_MOST_CODE_BYTES = 128 << 20  # ten times that of the largest model


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


def memory_plan(*, weights: int, state: int, arena: int, io: int, batch: int) -> dict[str, int]:
    """Return the manifest's `memory`; the peak holds `batch` sequences of `state` bytes each, at the default context."""
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


def most_segment_bytes(name: str) -> int:
    """Return how large a segment other than the weights can be: what the compiler takes in at the most."""
    return _MOST_BYTES.get(name, _MOST_CODE_BYTES)


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
        "dtype": DTYPES[dtype][0],
        "shape": shape,
        "data_offsets": [start, start + align(size)],
    }
