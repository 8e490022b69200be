"""What a manifest says of the kernels in the code: their parameters for people, their costs for the roofline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from q35c.artifact.schema import Items, Pattern, Range
from q35c.config import MAX_STOP_IDS

Symbol = Annotated[str, Pattern(r"[a-z][a-z0-9_]{0,63}")]
Number = Annotated[int, Range(-(2**53), 2**53)] | Annotated[float, Range(-1e300, 1e300)]
Scalar = bool | Number | Annotated[str, Pattern(r"[ -~]{0,200}")]
Parameter = Scalar | Annotated[tuple[Scalar, ...], Items(0, 512)]
Amount = Annotated[float, Range(0, 1e18)]  # bytes or operations


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What a call of a kernel must do at the least (`codegen/calls.py` says what each number means)."""

    peak: Literal["int8", "bf16", "f32"]
    weight_share: Annotated[float, Range(0, 1)]
    bytes_per_sequence: Amount
    bytes_per_token: Amount
    bytes_per_cell: Amount
    cached_bytes_per_token: Amount
    operations_per_token: Amount
    operations_per_score: Amount


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in the code, for people and reports."""

    name: Symbol
    family: Symbol
    parameters: Annotated[Mapping[str, Parameter], Items(0, MAX_STOP_IDS)]
    cost: KernelCost
