"""The vision tower's program: what it takes and returns. It is called for one picture, or pair of frames, at a time.

Its inputs and its result lie in the io block behind those of text, and its buffers in the same arena: who sees no picture
never touches their memory. The compiler and the reader use the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from q35c.artifact.entries import MAX_STEPS, Index
from q35c.artifact.kernels import Symbol
from q35c.artifact.leaves import Bytes, Io
from q35c.artifact.schema import Items, Range, Reader
from q35c.layouts import blobs
from q35c.vision.parameters import VisionParameters
from q35c.vision_config import MERGE, VisionConfig

MOST_TOKENS = 65536  # of a picture
NAME = "vision"
PATCHES, TAPS, TAP_WEIGHTS, PLACES = "patches", "taps", "tap_weights", "places"
EMBEDDINGS = "embeddings"  # its result
_NEIGHBOURS = 4  # rows of the position table around a patch


@dataclass(frozen=True, slots=True)
class Tower:
    """The program of a tower as it was compiled, for pictures of up to `tokens` tokens of the text model.

    `io` counts from the end of the text's; step i calls kernel `steps[i]` of the manifest with weight `step_weights[i]`, -1
    for none; weights from `first_weight` on are read by nothing else.
    """

    tokens: Annotated[int, Range(1, MOST_TOKENS)]
    symbol: Symbol
    steps: Annotated[tuple[Index, ...], Items(1, MAX_STEPS)]
    step_weights: Annotated[tuple[Annotated[int, Range(-1, 2**16)], ...], Items(1, MAX_STEPS)]
    first_weight: Index
    io: Io
    arena_bytes: Bytes


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower, how pictures and clips become what it reads, and its program."""

    config: Annotated[VisionConfig, Reader(VisionConfig.from_dict)]
    parameters: Annotated[VisionParameters, Reader(VisionParameters.from_dict)]
    tower: Tower


def tower_io(config: VisionConfig, tokens: int) -> dict[str, Any]:
    """Return the `io` of a tower: N patches u8, their taps i32[N, 4] into the position table with weights f32[N, 4], places
    i32[N, 2] (row and column), and the rows f32[tokens, out] that it makes of them.
    """
    patches = MERGE**2 * tokens
    specs: dict[str, tuple[str, list[int]]] = {
        PATCHES: ("u8", [patches, config.patch_bytes]),
        TAPS: ("i32", [patches, _NEIGHBOURS]),
        TAP_WEIGHTS: ("f32", [patches, _NEIGHBOURS]),
        PLACES: ("i32", [patches, 2]),
        EMBEDDINGS: ("f32", [tokens, config.out_hidden_size]),
    }
    offsets, total = blobs.pack_tensors(specs.values())
    fields = {
        name: {"offset": offset, "dtype": dtype, "shape": shape}
        for offset, (name, (dtype, shape)) in zip(offsets, specs.items(), strict=True)
    }
    return {"bytes": total, "fields": fields}
