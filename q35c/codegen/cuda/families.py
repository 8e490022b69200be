"""Every kernel family, as the rows at the foot of their files say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from q35c.codegen.backend import KernelKey
from q35c.codegen.calls import Signature
from q35c.codegen.cuda.kernels.attention import ATTENTION, ATTENTION_COMBINE, ATTENTION_PREPARE
from q35c.codegen.cuda.kernels.delta import DELTA_INPUTS, DELTA_OUTPUT, DELTA_SCAN
from q35c.codegen.cuda.kernels.experts import EXPERT_DOWN, EXPERT_GATE_UP, ROUTE
from q35c.codegen.cuda.kernels.family import Family
from q35c.codegen.cuda.kernels.linear import LINEAR
from q35c.codegen.cuda.kernels.norm import RMS_NORM
from q35c.codegen.cuda.kernels.rotary import ROTARY_TABLE
from q35c.codegen.cuda.kernels.rows import COMBINE, EMBEDDING, QUANTIZE_ROWS, ROUND_ROWS
from q35c.codegen.cuda.kernels.tiles import LINEAR_TILES
from q35c.errors import LoweringError

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        ATTENTION,
        ATTENTION_COMBINE,
        ATTENTION_PREPARE,
        COMBINE,
        DELTA_INPUTS,
        DELTA_OUTPUT,
        DELTA_SCAN,
        EMBEDDING,
        EXPERT_DOWN,
        EXPERT_GATE_UP,
        LINEAR,
        LINEAR_TILES,
        QUANTIZE_ROWS,
        RMS_NORM,
        ROTARY_TABLE,
        ROUND_ROWS,
        ROUTE,
    )
}


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
