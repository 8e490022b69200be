"""What a manifest consists of: frozen dataclasses whose types carry their limits (see `schema.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from q35c.artifact.kernels import Symbol
from q35c.artifact.schema import Items, Pattern, Range
from q35c.config import MAX_STOP_IDS
from q35c.layouts import blobs
from q35c.layouts.cache import StateLayout
from q35c.layouts.weights import WeightLayout

Flag = bool
Name = Annotated[str, Pattern(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,119}")]
Text = Annotated[str, Pattern(r"[ -~]{1,200}")]
Hash = Annotated[str, Pattern(r"[0-9a-f]{64}")]
Bytes = Annotated[int, Range(1, 2**45)]
Offset = Annotated[int, Range(0, 2**45)]
Dim = Annotated[int, Range(1, 2**31 - 1)]
Shape = Annotated[tuple[Dim, ...], Items(1, 8)]
TokenId = Annotated[int, Range(0, 2**24)]
DType = Literal["f32", "bf16", "i64", "i32", "i8", "u8"]
Format = Annotated[str, Pattern(r"f32|bf16|[iq][0-9]{1,2}g[0-9]{1,4}")]


@dataclass(frozen=True, slots=True)
class IoField:
    """A tensor in the io block, `offset` bytes from its start."""

    offset: Offset
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Io:
    """The block through which tokens go in and logits come out."""

    bytes: Bytes
    fields: Annotated[Mapping[str, IoField], Items(1, 16)]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of a sequence's state; one that grows with the context does so along axis 1."""

    name: Name
    offset: Offset
    dtype: Literal["f32", "bf16", "i8"]
    layout: StateLayout
    shape: Shape

    @property
    def growth(self) -> Literal["fixed", "context"]:
        return "fixed" if self.layout == "plain" else "context"

    @property
    def bytes(self) -> int:
        return blobs.tensor_bytes(self.dtype, self.shape)

    def used_cells(self, max_context: int, tokens: int) -> int:
        """Return how far axis 1 is filled: keys in blocks of tokens, values singly."""
        return -(-tokens // (max_context // self.shape[1]))


@dataclass(frozen=True, slots=True)
class State:
    """The state of one sequence at the largest context; all zero is the empty sequence."""

    bytes: Bytes
    tensors: Annotated[tuple[StateTensor, ...], Items(1, 4096)]

    def used_bytes(self, max_context: int, tokens: int) -> int:
        """Return the bytes that are in use after so many tokens."""
        total = 0
        for tensor in self.tensors:
            size = tensor.bytes
            if tensor.growth == "context":
                size = size // tensor.shape[1] * tensor.used_cells(max_context, tokens)
            total += blobs.align(size)
        return total


@dataclass(frozen=True, slots=True)
class Weight:
    """A packed weight, `offset` bytes from the first weight; `bytes` excludes the padding.

    `matrix` is its shape before it was packed, all sources together; with `layout` and `format` it gives `dtype` and `shape`.
    """

    name: Name
    offset: Offset
    bytes: Bytes
    dtype: DType
    shape: Shape
    layout: WeightLayout
    format: Format
    matrix: Shape
    sources: Annotated[tuple[Name, ...], Items(0, MAX_STOP_IDS)]


@dataclass(frozen=True, slots=True)
class Probe:
    """A function that measures the machine: each thread does `work` bytes or operations for a unit of T."""

    name: Literal["clock", "read", "cache", "int8", "bf16", "f32"]
    symbol: Symbol
    work: Annotated[int, Range(1, 2**30)]


@dataclass(frozen=True, slots=True)
class Segment:
    """A hashed stretch of the file; `bytes` excludes the padding."""

    bytes: Bytes
    sha256: Hash


@dataclass(frozen=True, slots=True)
class Generation:
    """How to sample when the caller does not say; `stop_ids` end a sequence."""

    do_sample: Flag
    temperature: Annotated[float, Range(0, 1000)]
    top_k: Annotated[int, Range(0, 2**24)]
    top_p: Annotated[float, Range(0, 1)]
    min_p: Annotated[float, Range(0, 1)]
    repetition_penalty: Annotated[float, Range(1e-3, 1000)]
    presence_penalty: Annotated[float, Range(-1000, 1000)]
    stop_ids: Annotated[tuple[TokenId, ...], Items(0, MAX_STOP_IDS)]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes the runtime needs: `peak` is for the whole batch at the full context."""

    weights: Bytes
    state_per_sequence: Bytes
    arena: Bytes
    io: Bytes
    peak: Bytes
