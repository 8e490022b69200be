"""Every kernel family, as the rows at the foot of their files say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from q35c.codegen.backend import KernelKey
from q35c.codegen.calls import Signature
from q35c.codegen.cuda.kernels.family import Family
from q35c.codegen.cuda.kernels.linear import LINEAR
from q35c.codegen.cuda.kernels.norm import RMS_NORM
from q35c.errors import LoweringError

FAMILIES: dict[str, Family] = {row.name: row for row in (LINEAR, RMS_NORM)}


def signature(family: str, parameters: Mapping[str, Any]) -> Signature:
    """Return what a kernel takes and stores to. Raises LoweringError if there is no such family."""
    if family not in FAMILIES:
        raise LoweringError("no such kernel family", got=family, expected=sorted(FAMILIES))
    return FAMILIES[family].signature(parameters)


def make_kernels(wanted: Mapping[KernelKey, str]) -> dict[str, Any]:
    """Generate kernels by name."""
    return {
        name: FAMILIES[family].make(**dict(parameters))
        for (family, parameters), name in wanted.items()
    }
