"""What kernels ask of an instruction set, whatever the processor's family."""

from __future__ import annotations

from dataclasses import dataclass

ELEMENTS = {"int8": 4, "int16": 2, "int32": 1, "float32": 1}  # of each 4-byte lane


@dataclass(frozen=True, slots=True)
class Instruction:
    """How an instruction set does an operation of operations.py on registers of so many 4-byte lanes.

    text            an LLVM intrinsic's name, or that of a function which `support` defines
    needs           the processor's features that it takes, as /proc/cpuinfo calls them
    takes, gives    element types of what `text` takes and gives; a scalar if `is_scalar`
    support         LLVM IR
    """

    operation: str
    lanes: int
    text: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    gives: str
    support: str = ""
    is_scalar: bool = False

    def operand(self, number: int) -> str:
        """Return an operand's TIR type."""
        return self._vector(self.takes[number])

    @property
    def result(self) -> str:
        """Return the result's TIR type."""
        return self.gives if self.is_scalar else self._vector(self.gives)

    def _vector(self, element: str) -> str:
        return f"{element}x{self.lanes * ELEMENTS[element]}"


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured to be fastest, and depends on more than the operations: registers, and the size of L1 and L2.

    float_rows              heights of the tiles of a float product; each takes what the taller ones leave
    integer_rows            the same of an integer product that is not assembled
    delta_rows              rows of a register tile of the delta rule
    query_rows              query rows of a prefill task of attention, about
    query_tile_rows         heights of attention's register tile: of several the one that leaves fewest rows empty
    has_assembled_tiles     narrow sums are those of narrow_tile_avx2.py
    slow_bits               bits of a weight whose unpacking tiles should share
    sharing_tiles           the fewest tall tiles that share what was unpacked
    unpacked_inputs         inputs that are unpacked at once
    probe_sums              sums that fit the registers and hide the latency of each other's addition
    """

    float_rows: tuple[int, ...]
    integer_rows: tuple[int, ...]
    delta_rows: int
    query_rows: int
    query_tile_rows: tuple[int, ...]
    has_assembled_tiles: bool
    slow_bits: tuple[int, ...]
    sharing_tiles: int
    unpacked_inputs: int
    probe_sums: int


@dataclass(frozen=True, slots=True)
class System:
    """LLVM IR of what is no operation on vectors.

    `flush` defines q35c_flush_denormals and q35c_restore_denormals; `wait` and `wake` are calls, the instructions that
    sleep while a word has a value, and that wake who sleeps on it: they name %generation and %expected.
    """

    flush: str
    wait: str
    wake: str


@dataclass(frozen=True)
class Isa:
    """Describe one instruction set: f32 lanes of a register, LLVM cpu and features, the /proc/cpuinfo flags it needs."""

    name: str
    lanes: int
    llvm_cpu: str
    llvm_features: tuple[str, ...]
    cpu_features: tuple[str, ...]
    tuning: Tuning
    system: System
    instructions: tuple[Instruction, ...]

    def instruction(self, operation: str) -> Instruction:
        """Return how an operation is done on a whole register. Raises KeyError if there is no instruction."""
        return {row.operation: row for row in self.instructions}[operation]

    def offers(self, operation: str) -> bool:
        """Tell whether one instruction does an operation on a whole register."""
        return any(row.operation == operation for row in self.instructions)
