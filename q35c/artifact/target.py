"""The machine that code was compiled for: a dataclass for each kind of machine, told apart by `backend`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from q35c.artifact.kernels import Symbol
from q35c.artifact.schema import Items, Pattern, Range, Tag
from q35c.layouts.blobs import Blob

Feature = Annotated[str, Pattern(r"[a-z0-9_]{1,32}")]


@dataclass(frozen=True, slots=True)
class CpuTarget:
    """A host processor; features as in /proc/cpuinfo."""

    backend: Literal["cpu"]
    name: Annotated[str, Pattern(r"cpu:[a-z0-9_.\-]{1,60}")]
    cpu_features: Annotated[tuple[Feature, ...], Items(0, 128)]
    lanes: Annotated[int, Range(1, 64)]


# --- CUDA: kernels as images for several architectures, programs as launch tables -----------------

MAX_SHARED_BYTES = 232_448  # of a block, static and dynamic together, on the largest device
MAX_BLOCK_THREADS = 1024
EMULATED = "emulated"  # an x86-64 image for the emulated driver of the tests
Architecture = Annotated[str, Pattern(rf"sm_[0-9]{{2,3}}[af]?|{EMULATED}")]
Count = Annotated[int, Range(0, 2**31 - 1)]
Bytes = Annotated[int, Range(0, 2**24)]
ParameterType = Literal["pointer", "i32", "i64"]
Scalar = Literal["i32", "i64"]


@dataclass(frozen=True, slots=True)
class CudaExtent:
    """Say how many blocks lie along an axis of a grid: `count` times ceil(rows * times / over), or `count` with `times` 0."""

    count: Annotated[int, Range(1, 2**31 - 1)]
    times: Annotated[int, Range(0, 2**20)]
    over: Annotated[int, Range(1, 2**20)]

    def blocks(self, rows: int) -> int:
        """Return the blocks for a step of so many rows."""
        return self.count * (-(-rows * self.times // self.over) if self.times else 1)


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """How a kernel of every image is launched; `rows` of a grid are those of the step: T, or 1 in a step of one row."""

    symbol: Symbol
    grid: Annotated[tuple[CudaExtent, ...], Items(3, 3)]  # x, y, z
    block: Annotated[tuple[Annotated[int, Range(1, MAX_BLOCK_THREADS)], ...], Items(3, 3)]
    shared_bytes: Annotated[int, Range(0, MAX_SHARED_BYTES)]  # dynamic
    parameters: Annotated[tuple[ParameterType, ...], Items(1, 64)]


@dataclass(frozen=True, slots=True)
class CudaArgument:
    """`start` + (T - 1) * `per_row`: bytes from the start of a blob, or a number of this type."""

    of: Blob | Scalar
    start: Annotated[int, Range(-(2**53), 2**53)]
    per_row: Annotated[int, Range(0, 2**31 - 1)]

    @property
    def type(self) -> ParameterType:
        return self.of if self.of in ("i32", "i64") else "pointer"

    def value(self, rows: int) -> int:
        """Return the number, or the byte offset, in a call of so many rows."""
        return self.start + (rows - 1) * self.per_row


@dataclass(frozen=True, slots=True)
class CudaLaunch:
    """Launch the kernel of a step; arguments are in the order of its parameters."""

    arguments: Annotated[tuple[CudaArgument, ...], Items(1, 64)]


@dataclass(frozen=True, slots=True)
class CudaProgram:
    """The launches of an entry, in order on one stream."""

    launches: Annotated[tuple[CudaLaunch, ...], Items(1, 2**16)]


@dataclass(frozen=True, slots=True)
class CudaFigures:
    """What ptxas says of a kernel: registers of a thread, bytes of it that spilled and on its stack, static shared bytes."""

    registers: Annotated[int, Range(1, 255)]
    spill_bytes: Bytes
    stack_bytes: Bytes
    shared_bytes: Annotated[int, Range(0, MAX_SHARED_BYTES)]


@dataclass(frozen=True, slots=True)
class CudaImage:
    """All kernels for one architecture, in the segment `image_` with its name; figures in the order of the kernels."""

    architecture: Architecture
    sha256: Annotated[str, Pattern(r"[0-9a-f]{64}")]
    figures: Annotated[tuple[CudaFigures, ...], Items(0, 4096)]  # none of an emulated one

    @property
    def segment(self) -> str:
        """Return the name of the segment that holds the image."""
        return f"image_{self.architecture}"


@dataclass(frozen=True, slots=True)
class CudaTarget:
    """An NVIDIA device; `kernels` are in the order of the manifest's, `programs` in that of its entries."""

    backend: Literal["cuda"]
    name: Annotated[str, Pattern(r"cuda(:[a-z0-9_,]{1,100})?")]
    images: Annotated[tuple[CudaImage, ...], Items(1, 16)]
    kernels: Annotated[tuple[CudaKernel, ...], Items(1, 4096)]
    programs: Annotated[tuple[CudaProgram, ...], Items(1, 16)]


# Another kind of machine is one more member of this union, and one more row in `runtime/targets.py`.
Target = Annotated[CpuTarget | CudaTarget, Tag("backend")]
