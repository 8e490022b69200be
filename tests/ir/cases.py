"""What an example of an op is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """Operand types in order, attributes, and the stage they are written at."""

    operands: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    stage: str = "traced"


def case(operands: str, stage: str = "traced", **attrs: Any) -> Case:
    """Make a case from types separated by spaces, dims separated by commas."""
    return Case(tuple(operands.split()), attrs, stage)
