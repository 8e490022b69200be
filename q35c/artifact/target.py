"""The machine that code was compiled for: a dataclass for each kind of machine, told apart by `backend`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from q35c.artifact.schema import Items, Pattern, Range, Tag

Feature = Annotated[str, Pattern(r"[a-z0-9_]{1,32}")]


@dataclass(frozen=True, slots=True)
class CpuTarget:
    """A host processor; features as in /proc/cpuinfo."""

    backend: Literal["cpu"]
    name: Annotated[str, Pattern(r"cpu:[a-z0-9_.\-]{1,60}")]
    cpu_features: Annotated[tuple[Feature, ...], Items(0, 128)]
    lanes: Annotated[int, Range(1, 64)]


# Another kind of machine is one more member of this union, and one more row in `runtime/targets.py`.
Target = Annotated[CpuTarget, Tag("backend")]
