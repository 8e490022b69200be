"""Every kernel family, as the rows at the foot of their files say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from q35c.codegen.backend import KernelKey, Parameters
from q35c.codegen.calls import Signature
from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.attention.picture import PICTURE_ATTENTION, PICTURE_PREPARE
from q35c.codegen.cpu.kernels.attention.prepare import ATTENTION_PREPARE
from q35c.codegen.cpu.kernels.attention.tasks import ATTENTION, ATTENTION_COMBINE
from q35c.codegen.cpu.kernels.delta.tasks import GATED_DELTA, GATED_DELTA_DECODE
from q35c.codegen.cpu.kernels.experts.products import EXPERT_DOWN, EXPERT_GATE_UP
from q35c.codegen.cpu.kernels.experts.routing import COMBINE, GROUP_BY_EXPERT, ROUTE
from q35c.codegen.cpu.kernels.family import Family
from q35c.codegen.cpu.kernels.linear.biased import LINEAR_BIAS
from q35c.codegen.cpu.kernels.linear.embedding import EMBEDDING
from q35c.codegen.cpu.kernels.linear.linear import LINEAR
from q35c.codegen.cpu.kernels.rows.layer_norm import LAYER_NORM
from q35c.codegen.cpu.kernels.rows.norm import RMS_NORM
from q35c.codegen.cpu.kernels.rows.picture import INTERPOLATE_ROWS, SCALE_PIXELS
from q35c.codegen.cpu.kernels.rows.rotary import AXIAL_ROTARY_TABLE, ROTARY_TABLE
from q35c.codegen.cpu.kernels.rows.round_bf16 import ROUND_ROWS
from q35c.codegen.cpu.kernels.rows.round_int8 import QUANTIZE_ROWS
from q35c.errors import LoweringError

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        ATTENTION,
        ATTENTION_COMBINE,
        ATTENTION_PREPARE,
        AXIAL_ROTARY_TABLE,
        COMBINE,
        EMBEDDING,
        EXPERT_DOWN,
        EXPERT_GATE_UP,
        GATED_DELTA,
        GATED_DELTA_DECODE,
        GROUP_BY_EXPERT,
        INTERPOLATE_ROWS,
        LAYER_NORM,
        LINEAR,
        LINEAR_BIAS,
        PICTURE_ATTENTION,
        PICTURE_PREPARE,
        QUANTIZE_ROWS,
        RMS_NORM,
        ROTARY_TABLE,
        ROUND_ROWS,
        ROUTE,
        SCALE_PIXELS,
    )
}


def make_kernels(
    wanted: Mapping[KernelKey, str], isa: Isa, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Generate kernels by name; `progress` hears which part of them is done."""
    made: dict[str, Any] = {}
    for key, name in wanted.items():
        made[name] = make_kernel(*key, isa)
        progress(len(made) / len(wanted))
    return made


@functools.cache
def make_kernel(family: str, parameters: Parameters, isa: Isa) -> Any:
    """Generate a kernel; parsing it takes far longer than asking for it again.

    Raises LoweringError if it takes other arguments than its family's row says: calls go by the row.
    """
    row = FAMILIES[family]
    extra = {"isa": isa} if row.takes_isa else {}
    kernel = row.make(**dict(parameters), **extra)
    said = [*row.signature(dict(parameters)).arguments, "tid", "nt"]
    taken = [parameter.name.lower() for parameter in kernel.params]
    if said != taken:
        raise LoweringError(
            "a kernel takes other arguments than its family's row says",
            where=family, expected=said, got=taken,
        )  # fmt: skip
    return kernel


def signature(family: str, parameters: Mapping[str, Any]) -> Signature:
    """Return what a kernel takes and stores to. Raises LoweringError if there is no such family."""
    if family not in FAMILIES:
        raise LoweringError("no such kernel family", got=family, expected=sorted(FAMILIES))
    return FAMILIES[family].signature(parameters)
